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
from regard.ops.indices import hiding
from regard.ops.masks import Mask, Tiles


class RoutedLoop(SoftmaxLoop):
    """The softmax loop, walked by blocks of keys instead of tiles of queries."""

    visits: Visits

    def gather_for(self, blocks: BlockMap, rest: Mask | None) -> None:
        """Fold the tensors as this loop needs them: queries in one axis, keys in whole blocks."""
        tiles = Tiles(self.batch, self.heads, self.queries, self.keys, WIDE_TILE, blocks.key_block)
        self.visits = Visits(tiles, self.group, blocks, rest, self.device)
        if self.visits.filling:
            self.key, self.value = (F.pad(t, (0, 0, 0, self.visits.filling)) for t in (self.key, self.value))
        self.key, self.value = (t.reshape(-1, self.visits.size, t.shape[-1]) for t in (self.key, self.value))
        self._widths = [self.query.shape[-1], self.value.shape[-1], 1, 1]
        self._seen: tuple[Tensor, Tensor] | None = None

    def forward(self) -> tuple[Tensor, Tensor]:
        query = self._scaled_into(self._with_filling(self.query.shape[-1]))
        out = query.new_zeros(len(query), self.value.shape[-1])
        lse = query.new_full((len(query), 1), self.empty_lse)
        for visit in self.visits:
            chosen = query.index_select(0, visit.queries).view(len(visit.blocks), -1, query.shape[-1])
            weights, total, more = exponentials(self.visit_scores(visit, chosen, self.block_of(self.key, visit)))
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
            query, grad, minus_lse, minus_delta = chosen.split(self._widths, dim=-1)
            key, value, kept = self.block_of(self.key, visit), self.block_of(self.value, visit), self.visit_kept(visit)
            weights = self.visit_scores(visit, query, key, minus_lse).exp2_()
            if kept is None:
                grad_scores = self.product("grad", grad, value, minus_delta).mul_(weights)
            else:
                grad_scores = self.product("grad", grad, value).mul_(kept).add_(minus_delta).mul_(weights)
                weights.mul_(kept)
            grad_value.index_add_(0, visit.blocks, torch.bmm(grad.mT, weights))
            grad_key.index_add_(0, visit.blocks, torch.bmm(query.mT, grad_scores))
            grad_query.index_add_(0, visit.queries, torch.bmm(grad_scores, key).flatten(0, 1))
            if train_bias:
                self.add_bias_grads(bias_grads, grad_scores, self.visit_bias, visit)
        rows = (grad.mT.reshape(self.visits.rows, -1, grad.shape[1]) for grad in (grad_key, grad_value))
        of_keys = (grad[:, : self.keys] for grad in rows)
        return self.results([grad_query[:-1].mul_(self.scale).view(self.query.shape), *of_keys], bias_grads, out.dtype)

    def _together(self, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """Scaled queries, gradients of outputs, −lse and −δ side by side: one gather a visit instead of four."""
        together = self._with_filling(sum(self._widths))
        self._scaled_into(together[:, : self._widths[0]])
        _, grad, minus_lse, minus_delta = together[:-1].split(self._widths, dim=-1)
        grad.copy_(grad_out.reshape(grad.shape))
        minus_lse.copy_(-finite(lse * LOG2E).view(minus_lse.shape))
        shift = grad_lse - torch.linalg.vecdot(grad_out.to(self.dtype), out.to(self.dtype))
        minus_delta.copy_(shift.reshape(minus_delta.shape))
        # What the filling weighs: exp2(s − ∞).
        together[-1, -2] = -torch.inf
        return together

    def _with_filling(self, width: int) -> Tensor:
        """A row for every query, not set, and zeros behind them: the filling."""
        rows = self.query.new_empty(self.query[..., 0].numel() + 1, width, dtype=self.dtype)
        rows[-1] = 0.0
        return rows

    def _scaled_into(self, rows: Tensor) -> Tensor:
        """Queries, scaled, in all rows but the last."""
        torch.mul(self.query.flatten(0, 2).to(self.dtype), self.scale * self.unit, out=rows[:-1])
        return rows

    def block_of(self, tensor: Tensor, visit: Visit) -> Tensor:
        """Keys (or values) of a visit's blocks: (blocks, keys of a block, width)."""
        return tensor.index_select(0, visit.blocks).to(self.dtype)

    def visit_scores(self, visit: Visit, query: Tensor, key: Tensor, start: Tensor | None = None) -> Tensor:
        """Scores of a visit's queries, with what each starts from: (blocks, queries, keys of a block).

        With bias, and −inf where the mask forbids.
        """
        scores = self.product("scores", query, key, start)
        if self.bias is not None:
            scores.add_(self.visit_bias(self.bias, visit), alpha=self.unit)
        if visit.short:
            scores[visit.short, :, self.visits.size - self.visits.filling :] = -torch.inf
        if visit.asks:
            scores.add_(self._hiding(visit))
        return scores

    def _hiding(self, visit: Visit) -> Tensor:
        """0 where the mask allows, −∞ elsewhere; of one block, where queries look at all from the same distance."""
        assert self.visits.rest is not None
        grid, distance = self._grid(visit), None
        if self.visits.rest.shift_invariant and not visit.short:
            distance = grid[2] - grid[3][..., :1]
            if not torch.equal(distance, distance[:1].expand_as(distance)):
                distance = None
        if distance is None:
            return hiding(self.visits.rest.allows(*grid), self.dtype)
        if self._seen is None or not torch.equal(self._seen[0], distance[:1]):
            allowed = self.visits.rest.allows(*(each[:1] for each in grid))
            self._seen = distance[:1], hiding(allowed, self.dtype)
        return self._seen[1]

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
