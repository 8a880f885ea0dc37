"""What a `Capture` keeps of attention weights, computed from tiles of rows that are gone after it.

A reducer is a small object with a name; one of one's own derives from `Reducer` and says what its results are called
and which axes they have. B samples, h heads, n chosen queries, M keys, T rows of a tile, m ≤ M keys that these reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from regard.ops.checks import require
from regard.ops.precision import statistics_dtype
from regard.sites.call import AttentionCall

Axes = dict[str, tuple[str, ...]]
"""The names of axes by the name of a result."""


@dataclass(frozen=True)
class View:
    """The part of a call that a reducer reads.

    Attributes:
        call: the whole call.
        heads: the chosen heads, or those of them that are read at a time.
        rows: the chosen queries as rows of `call.query`, in order.
        counts: which samples chose which of these queries; sums over queries count these only. None for all.
        chosen: which samples chose which keys; the weights of all others are zero. None for all.
        query_start, key_start: the sequence position of row 0 and of column 0.
    """

    call: AttentionCall
    heads: Sequence[int]
    rows: Sequence[int]
    counts: Bool[Tensor, "batch_or_1 rows"] | None
    chosen: Bool[Tensor, "batch_or_1 keys"] | None
    query_start: int
    key_start: int

    @cached_property
    def columns(self) -> Sequence[int]:
        """The keys that any sample chose, as columns of `call.key`."""
        return range(self.call.keys) if self.chosen is None else self.chosen.any(0).nonzero()[:, 0].tolist()

    def zeros(self, *shape: int) -> Tensor:
        """A state or result (B, h, *shape) to fill."""
        value = self.call.value
        dtype = statistics_dtype(value.dtype)
        return torch.zeros(self.call.batch, len(self.heads), *shape, dtype=dtype, device=value.device)

    def newest(self, count: int | None) -> View:
        """The last of the chosen queries only."""
        if count is None or count >= len(self.rows):
            return self
        counts = None if self.counts is None else self.counts[:, -count:]
        return replace(self, rows=self.rows[-count:], counts=counts)

    def pick(self, tensor: Float[Tensor, "*axes keys"]) -> Float[Tensor, "*axes columns"]:
        """The chosen keys of an axis that has all M."""
        return tensor if self.chosen is None else tensor[..., torch.tensor(self.columns, device=tensor.device)]

    def counted(self, rows: slice) -> Float[Tensor, "batch_or_1 1 1 tile"]:
        """1 for the queries of a tile that a sample chose, 0 for others."""
        value = self.call.value
        dtype = statistics_dtype(value.dtype)
        if self.counts is None:
            return torch.ones(1, 1, 1, rows.stop - rows.start, dtype=dtype, device=value.device)
        return self.counts[:, None, None, rows].to(dtype)


class Reducer:
    """What is kept of the weights of a call; `start`, then `tile` for each tile of rows, then `finish`.

    Attributes:
        name: how it is asked for.
        results: the axes of what `finish` returns, by the name that it is read by, one of them ``"head"``.
            ``"sample"``, ``"head"``, ``"query"`` and ``"key"`` are labelled with what was chosen, others by
            `coordinates` or from 0.
        last: how many of the chosen queries it needs, counted from the last; None for all.
        logits: whether its tiles are logits, with −inf for keys that are masked or not chosen, instead of weights.
    """

    name: str
    results: ClassVar[Axes]
    last: int | None = None
    logits: bool = False

    def start(self, view: View) -> Any:
        """The state before any tile; the axis of heads is the second wherever there is one."""
        raise NotImplementedError

    def tile(self, state: Any, weights: Float[Tensor, "batch heads tile reach"], rows: slice, view: View) -> Any:
        """The state after a tile: ``weights`` (B, h, T, m) of the queries ``view.rows[rows]``, which are neighbours.

        Keys from m on are seen by none of these rows.
        """
        raise NotImplementedError

    def finish(self, state: Any, view: View) -> tuple[Tensor, ...]:
        """The results, in the order of `results`."""
        raise NotImplementedError

    def coordinates(self, view: View) -> dict[str, Sequence[int]]:
        """Labels of axes of its own."""
        return {}

    def numbers(self, view: View) -> int:
        """How many numbers it keeps, if they grow with queries × keys: those are what `Capture.max_bytes` bounds."""
        return 0


class Map(Reducer):
    """``"map"``: the weights themselves. O(n M) memory, bounded by ``max_bytes``."""

    name = "map"
    results: ClassVar[Axes] = {"map": ("sample", "head", "query", "key")}

    def start(self, view: View) -> Tensor:
        return view.zeros(len(view.rows), len(view.columns))

    def tile(self, state: Tensor, weights: Tensor, rows: slice, view: View) -> Tensor:
        picked = view.pick(weights)
        state[:, :, rows, : picked.shape[-1]] = picked
        return state

    def finish(self, state: Tensor, view: View) -> tuple[Tensor]:
        return (state,)

    def numbers(self, view: View) -> int:
        return view.call.batch * len(view.heads) * len(view.rows) * len(view.columns)


class Logits(Map):
    """``"logits"``: the scores before the softmax, −inf where masked. O(n M) memory, bounded by ``max_bytes``."""

    name = "logits"
    results: ClassVar[Axes] = {"logits": ("sample", "head", "query", "key")}
    logits = True

    def start(self, view: View) -> Tensor:
        return super().start(view).fill_(-torch.inf)


class LastRows(Map):
    """``"last_rows"``: the weights of the last `count` chosen queries, the cheapest there is: O(count · M D)."""

    name = "last_rows"
    results: ClassVar[Axes] = {"last_rows": ("sample", "head", "last_query", "key")}

    def __init__(self, count: int = 1) -> None:
        self.last = _positive("LastRows", "count", count)


class Received(Reducer):
    """``"received"``: the mass that a key gets, r_j = Σ_i w_ij over the chosen queries. O(M) memory."""

    name = "received"
    results: ClassVar[Axes] = {"received": ("sample", "head", "key")}

    def start(self, view: View) -> Tensor:
        return view.zeros(view.call.keys)

    def tile(self, state: Tensor, weights: Tensor, rows: slice, view: View) -> Tensor:
        state[..., : weights.shape[-1]] += (view.counted(rows) @ weights).squeeze(-2)
        return state

    def finish(self, state: Tensor, view: View) -> tuple[Tensor]:
        return (view.pick(state),)


class _PerQuery(Reducer):
    """One number per query, filled in tile by tile."""

    def start(self, view: View) -> Tensor:
        return view.zeros(len(view.rows))

    def tile(self, state: Tensor, weights: Tensor, rows: slice, view: View) -> Tensor:
        state[:, :, rows] = self.reduce(weights, rows, view)
        return state

    def reduce(self, weights: Tensor, rows: slice, view: View) -> Float[Tensor, "batch heads tile"]:
        raise NotImplementedError

    def finish(self, state: Tensor, view: View) -> tuple[Tensor, ...]:
        return (state,)


class Entropy(_PerQuery):
    """``"entropy"``: H_i = −Σ_j w_ij ln w_ij of each query, in nats; with ``keys`` chosen, their part of the sum."""

    name = "entropy"
    results: ClassVar[Axes] = {"entropy": ("sample", "head", "query")}

    def reduce(self, weights: Tensor, rows: slice, view: View) -> Tensor:
        least = torch.finfo(weights.dtype).tiny
        return -(weights.clamp_min(least).log() * weights).sum(-1)


class Sink(_PerQuery):
    """``"sink"``: the mass that each query gives to the chosen keys, or to the first `tokens` positions if all are.

    Positions count from the start of the sequence, padding included: for a batch padded on the left choose ``keys``.
    """

    name = "sink"
    results: ClassVar[Axes] = {"sink": ("sample", "head", "query")}

    def __init__(self, tokens: int = 1) -> None:
        self.tokens = _positive("Sink", "tokens", tokens)

    def reduce(self, weights: Tensor, rows: slice, view: View) -> Tensor:
        count = None if view.chosen is not None else max(0, self.tokens - view.key_start)
        return weights[..., :count].sum(-1)


class Distance(Reducer):
    """``"distance"``: the mass by |i − j| summed over the chosen queries, and ``"mean_distance"``: Σ_j w_ij |i − j| of
    each query; i and j are positions in the sequence. O(N + M) memory."""

    name = "distance"
    results: ClassVar[Axes] = {
        "distance": ("sample", "head", "distance"),
        "mean_distance": ("sample", "head", "query"),
    }

    def start(self, view: View) -> tuple[Tensor, Tensor]:
        offsets = view.rows[-1] - view.rows[0] + view.call.keys
        return view.zeros(offsets), view.zeros(len(view.rows))

    def tile(self, state: tuple[Tensor, Tensor], weights: Tensor, rows: slice, view: View) -> tuple[Tensor, Tensor]:
        by_offset, mean = state
        first, last = view.rows[rows.start], view.rows[rows.stop - 1]
        count, reach = weights.shape[-2:]
        # Row a moved by T − 1 − a columns puts equal j − i below each other: a flat copy with rows one shorter does it.
        counted = (weights * view.counted(rows).mT).flip(-2)
        skewed = pad(counted, (0, count)).flatten(-2)[..., : count * (reach + count - 1)]
        begin = view.rows[-1] - last
        by_offset[..., begin : begin + reach + count - 1] += skewed.unflatten(-1, (count, -1)).sum(-2)
        query = torch.arange(first, last + 1, device=weights.device) + view.query_start
        key = torch.arange(reach, device=weights.device) + view.key_start
        mean[:, :, rows] = (weights * (query[:, None] - key).abs()).sum(-1)
        return by_offset, mean

    def finish(self, state: tuple[Tensor, Tensor], view: View) -> tuple[Tensor, Tensor]:
        by_offset, mean = state
        distances = self._offsets(view).abs()
        profile = view.zeros(int(distances.max()) + 1).index_add(-1, distances.to(by_offset.device), by_offset)
        return profile, mean

    def _offsets(self, view: View) -> Tensor:
        """j − i of the state's columns."""
        start = view.key_start - view.query_start
        return torch.arange(start - view.rows[-1], start - view.rows[0] + view.call.keys)


