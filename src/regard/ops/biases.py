"""Biases: what is added to the scaled scores, asked of index tensors like a mask; parameters receive gradients.

A bias of one's own is a frozen dataclass derived from `Bias` with one method, `score`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.ops.checks import require, require_grid
from regard.ops.indices import Span, full_tile, index_grid
from regard.ops.value import Value


class Bias(Value):
    """Answers "what is added to the score of query i and key j in head h?"."""

    shift_invariant: ClassVar[bool] = False
    """Whether `score` depends on head and key − query alone; a tile then needs one value per diagonal."""

    def score(
        self,
        batch: Int[Tensor, ...],
        head: Int[Tensor, ...],
        query: Int[Tensor, ...],
        key: Int[Tensor, ...],
    ) -> Float[Tensor, ...]:
        """The additive score over index tensors that broadcast together; `query` is its position among the keys."""
        raise NotImplementedError(f"{type(self).__name__} must define score(batch, head, query, key)")

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Raise ValueError if the bias's tensors do not fit a call of these sizes."""

    def dense(
        self, queries: int, keys: int, *, batch: int, heads: int, device: torch.device
    ) -> Float[Tensor, "batch_or_1 heads_or_1 queries keys"]:
        """The bias as a tensor; batch and head axes are 1 where it does not depend on them."""
        return self.tile((0, batch), (0, heads), (keys - queries, keys), (0, keys), device)

    def tile(
        self,
        batch: Span,
        heads: Span,
        queries: Span,
        keys: Span,
        device: torch.device,
    ) -> Float[Tensor, "batch_or_1 heads_or_1 queries keys"]:
        """The bias for ranges of samples, heads, query positions and keys."""
        sample, head, query, key = index_grid(batch, heads, queries, keys, device)
        if not self.shift_invariant:
            return full_tile(self.score(sample, head, query, key), queries, keys)
        offset = torch.arange(keys[0] - queries[1] + 1, keys[1] - queries[0], device=device)
        diagonals = self.score(sample, head, torch.zeros_like(offset), offset).squeeze(-2)
        return full_tile(diagonals.unfold(-1, len(key), 1).flip(-2), queries, keys)


