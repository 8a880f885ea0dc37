"""One mask, every engine: who may look at whom, asked of index tensors; everything else is derived."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from regard.ops.indices import full_tile, index_grid
from regard.ops.value import Value

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True)
class Tiles:
    """How the score matrix of one call is cut: sizes, and the first and last index of each tile.

    Query indices are positions among the keys: unequal lengths align at the end, and query i stands at
    ``keys − queries + i``.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    query_tile: int
    key_tile: int

    @property
    def offset(self) -> int:
        return self.keys - self.queries

    @cached_property
    def query_low(self) -> Int[Tensor, "query_tiles 1"]:
        return torch.arange(0, self.queries, self.query_tile)[:, None] + self.offset

    @cached_property
    def query_high(self) -> Int[Tensor, "query_tiles 1"]:
        return (self.query_low + self.query_tile - 1).clamp(max=self.keys - 1)

    @cached_property
    def key_low(self) -> Int[Tensor, "1 key_tiles"]:
        return torch.arange(0, self.keys, self.key_tile)[None]

    @cached_property
    def key_high(self) -> Int[Tensor, "1 key_tiles"]:
        return (self.key_low + self.key_tile - 1).clamp(max=self.keys - 1)


class Mask(Value):
    """Answers "may query i of head h look at key j?"; ``True`` means it may.

    A mask of one's own is a frozen dataclass with one method, `allows`::

        @dataclass(frozen=True, eq=False, repr=False)
        class EveryOther(Mask):
            phase: int

            def allows(self, batch, head, query, key):
                return (query - key + self.phase) % 2 == 0

    Combine masks with ``&``, ``|`` and ``~``.
    """

    shift_invariant: ClassVar[bool] = False
    """Whether `allows` depends on key − query alone; engines then reuse one tile along a diagonal."""

    def allows(
        self,
        batch: Int[Tensor, ...],
        head: Int[Tensor, ...],
        query: Int[Tensor, ...],
        key: Int[Tensor, ...],
    ) -> Bool[Tensor, ...]:
        """Whether the query may look at the key, over index tensors that broadcast together.

        `query` is the position of the query among the keys (see `Tiles`): negative for queries before the first key.
        """
        raise NotImplementedError(f"{type(self).__name__} must define allows(batch, head, query, key)")

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        """Raise ValueError if the mask's tensors do not fit a call of these sizes."""

    def tile_states(self, tiles: Tiles) -> Int[Tensor, "batch_or_1 heads_or_1 query_tiles key_tiles"]:
        """EMPTY, PARTIAL or FULL for every tile; PARTIAL is always a safe answer.

        Found here by asking `allows`, one row of tiles at a time; masks with structure answer by bounds instead.
        """
        here = self.to(torch.device("cpu"))  # where plans are made
        width = tiles.key_high - tiles.key_low + 1
        rows = []
        for low, high in zip(tiles.query_low.flatten().tolist(), tiles.query_high.flatten().tolist(), strict=True):
            spans = (low, high + 1), (0, tiles.keys)
            grid = index_grid((0, tiles.batch), (0, tiles.heads), *spans, None)
            rows.append(tile_counts(full_tile(here.allows(*grid), *spans), tiles.key_tile))
        counts = torch.stack(rows, dim=-2)
        return classify(counts, (tiles.query_high - tiles.query_low + 1) * width)

    def aligned(self, tiles: Tiles) -> bool:
        """Whether no tile can be partial. False is always a safe answer."""
        return False

    def within(self, tiles: Tiles) -> Mask:
        """What has to be asked in partial tiles: the mask, or the part of it that makes them so."""
        return self

    def dense(
        self,
        queries: int,
        keys: int,
        *,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str | None = None,
    ) -> Bool[Tensor, "batch_or_1 heads_or_1 queries keys"]:
        """The mask as a boolean tensor; batch and head axes are 1 where the mask does not depend on them."""
        spans = (keys - queries, keys), (0, keys)
        grid = index_grid((0, batch), (0, heads), *spans, torch.device(device) if device is not None else None)
        return full_tile(self.allows(*grid), *spans)

    def flex(self, queries: int, keys: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The mask as FlexAttention's ``mask_mod`` for these lengths."""
        offset = keys - queries

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return self.allows(batch, head, query + offset, key)

        return mask_mod

    def __and__(self, other: Mask) -> And:
        return And(self, other)

    def __or__(self, other: Mask) -> Or:
        return Or(self, other)

    def __invert__(self) -> Not:
        return Not(self)


def tile_counts(allowed: Bool[Tensor, "*head rows keys"], key_tile: int) -> Int[Tensor, "*head key_tiles"]:
    """How many pairs each key tile of a row of tiles allows."""
    counts = allowed.sum(-2)
    padded = F.pad(counts, (0, -counts.shape[-1] % key_tile))
    return padded.unflatten(-1, (-1, key_tile)).sum(-1)


def classify(counts: Tensor, size: Tensor) -> Tensor:
    """Tile states from the number of allowed pairs and the number of all pairs."""
    return (counts > 0).to(torch.int8) + (counts == size).to(torch.int8)


def states(empty: Tensor, full: Tensor) -> Tensor:
    """Tile states from two conditions, as a 4D tensor."""
    value = 1 + full.to(torch.int8) - empty.to(torch.int8)
    return value.view(*(1,) * (4 - value.ndim), *value.shape)


def range_states(query_low: Tensor, query_high: Tensor, key_low: Tensor, key_high: Tensor) -> Tensor:
    """States of "same id", from the range of ids in each tile."""
    same = (query_low == query_high) & (key_low == key_high) & (query_low == key_low)
    return states((query_high < key_low) | (key_high < query_low), same)


@dataclass(frozen=True, eq=False, repr=False)
class _Combined(Mask):
    left: Mask
    right: Mask

    @property
    def shift_invariant(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] a constant per object
        return self.left.shift_invariant and self.right.shift_invariant

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        self.left.validate(batch, heads, queries, keys)
        self.right.validate(batch, heads, queries, keys)


@dataclass(frozen=True, eq=False, repr=False)
class And(_Combined):
    """Allowed by both."""

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.left.allows(batch, head, query, key) & self.right.allows(batch, head, query, key)

    def tile_states(self, tiles: Tiles) -> Tensor:
        return torch.minimum(self.left.tile_states(tiles), self.right.tile_states(tiles))

    def aligned(self, tiles: Tiles) -> bool:
        return self.left.aligned(tiles) and self.right.aligned(tiles)

    def within(self, tiles: Tiles) -> Mask:
        for one, other in ((self.left, self.right), (self.right, self.left)):
            if one.aligned(tiles):
                return other.within(tiles)
        return self

    def __repr__(self) -> str:
        return " & ".join(f"({part!r})" if isinstance(part, Or) else repr(part) for part in (self.left, self.right))


@dataclass(frozen=True, eq=False, repr=False)
class Or(_Combined):
    """Allowed by either."""

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.left.allows(batch, head, query, key) | self.right.allows(batch, head, query, key)

    def tile_states(self, tiles: Tiles) -> Tensor:
        return torch.maximum(self.left.tile_states(tiles), self.right.tile_states(tiles))

    def __repr__(self) -> str:
        return f"{self.left!r} | {self.right!r}"


@dataclass(frozen=True, eq=False, repr=False)
class Not(Mask):
    """Allowed where the other is not."""

    mask: Mask

    @property
    def shift_invariant(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] a constant per object
        return self.mask.shift_invariant

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        self.mask.validate(batch, heads, queries, keys)

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ~self.mask.allows(batch, head, query, key)

    def tile_states(self, tiles: Tiles) -> Tensor:
        return FULL - self.mask.tile_states(tiles)

    def __repr__(self) -> str:
        return f"~({self.mask!r})" if isinstance(self.mask, _Combined) else f"~{self.mask!r}"
