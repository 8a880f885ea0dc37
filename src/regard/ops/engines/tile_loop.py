"""The loop of the tiled engine: one call's tensors folded into rows, and how a row of tiles is computed.

Samples and key heads are folded into rows, and the query heads of a key head into the query axis of a tile, so that
every product is one batched product and no key is copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from regard.ops.biases import Bias
from regard.ops.dropout import keep_tile
from regard.ops.indices import Span, index_grid
from regard.ops.masks import Mask, Plan, Tiles, plan
from regard.ops.masks.plan import KeyRange
from regard.ops.precision import statistics_dtype

WIDE_TILE, NARROW_TILE = 128, 64
"""Tile edges: large tiles make better products, small ones waste less at the edges of a narrow band."""
NARROW_BAND = 320
"""Keys of wide tiles a query visits, up to which tiles are narrow. Measured on two cores, with windows of 16 to 512."""
MOST_KEYS = 4096
"""Rows × keys per query in flight: scores, weights and their gradient then stay in the cache."""


@dataclass(frozen=True)
class Step:
    """One row of tiles for some samples and key heads, which are `rows` of the folded axis."""

    batch: Span
    heads: Span
    rows: slice
    queries: Span
    ranges: list[KeyRange]

    @property
    def height(self) -> int:
        return self.queries[1] - self.queries[0]


class TileLoop(ABC):
    """Forward and backward over tiles; subclasses say how scores become weights."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: tuple[str, list[Tensor]],
        mask: Mask | None,
        seed: Tensor | None,
        scale: float,
        dropout: float,
    ) -> None:
        self.batch, self.heads, self.queries = query.shape[:3]
        self.key_heads, self.keys = key.shape[1:3]
        self.group = self.heads // self.key_heads
        self.dtype, self.device = statistics_dtype(query.dtype), query.device
        self.query = query.reshape(self.batch * self.key_heads, self.group, self.queries, query.shape[3])
        self.key, self.value = key.flatten(0, 1), value.flatten(0, 1)
        self.mask, (self.bias_text, self.bias_tensors) = mask, bias
        self.bias = Bias.unflatten(*bias) if bias[0] else None
        self.seed, self.scale, self.dropout = seed, scale, dropout
        self._scratch: dict[str, Tensor] = {}

    @cached_property
    def plan(self) -> Plan:
        """The tiles to visit."""
        sizes = self.batch, self.heads, self.queries, self.keys
        wide = plan(self.mask, Tiles(*sizes, WIDE_TILE, WIDE_TILE))
        narrow = wide.ragged and wide.density * self.keys <= NARROW_BAND < self.keys
        return plan(self.mask, Tiles(*sizes, NARROW_TILE, NARROW_TILE)) if narrow else wide

    @cached_property
    def within(self) -> Mask:
        """What to ask in partial tiles."""
        assert self.mask is not None
        return self.mask.within(self.plan.tiles)

    @abstractmethod
    def mix(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Output of a row of tiles (rows, group · queries, value_dim), and its log-sum-exp if it has one."""

    @abstractmethod
    def backward_over(self, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> BackwardTiles:
        """What the backward of each tile needs, made once per call."""

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output, and log-sum-exp: −inf for a query that attends nothing, 0 where there is none."""
        out = self.query.new_zeros(*self.query.shape[:3], self.value.shape[-1])
        lse = torch.full(self.query.shape[:3], self.empty_lse, dtype=self.dtype, device=self.device)
        for step in self.steps():
            place = (step.rows, slice(None), slice(*step.queries))
            mixed, total = self.mix(step)
            shape = (self.group, step.height)
            out[place] = mixed.unflatten(1, shape).to(out.dtype)
            if total is not None:
                lse[place] = total.view(-1, *shape)
        return self.unfolded(out), self.unfolded(lse)

    def backward(self, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, train_bias: bool) -> list[Tensor]:
        """Gradients of query, key, value and the tensors of the bias."""
        grad_out = self.folded(grad_out)
        # A query that only fills a tile weighs nothing: exp(s − ∞).
        lse = self.folded(lse, torch.inf)
        tiles = self.backward_over(self.folded(out), lse, grad_out, self.folded(grad_lse))
        grads = [torch.zeros(t.shape, dtype=self.dtype, device=self.device) for t in (self.query, self.key, self.value)]
        grad_query, grad_key, grad_value = grads
        bias_grads = [torch.zeros_like(tensor, dtype=self.dtype) for tensor in self.bias_tensors]
        for step in self.steps():
            place = (step.rows, slice(None), slice(*step.queries))
            query, grad = self.scaled_query(step), grad_out[place].to(self.dtype).flatten(1, 2)
            tiles.enter(step, query, grad)
            grad_tile = torch.zeros_like(query)
            for keys in step.ranges:
                weights, grad_scores = tiles.tile(step, keys)
                # Not baddbmm_: into a strided view it falls apart into one product a row.
                self.add_to(grad_value, self.product("grad value", weights.mT, grad.mT), step, keys)
                self.add_to(grad_key, self.product("grad key", grad_scores.mT, query.mT), step, keys)
                grad_tile.baddbmm_(grad_scores, self.keys_of(self.key, step, keys))
                if train_bias:
                    tile = self.per_head(grad_scores, step)
                    self.add_bias_grads(bias_grads, tile, self._bias_tile, step, keys)
            grad_query[place] = grad_tile.mul_(self.scale).unflatten(1, (self.group, step.height))
        return self.results(grads, bias_grads, out.dtype)

    def results(self, grads: list[Tensor], bias_grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Gradients of folded tensors in the caller's shapes and types."""
        heads = (self.heads, self.key_heads, self.key_heads)
        grads[1].div_(self.unit)  # A sum of queries, which were multiplied by it.
        main = [g.to(dtype).view(self.batch, h, *g.shape[-2:]) for g, h in zip(grads, heads, strict=True)]
        return main + [g.to(tensor.dtype) for g, tensor in zip(bias_grads, self.bias_tensors, strict=True)]

    def folded(self, tensor: Tensor, fill: float = 0.0) -> Tensor:
        """What is (batch, heads, queries, …), as queries are folded; `fill` is for those that fill tiles, if any do."""
        return tensor.reshape(*self.query.shape[:3], *tensor.shape[3:])

    def unfolded(self, tensor: Tensor) -> Tensor:
        """The other way, without the filling."""
        return tensor.view(self.batch, self.heads, self.queries, *tensor.shape[3:])

    empty_lse = 0.0
    unit = 1.0
    """What queries are multiplied by beside the scale, and so their scores."""

    def steps(self) -> Iterator[Step]:
        """Rows of tiles with something to compute."""
        for unit in self.plan.units(self.key_heads):
            widest = max((keys.width for row in unit.rows for keys in row), default=1)
            most_rows = max(1, MOST_KEYS // (self.group * widest))
            for batch, heads in _pieces(unit.batch, unit.heads, self.key_heads, most_rows):
                first = batch[0] * self.key_heads + heads[0]
                rows = slice(first, first + (batch[1] - batch[0]) * (heads[1] - heads[0]))
                for index, ranges in enumerate(unit.rows):
                    if ranges:
                        start = index * self.plan.tiles.query_tile
                        stop = min(start + self.plan.tiles.query_tile, self.queries)
                        yield Step(batch, heads, rows, (start, stop), ranges)

    def scaled_query(self, step: Step) -> Tensor:
        """Queries of a row of tiles, scaled, as (rows, group · queries, head_dim)."""
        return self.query[step.rows, :, slice(*step.queries)].to(self.dtype).flatten(1, 2) * (self.scale * self.unit)

    def keys_of(self, tensor: Tensor, step: Step, keys: KeyRange) -> Tensor:
        """A range of keys (or values) as (rows, keys, width): a view, but for half types and keys that lie apart."""
        parts = [tensor[step.rows, start:stop] for start, stop in keys.spans]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(self.dtype)

    def add_to(self, total: Tensor, tile: Tensor, step: Step, keys: KeyRange) -> None:
        """Add (rows, keys, width) to a range of keys."""
        widths = [stop - start for start, stop in keys.spans]
        for (start, stop), part in zip(keys.spans, tile.split(widths, dim=1), strict=True):
            total[step.rows, start:stop].add_(part)

    def scratch(self, name: str, *shape: int) -> Tensor:
        """Memory that is used again for every tile."""
        size = prod(shape)
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self._scratch[name][:size].view(shape)

    def product(self, name: str, a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
        """Batched ``a bᵀ`` in scratch memory. What each row starts from is added at no cost."""
        out = self.scratch(name, a.shape[0], a.shape[1], b.shape[1])
        return torch.bmm(a, b.mT, out=out) if start is None else torch.baddbmm(start, a, b.mT, out=out)

    def scores(self, query: Tensor, key: Tensor, step: Step, keys: KeyRange, start: Tensor | None = None) -> Tensor:
        """Scores, with what each query starts from, with bias, −inf where the mask forbids."""
        scores = self.product("scores", query, key, start)
        by_head = self.per_head(scores, step)
        if self.bias is not None:
            by_head.add_(self._bias_tile(self.bias, step, keys), alpha=self.unit)
        for first, tile in self._partial(step, keys):
            by_head[..., first : first + tile.shape[-1]].add_(tile)
        return scores

    def per_head(self, tile: Tensor, step: Step) -> Tensor:
        """View (rows, group · queries, keys) as (batch, heads, queries, keys)."""
        return tile.view(step.batch[1] - step.batch[0], -1, step.height, tile.shape[-1])

    def kept(self, step: Step, keys: KeyRange) -> Tensor | None:
        """Dropout factors of a tile in the shape of its scores, or None without dropout."""
        if self.seed is None:
            return None
        spans = step.batch, self._query_heads(step), self._positions(step)
        grids = [index_grid(*spans, span, self.device) for span in keys.spans]
        kept = torch.cat([keep_tile(self.seed, self.dropout, *grid) for grid in grids], dim=-1)
        return kept.to(self.dtype).view(step.rows.stop - step.rows.start, -1, keys.width)

    def counts(self, step: Step) -> Tensor:
        """How many keys each query of a row of tiles may attend: (rows, group · queries, 1)."""
        shape = (step.rows.stop - step.rows.start, self.group * step.height, 1)
        full = sum(keys.width - keys.looked_at for keys in step.ranges)
        counts = torch.full(shape, full, device=self.device)
        for keys in step.ranges:
            for _, tile in self._partial(step, keys):
                self.per_head(counts, step).add_((tile == 0).sum(-1, keepdim=True))
        return counts

    def _partial(self, step: Step, keys: KeyRange) -> Iterator[tuple[int, Tensor]]:
        """From which key of the range on the mask must be looked at, and what to add there."""
        for first, part in keys.partial:
            like = self.query.new_empty((), dtype=self.dtype)
            yield first, self.plan.additive(self.within, like, step.batch, self._query_heads(step), step.queries, part)

    def _query_heads(self, step: Step) -> Span:
        return step.heads[0] * self.group, step.heads[1] * self.group

    def _positions(self, step: Step) -> Span:
        """Where the queries of a tile stand among the keys."""
        offset = self.keys - self.queries
        return step.queries[0] + offset, step.queries[1] + offset

    def _bias_tile(self, bias: Bias, step: Step, keys: KeyRange) -> Tensor:
        spans = step.batch, self._query_heads(step), self._positions(step)
        tiles = [bias.tile(*spans, span, self.device) for span in keys.spans]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=-1)

    def add_bias_grads(
        self, grads: list[Tensor], grad_scores: Tensor, tile_of: Callable[..., Tensor], *at: object
    ) -> None:
        """Add what a tile's scores say of the bias's tensors; ``tile_of(bias, *at)`` is the tile it added."""
        with _autograd_inside_operator():
            leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in self.bias_tensors]
            tile = tile_of(Bias.unflatten(self.bias_text, leaves), *at)
            reduced = grad_scores.sum_to_size(tile.shape).to(tile.dtype)
            found = torch.autograd.grad(tile, [leaf for leaf in leaves if leaf.requires_grad], reduced)
        trained = [total for total, leaf in zip(grads, leaves, strict=True) if leaf.requires_grad]
        for total, grad in zip(trained, found, strict=True):
            total.add_(grad)


class BackwardTiles(ABC):
    """The weights and the gradient of the scores, recomputed tile by tile."""

    @abstractmethod
    def enter(self, step: Step, query: Tensor, grad: Tensor) -> None:
        """Begin a row of tiles."""

    @abstractmethod
    def tile(self, step: Step, keys: KeyRange) -> tuple[Tensor, Tensor]:
        """Weights (after dropout) and gradient of the scores of one range of keys."""


@contextmanager
def _autograd_inside_operator() -> Iterator[None]:
    """Autograd for the biases' own gradients: the dispatcher takes it away inside a custom operator."""
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _pieces(batch: Span, heads: Span, key_heads: int, most_rows: int) -> Iterator[tuple[Span, Span]]:
    """Cut samples × key heads into pieces of at most `most_rows` rows that stay contiguous when folded."""
    width = heads[1] - heads[0]
    if width <= most_rows and width == key_heads:
        samples = most_rows // width
        for start in range(*batch, samples):
            yield (start, min(start + samples, batch[1])), heads
        return
    for sample in range(*batch):
        for start in range(*heads, most_rows):
            yield (sample, sample + 1), (start, min(start + most_rows, heads[1]))
