"""Attention of queries that choose blocks of keys each for itself: the queries of a block are gathered, not the keys.

A block of keys is loaded once and meets all queries that visit it in one product, which blocks of several heads share.
Outputs over a block are merged into those so far by their log-sum-exp, as in MoBA (2025, arXiv 2502.13189). Work is in
proportion to the pairs visited; memory beside the results to the queries of one product, and an index of who visits
what.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.biases import Bias
from regard.ops.blocks import BlockMap
from regard.ops.dropout import keep_tile
from regard.ops.engines.tile_kinds import LOG2E, SoftmaxLoop, exponentials, finite
from regard.ops.engines.tile_loop import WIDE_TILE
from regard.ops.engines.visits import Visit, Visits
from regard.ops.masks import Mask, Tiles


class RoutedLoop(SoftmaxLoop):
    """The softmax loop, walked by blocks of keys instead of tiles of queries."""

    visits: Visits

    def gather_for(self, blocks: BlockMap, rest: Mask | None) -> None:
        """Fold the tensors as this loop needs them: queries in one axis, keys in whole blocks."""
        tiles = Tiles(self.batch, self.heads, self.queries, self.keys, WIDE_TILE, blocks.key_block)
        self.visits = Visits(tiles, self.group, blocks, rest, self.device)
        fill = (0, 0, 0, self.visits.filling)
        self.key, self.value = (
            F.pad(t, fill).reshape(-1, self.visits.size, t.shape[-1]) for t in (self.key, self.value)
        )
        self._widths = [self.query.shape[-1], self.value.shape[-1], 1, 1]

    def forward(self) -> tuple[Tensor, Tensor]:
        # A query of zeros behind all others is the filling.
        query = F.pad(self.query.flatten(0, 2).to(self.dtype) * (self.scale * self.unit), (0, 0, 0, 1))
        out = query.new_zeros(len(query), self.value.shape[-1])
        lse = query.new_full((len(query), 1), self.empty_lse)
        for visit in self.visits:
            scores = self.visit_scores(
                visit, query.index_select(0, visit.queries).view(len(visit.blocks), -1, query.shape[-1])
            )
            weights, total, more = exponentials(scores)
            kept = self.visit_kept(visit)
            if kept is not None:
                weights.mul_(kept)
            mixed = torch.bmm(weights, self.block_of(self.value, visit)).flatten(0, 1)
            before, more = lse.index_select(0, visit.queries), more.flatten(0, 1)
            after = torch.logaddexp2(before, more)
            level = finite(after)
            mixed.mul_((more - level).exp2_().div_(total.flatten(0, 1)))
            mixed.addcmul_(out.index_select(0, visit.queries), (before - level).exp2_())
            out.index_copy_(0, visit.queries, mixed)
            lse.index_copy_(0, visit.queries, after)
        shape = (self.batch, self.heads, self.queries)
        return out[:-1].view(*shape, -1).to(self.query.dtype), lse[:-1].div_(LOG2E).view(shape)

    def backward(self, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, train_bias: bool) -> list[Tensor]:
        together = self._together(grad_out, grad_lse, out, lse)
        grad_query = together.new_zeros(len(together), self.query.shape[-1])
        # Features before keys: that product is faster, with its long axis in the middle.
        grad_key, grad_value = (t.new_zeros(t.mT.shape, dtype=self.dtype) for t in (self.key, self.value))
        bias_grads = [torch.zeros_like(tensor, dtype=self.dtype) for tensor in self.bias_tensors]
        for visit in self.visits:
            chosen = together.index_select(0, visit.queries).view(len(visit.blocks), -1, together.shape[-1])
            query, grad, level, delta = chosen.split(self._widths, dim=-1)
            weights = self.visit_scores(visit, query).sub_(level).exp2_()
            grad_scores = self.product("grad", grad, self.block_of(self.value, visit))
            kept = self.visit_kept(visit)
            if kept is not None:
                grad_scores.mul_(kept)
            grad_scores.sub_(delta).mul_(weights)
            if kept is not None:
                weights.mul_(kept)
            grad_value.index_add_(0, visit.blocks, torch.bmm(grad.mT, weights))
            grad_key.index_add_(0, visit.blocks, torch.bmm(query.mT, grad_scores))
            more = grad_query.index_select(0, visit.queries).view(query.shape)
            more.baddbmm_(grad_scores, self.block_of(self.key, visit))
            grad_query.index_copy_(0, visit.queries, more.flatten(0, 1))
            if train_bias:
                self.add_bias_grads(bias_grads, grad_scores, self.visit_bias, visit)
        rows = (grad.mT.reshape(self.visits.rows, -1, grad.shape[1]) for grad in (grad_key, grad_value))
        of_keys = (grad[:, : self.keys] for grad in rows)
        return self.results([grad_query[:-1].mul_(self.scale).view(self.query.shape), *of_keys], bias_grads, out.dtype)

    def _together(self, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """Scaled queries, gradients of outputs, lse and δ side by side: one gather a visit instead of four."""
        together = self.query.new_zeros(self.query[..., 0].numel() + 1, sum(self._widths), dtype=self.dtype)
        query, grad, level, delta = together[:-1].split(self._widths, dim=-1)
        query.copy_(self.query.flatten(0, 2)).mul_(self.scale * self.unit)
        grad.copy_(grad_out.reshape(grad.shape))
        level.copy_(finite(lse * LOG2E).view(level.shape))
        shift = torch.linalg.vecdot(grad_out.to(self.dtype), out.to(self.dtype)) - grad_lse
        delta.copy_(shift.reshape(delta.shape))
        # What the filling weighs: exp2(s − ∞).
        together[-1, -2] = torch.inf
        return together

    def block_of(self, tensor: Tensor, visit: Visit) -> Tensor:
        """Keys (or values) of a visit's blocks: (blocks, keys of a block, width)."""
        return tensor.index_select(0, visit.blocks).to(self.dtype)

    def visit_scores(self, visit: Visit, query: Tensor) -> Tensor:
        """Scores of the visit's queries with bias, −inf where the mask forbids: (blocks, queries, keys of a block)."""
        scores = self.product("scores", query, self.block_of(self.key, visit))
        if self.bias is not None:
            scores.add_(self.visit_bias(self.bias, visit), alpha=self.unit)
        if visit.short:
            scores[visit.short, :, self.visits.size - self.visits.filling :] = -torch.inf
        if visit.asks:
            assert self.visits.rest is not None
            scores.masked_fill_(~self.visits.rest.allows(*self._asked(visit)), -torch.inf)
        return scores

    def _asked(self, visit: Visit) -> tuple[Tensor, ...]:
        """The grid that the mask is asked for: of one block, where the same queries look from the same distance."""
        assert self.visits.rest is not None
        grid = self._grid(visit)
        if self.visits.rest.shift_invariant and not visit.short:
            distance = grid[2] - grid[3][..., :1]
            if torch.equal(distance, distance[:1].expand_as(distance)):
                return tuple(each[:1] for each in grid)
        return grid

    def visit_bias(self, bias: Bias, visit: Visit) -> Tensor:
        """The bias of every score of a visit."""
        shape = len(visit.blocks), len(visit.queries) // len(visit.blocks), self.visits.size
        return bias.score(*self._grid(visit)).expand(shape)

    def visit_kept(self, visit: Visit) -> Tensor | None:
        """Dropout factors, or None without dropout."""
        if self.seed is None:
            return None
        return keep_tile(self.seed, self.dropout, *self._grid(visit)).to(self.dtype)

    def _grid(self, visit: Visit) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample, head, position and key of every score, as they broadcast to (blocks, queries, keys of a block).

        Filling is given a place inside.
        """
        visits = self.visits
        queries = visit.queries.clamp(max=visits.rows * visits.length - 1).view(len(visit.blocks), -1, 1)
        sample, head = queries // (self.heads * self.queries), queries // self.queries % self.heads
        starts = (visit.blocks % visits.per_row * visits.size).view(-1, 1, 1)
        keys = (starts + torch.arange(visits.size, device=self.device)).clamp(max=self.keys - 1)
        return sample, head, queries % self.queries + self.keys - self.queries, keys
