"""Attention of queries that choose blocks of keys each for itself: the queries of a block are gathered, not the keys.

A block of keys is loaded once and meets all queries that visit it in one product. Their outputs over this block are
merged into those so far by their log-sum-exp, as in MoBA (2025, arXiv 2502.13189). Work is in proportion to the pairs
visited; memory beside the results to one block's queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from regard.ops.biases import Bias
from regard.ops.blocks import BlockMap
from regard.ops.dropout import keep_tile
from regard.ops.engines.tile_kinds import SoftmaxLoop, merge
from regard.ops.engines.tile_loop import WIDE_TILE
from regard.ops.indices import Span
from regard.ops.masks import Mask, Tiles, plan
from regard.ops.masks.base import EMPTY, PARTIAL

MOST_SCORES = 2**19
"""Scores in flight: rows of queries times keys of a block."""


@dataclass(frozen=True)
class Visit:
    """A block of keys in one row (a sample's key head), and who looks at it."""

    row: int
    keys: Span
    queries: Tensor
    """Indices into the folded axis (query heads of the key head, queries)."""
    partial: Tensor | None
    """Which of them must ask the mask, as indices into `queries`."""


class RoutedLoop(SoftmaxLoop):
    """The softmax loop, walked by blocks of keys instead of tiles of queries."""

    blocks: BlockMap
    rest: Mask | None

    def forward(self) -> tuple[Tensor, Tensor]:
        rows, length = self.query.shape[0], self.group * self.queries
        out = self.query.new_zeros(rows, length, self.value.shape[-1], dtype=self.dtype)
        lse = out.new_full((rows, length, 1), self.empty_lse)
        for visit in self.visits():
            value = self.value[visit.row, slice(*visit.keys)].to(self.dtype)
            scores = self.visit_scores(visit, self.scaled[visit.row].index_select(0, visit.queries))
            highest = scores.amax(-1, keepdim=True)
            empty = highest == -torch.inf
            weights = torch.softmax(scores, -1, out=self.scratch("weights", *scores.shape))
            if self.bias is not None or visit.partial is not None:
                weights.masked_fill_(empty, 0.0)
            total = (highest - weights.amax(-1, keepdim=True).log_()).masked_fill_(empty, -torch.inf)
            kept = self.visit_kept(visit)
            if kept is not None:
                weights.mul_(kept)
            so_far, level = out[visit.row], lse[visit.row]
            seen = so_far.index_select(0, visit.queries), level.index_select(0, visit.queries)
            mixed, total = merge(weights @ value, total, *seen)
            so_far.index_copy_(0, visit.queries, mixed)
            level.index_copy_(0, visit.queries, total)
        shape = (self.batch, self.heads, self.queries)
        return out.view(*shape, -1).to(self.query.dtype), lse.view(shape)

    def backward(self, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, train_bias: bool) -> list[Tensor]:
        rows, length = self.query.shape[0], self.group * self.queries
        grad_out = grad_out.reshape(rows, length, -1).to(self.dtype)
        delta = torch.linalg.vecdot(grad_out, out.reshape(rows, length, -1).to(self.dtype))
        delta = delta.sub_(grad_lse.reshape(rows, length)).unsqueeze(-1)
        level = lse.reshape(rows, length, 1)
        level = level.masked_fill(level == -torch.inf, 0.0)
        # One gather a visit instead of four.
        together, width = torch.cat([self.scaled, grad_out, level, delta], dim=-1), self.query.shape[-1]
        grads = [torch.zeros(t.shape, dtype=self.dtype, device=self.device) for t in (self.query, self.key, self.value)]
        grad_query, grad_key, grad_value = grads
        by_row = grad_query.view(rows, length, -1)
        bias_grads = [torch.zeros_like(tensor, dtype=self.dtype) for tensor in self.bias_tensors]
        for visit in self.visits():
            place = (visit.row, slice(*visit.keys))
            key, value = self.key[place].to(self.dtype), self.value[place].to(self.dtype)
            chosen = together[visit.row].index_select(0, visit.queries)
            query, grad, level, delta = chosen.split([width, chosen.shape[-1] - width - 2, 1, 1], dim=-1)
            weights = self.visit_scores(visit, query).sub_(level).exp_()
            grad_scores = torch.mm(grad, value.mT, out=self.scratch("grad", *weights.shape))
            kept = self.visit_kept(visit)
            if kept is not None:
                grad_scores.mul_(kept)
            grad_scores.sub_(delta).mul_(weights)
            if kept is not None:
                weights.mul_(kept)
            grad_value[place].addmm_(weights.mT, grad)
            grad_key[place].addmm_(grad_scores.mT, query)
            more = by_row[visit.row].index_select(0, visit.queries).addmm_(grad_scores, key)
            by_row[visit.row].index_copy_(0, visit.queries, more)
            if train_bias:
                self.add_bias_grads(bias_grads, grad_scores, self.visit_bias, visit)
        grad_query.mul_(self.scale)
        return self.results(grads, bias_grads, out.dtype)

    @cached_property
    def scaled(self) -> Tensor:
        """Queries, scaled, as (rows, group · queries, head_dim)."""
        return self.query.flatten(1, 2).to(self.dtype) * self.scale

    def visits(self) -> Iterator[Visit]:
        """Every block of keys with queries, cut so that the scores of one stay in cache."""
        size = self.blocks.key_block
        most = max(1, MOST_SCORES // min(size, self.keys))
        states = None
        if self.rest is not None:
            sizes = self.batch, self.heads, self.queries, self.keys
            states = plan(self.rest, Tiles(*sizes, WIDE_TILE, size)).states.to(self.device)
        for row in range(self.query.shape[0]):
            sample, heads = self._sample_and_heads(row)
            visits = self._by_key(self.blocks.visits, sample, heads, self.blocks.query_block)
            if states is not None:
                allowed = self._by_key(states, sample, heads, WIDE_TILE)
                visits, partial = visits & (allowed != EMPTY), visits & (allowed == PARTIAL)
                asks = partial.any(-1).tolist()
            counts = visits.sum(-1).tolist()
            found = visits.nonzero()[:, 1].split(counts)
            for block, queries in enumerate(found):
                keys = block * size, min((block + 1) * size, self.keys)
                for piece in queries.split(most) if counts[block] else ():
                    looked_at = partial[block][piece].nonzero()[:, 0] if states is not None and asks[block] else None
                    yield Visit(row, keys, piece, looked_at)

    def visit_scores(self, visit: Visit, query: Tensor) -> Tensor:
        """Scores of the visit's queries with bias, −inf where the mask forbids."""
        key = self.key[visit.row, slice(*visit.keys)].to(self.dtype)
        scores = torch.mm(query, key.mT, out=self.scratch("scores", query.shape[0], key.shape[0]))
        if self.bias is not None:
            scores.add_(self.visit_bias(self.bias, visit))
        if visit.partial is not None:
            assert self.rest is not None
            allowed = self.rest.allows(*self._grid(visit, visit.queries[visit.partial]))
            asked = scores[visit.partial].masked_fill_(~allowed, -torch.inf)
            scores.index_copy_(0, visit.partial, asked)
        return scores

    def visit_bias(self, bias: Bias, visit: Visit) -> Tensor:
        """The bias of every score of a visit."""
        shape = len(visit.queries), visit.keys[1] - visit.keys[0]
        return bias.score(*self._grid(visit, visit.queries)).expand(shape)

    def visit_kept(self, visit: Visit) -> Tensor | None:
        """Dropout factors, or None without dropout."""
        if self.seed is None:
            return None
        return keep_tile(self.seed, self.dropout, *self._grid(visit, visit.queries)).to(self.dtype)

    def _grid(self, visit: Visit, queries: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample, head, position and key of every score, as they broadcast."""
        sample, (first, _) = self._sample_and_heads(visit.row)
        head, query = first + queries // self.queries, queries % self.queries + self.keys - self.queries
        keys = torch.arange(*visit.keys, device=self.device)
        return torch.full((), sample, device=self.device), head[:, None], query[:, None], keys

    def _sample_and_heads(self, row: int) -> tuple[int, Span]:
        sample, key_head = divmod(row, self.key_heads)
        return sample, (key_head * self.group, (key_head + 1) * self.group)

    def _by_key(self, table: Tensor, sample: int, heads: Span, size: int) -> Tensor:
        """A table over (samples, heads, blocks of `size` queries, blocks of keys) as (blocks, group · queries)."""
        of_sample = table[sample if table.shape[0] > 1 else 0]
        of_heads = of_sample[slice(*heads)] if table.shape[1] > 1 else of_sample.expand(self.group, -1, -1)
        by_key = of_heads.permute(2, 0, 1)
        if size > 1:
            by_key = by_key.repeat_interleave(size, dim=-1)[..., : self.queries]
        return by_key.flatten(1)