@dataclass(frozen=True, eq=False, repr=False)
class Alibi(Bias):
    """``−slope[h] · |i − j|``: linear biases ("Train Short, Test Long", 2021, arXiv 2108.12409).

    `slopes` is a tensor (H,); `Alibi.for_heads` gives the paper's geometric sequence.
    """

    slopes: Float[Tensor, " heads"]
    shift_invariant: ClassVar[bool] = True

    @classmethod
    def for_heads(cls, heads: int) -> Alibi:
        """The paper's slopes: ``2^(−8 i / n)`` for the largest power of two n ≤ heads, then every other one of 2n."""

        def geometric(count: int) -> list[float]:
            return [2.0 ** (-8.0 * (index + 1) / count) for index in range(count)]

        power = 2 ** int(math.log2(heads))
        return cls(torch.tensor(geometric(power) + geometric(2 * power)[::2][: heads - power]))

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        require(
            tuple(self.slopes.shape) == (heads,),
            "Alibi",
            lambda: f"slopes of shape {tuple(self.slopes.shape)} for {heads} query heads",
            lambda: f"give shape ({heads},)",
        )

    def score(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return -self.slopes[head] * (query - key).abs()


@dataclass(frozen=True, eq=False, repr=False)
class RelativeBias(Bias):
    """A learned value per head and relative offset ``j − i``, looked up in ``table (H, entries)``.

    Offsets fall into entries in one of two ways:

    - clipped (`bidirectional_buckets` None): one entry per offset in ``[−r, r]`` per axis, offsets beyond clipped
      ("Self-Attention with Relative Position Representations", 2018, arXiv 1803.02155); the table has
      ``∏(2 rₐ + 1)`` entries for `max_distance` r, an integer or a tuple with one entry per axis of `grid`.
    - bucketed (``bidirectional_buckets`` True or False): T5's buckets, exact up close and logarithmic up to
      `max_distance` ("Exploring the Limits of Transfer Learning", 2019, arXiv 1910.10683), one axis only; False gives
      keys after the query bucket 0.

    With `grid`, positions are flattened row-major and offsets are taken per axis.
    """

    table: Float[Tensor, "heads entries"]
    max_distance: int | tuple[int, ...]
    grid: tuple[int, ...] | None = None
    bidirectional_buckets: bool | None = None

    @property
    def shift_invariant(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] a constant per object
        return self.grid is None

    def __post_init__(self) -> None:
        axes = 1 if self.grid is None else len(self.grid)
        require(
            axes == (len(self.max_distance) if isinstance(self.max_distance, tuple) else 1),
            "RelativeBias",
            f"max_distance {self.max_distance} for {axes} axes",
            "give one distance per axis of grid",
        )
        if self.bidirectional_buckets is None:
            reach = self.max_distance if isinstance(self.max_distance, tuple) else (self.max_distance,)
            entries = prod([2 * distance + 1 for distance in reach])
            require(
                self.table.ndim == 2 and self.table.shape[1] == entries,
                "RelativeBias",
                f"table of shape {tuple(self.table.shape)} for max_distance {self.max_distance}",
                f"give shape (heads, {entries})",
            )
            return
        buckets = self.table.shape[-1] // (2 if self.bidirectional_buckets else 1)
        require(
            isinstance(self.max_distance, int) and self.grid is None and self.table.ndim == 2,
            "RelativeBias",
            f"buckets with table of shape {tuple(self.table.shape)} and grid {self.grid}",
            "buckets need one axis and a table (heads, entries)",
        )
        require(
            isinstance(self.max_distance, int) and 2 <= buckets and buckets // 2 < self.max_distance,
            "RelativeBias",
            f"{buckets} buckets a direction with max_distance {self.max_distance}",
            "give at least two, and a max_distance beyond the exact half of them",
        )

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        require(
            self.table.shape[0] == heads,
            "RelativeBias",
            lambda: f"table for {self.table.shape[0]} heads in a call with {heads} query heads",
            "give one row per query head",
        )
        if self.grid is not None:
            require_grid("RelativeBias", self.grid, queries, keys)

    def score(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.table[head, self._entry(query, key)]

    def _entry(self, query: Tensor, key: Tensor) -> Tensor:
        if self.bidirectional_buckets is not None:
            return self._bucket(key - query)
        reach = self.max_distance if isinstance(self.max_distance, tuple) else (self.max_distance,)
        if self.grid is None:
            return (key - query).clamp(-reach[0], reach[0]) + reach[0]
        entry, rest = torch.zeros_like(query), prod(self.grid)
        for length, distance in zip(self.grid, reach, strict=True):
            rest //= length
            offset = key // rest % length - query // rest % length
            entry = entry * (2 * distance + 1) + offset.clamp(-distance, distance) + distance
        return entry

    def _bucket(self, offset: Tensor) -> Tensor:
        buckets = self.table.shape[1]
        if self.bidirectional_buckets:
            buckets //= 2
            base, distance = (offset > 0) * buckets, offset.abs()
        else:
            base, distance = 0, (-offset).clamp(min=0)
        assert isinstance(self.max_distance, int)
        exact = buckets // 2
        growth = torch.log(distance.clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
        return base + torch.where(distance < exact, distance, far)


@dataclass(frozen=True, eq=False, repr=False)
class TableBias(Bias):
    """``table[b, h, i, j]``, with queries that stand at the end of the keys."""

    table: Float[Tensor, "batch_or_1 heads queries keys"]

    def score(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        sample = batch if self.table.shape[0] > 1 else torch.zeros_like(batch)
        return self.table[sample, head, query - self._start, key]

    def tile(self, batch: Span, heads: Span, queries: Span, keys: Span, device: torch.device) -> Tensor:
        samples = slice(*batch) if self.table.shape[0] > 1 else slice(None)
        rows = slice(queries[0] - self._start, queries[1] - self._start)
        return self.table[samples, heads[0] : heads[1], rows, keys[0] : keys[1]]

    @property
    def _start(self) -> int:
        return self.table.shape[3] - self.table.shape[2]


@dataclass(frozen=True, eq=False, repr=False)
class PairScores(Bias):
    """A learned function of each query and key; neither the scores nor what is computed on the way is ever kept.

    For scores that are no dot product: derive, add the parameters as fields and define `pair`. The queries stand at
    the end of the keys.
    """

    query: Float[Tensor, "batch heads queries hidden"]
    key: Float[Tensor, "batch heads keys hidden"]

    def pair(
        self, query: Float[Tensor, "... hidden"], key: Float[Tensor, "... hidden"], head: Int[Tensor, ...]
    ) -> Float[Tensor, ...]:
        """The score of queries and keys that broadcast together, and with the heads they belong to."""
        raise NotImplementedError(f"{type(self).__name__} must define pair(query, key, head)")

    def score(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.pair(self.query[batch, head, query - self._start], self.key[batch, head, key], head)

    def tile(self, batch: Span, heads: Span, queries: Span, keys: Span, device: torch.device) -> Tensor:
        samples, of_heads = slice(*batch), slice(*heads)
        query = self.query[samples, of_heads, queries[0] - self._start : queries[1] - self._start]
        key = self.key[samples, of_heads, None, keys[0] : keys[1]]
        return self.pair(query[..., None, :], key, torch.arange(*heads, device=device)[:, None, None])

    @property
    def _start(self) -> int:
        """Where the first query stands among the keys."""
        return self.key.shape[2] - self.query.shape[2]


@dataclass(frozen=True, eq=False, repr=False)
class AdditiveScores(PairScores):
    """``v_h · tanh(q_i + k_j)`` ("Neural Machine Translation by Jointly Learning to Align and Translate", 2014, arXiv
    1409.0473)."""

    vector: Float[Tensor, "heads hidden"]

    def pair(self, query: Tensor, key: Tensor, head: Tensor) -> Tensor:
        return (torch.tanh(query + key) * self.vector[head]).sum(-1)