class TopK(Reducer):
    """``"top_k"``: the `k` largest weights of each query, largest first, and ``"top_k_keys"``: the positions of their
    keys. A query that sees fewer than k keys has weight 0 and key −1 in the places that are left. O(n k) memory."""

    name = "top_k"
    results: ClassVar[Axes] = {
        "top_k": ("sample", "head", "query", "rank"),
        "top_k_keys": ("sample", "head", "query", "rank"),
    }

    def __init__(self, k: int = 8) -> None:
        self.k = _positive("TopK", "k", k)

    def start(self, view: View) -> tuple[Tensor, Tensor]:
        weights = view.zeros(len(view.rows), self.k)
        return weights, torch.full_like(weights, -1, dtype=torch.long)

    def tile(self, state: tuple[Tensor, Tensor], weights: Tensor, rows: slice, view: View) -> tuple[Tensor, Tensor]:
        best, keys = weights.topk(min(self.k, weights.shape[-1]))
        state[0][:, :, rows, : best.shape[-1]] = best
        state[1][:, :, rows, : best.shape[-1]] = (keys + view.key_start).masked_fill(best == 0, -1)
        return state

    def finish(self, state: tuple[Tensor, Tensor], view: View) -> tuple[Tensor, Tensor]:
        return state


class BlockMeans(Reducer):
    """``"block_means"``: the mean weight of each block of `size` × `size` positions, of its chosen queries and keys.

    Blocks start at multiples of `size`, which label their axes. O(N M / size²) memory.
    """

    name = "block_means"
    results: ClassVar[Axes] = {"block_means": ("sample", "head", "query_block", "key_block")}

    def __init__(self, size: int = 64) -> None:
        self.size = _positive("BlockMeans", "size", size)

    def start(self, view: View) -> Tensor:
        return view.zeros(*map(len, self.coordinates(view).values()))

    def tile(self, state: Tensor, weights: Tensor, rows: slice, view: View) -> Tensor:
        before = view.key_start % self.size
        after = -(before + weights.shape[-1]) % self.size
        sums = pad(weights * view.counted(rows).mT, (before, after)).unflatten(-1, (-1, self.size)).sum(-1)
        own = torch.arange(view.rows[rows.start], view.rows[rows.stop - 1] + 1, device=weights.device)
        block = (own + view.query_start) // self.size - (view.rows[0] + view.query_start) // self.size
        state[..., : sums.shape[-1]].index_add_(2, block, sums)
        return state

    def finish(self, state: Tensor, view: View) -> tuple[Tensor]:
        rows = torch.tensor(view.rows, device=state.device) + view.query_start
        keys = torch.tensor(view.columns, device=state.device) + view.key_start
        key_block = keys // self.size - view.key_start // self.size
        counted = view.counted(slice(0, len(rows)))[:, 0, 0]
        queries = state.new_zeros(len(counted), state.shape[2])
        queries.index_add_(1, rows // self.size - rows[0] // self.size, counted)
        picked = queries.new_ones(1, len(view.columns)) if view.chosen is None else view.pick(view.chosen)
        keys_of = queries.new_zeros(len(picked), state.shape[3]).index_add_(1, key_block, picked.to(state.dtype))
        pairs = queries[:, :, None] * keys_of[:, None]
        return (state / pairs[:, None].clamp_min(1),)

    def coordinates(self, view: View) -> dict[str, Sequence[int]]:
        def starts(first: int, last: int) -> range:
            return range(first - first % self.size, last + 1, self.size)

        return {
            "query_block": starts(view.rows[0] + view.query_start, view.rows[-1] + view.query_start),
            "key_block": starts(view.key_start, view.key_start + view.call.keys - 1),
        }


REDUCERS: dict[str, type[Reducer]] = {
    each.name: each for each in (LastRows, Received, Entropy, Distance, TopK, Sink, BlockMeans, Map, Logits)
}
"""What a capture can be asked for by name, beside `OUTPUT`."""

OUTPUT = "output"
"""What a capture is asked for to keep outputs, which are no reduction of weights."""


def _positive(owner: str, name: str, value: int) -> int:
    require(value >= 1, owner, f"{name} {value}", "give at least 1")
    return value
