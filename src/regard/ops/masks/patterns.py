"""Masks that go by position alone: each states its rule once, in `allows`, and its tiles by bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.ops.checks import require
from regard.ops.masks.base import Mask, Tiles, range_states, states


@dataclass(frozen=True, eq=False, repr=False)
class Causal(Mask):
    """Keys up to the query's own position."""

    shift_invariant: ClassVar[bool] = True

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    def tile_states(self, tiles: Tiles) -> Tensor:
        return states(tiles.key_low > tiles.query_high, tiles.key_high <= tiles.query_low)


@dataclass(frozen=True, eq=False, repr=False)
class Window(Mask):
    """Keys from ``query − before`` to ``query + after``, both ends included; `after` defaults to `before`."""

    before: int
    after: int = None  # pyright: ignore[reportAssignmentType] filled in below
    shift_invariant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.after is None:
            object.__setattr__(self, "after", self.before)
        for name in ("before", "after"):
            size = getattr(self, name)
            require(size >= 0, "Window", f"{name} {size} is negative", "count positions from the query, 0 or more")

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= query - self.before) & (key <= query + self.after)

    def tile_states(self, tiles: Tiles) -> Tensor:
        nearest, farthest = tiles.key_low - tiles.query_high, tiles.key_high - tiles.query_low
        return states(
            (farthest < -self.before) | (nearest > self.after),
            (nearest >= -self.before) & (farthest <= self.after),
        )

    def __repr__(self) -> str:
        return f"Window({self.before})" if self.before == self.after else f"Window({self.before}, {self.after})"


@dataclass(frozen=True, eq=False, repr=False)
class Sinks(Mask):
    """The first `n` keys, from everywhere (keep them causal with ``Causal() & (Sinks(4) | Window(255))``)."""

    n: int

    def __post_init__(self) -> None:
        require(self.n >= 0, "Sinks", f"n {self.n} is negative", "give a number of keys")

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < self.n

    def tile_states(self, tiles: Tiles) -> Tensor:
        return _key_states(tiles, self.n)


@dataclass(frozen=True, eq=False, repr=False)
class Prefix(Mask):
    """The first `n` keys, from everywhere; `n` may be an integer tensor (B,) of one length per sample.

    ``Causal() | Prefix(n)`` is the prefix language model.
    """

    n: int | Int[Tensor, " batch"]

    def __post_init__(self) -> None:
        if isinstance(self.n, Tensor):
            _require_lengths("Prefix", "n", self.n)
        else:
            require(self.n >= 0, "Prefix", f"n {self.n} is negative", "give a number of keys")

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        if isinstance(self.n, Tensor):
            _require_batch("Prefix", "n", self.n, batch)

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < (self.n[batch] if isinstance(self.n, Tensor) else self.n)

    def tile_states(self, tiles: Tiles) -> Tensor:
        return _key_states(tiles, self.n)


@dataclass(frozen=True, eq=False, repr=False)
class Padding(Mask):
    """The first ``lengths[b]`` keys of sample b: the rest is padding."""

    lengths: Int[Tensor, " batch"]

    def __post_init__(self) -> None:
        _require_lengths("Padding", "lengths", self.lengths)

    def real(self, length: int) -> Bool[Tensor, "batch length"]:
        """Which positions of a sequence of `length` are not padding."""
        return torch.arange(length, device=self.lengths.device) < self.lengths[:, None]

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        _require_batch("Padding", "lengths", self.lengths, batch)

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < self.lengths[batch]

    def tile_states(self, tiles: Tiles) -> Tensor:
        return _key_states(tiles, self.lengths)


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Mask):
    """Keys of the query's own block of `size` consecutive positions."""

    size: int

    def __post_init__(self) -> None:
        require(self.size > 0, "Blocks", f"size {self.size} is not positive", "give a number of positions")

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // self.size == key // self.size

    def tile_states(self, tiles: Tiles) -> Tensor:
        return range_states(*(edge // self.size for edge in edges(tiles)))


@dataclass(frozen=True, eq=False, repr=False)
class Dilated(Mask):
    """Keys at most `window` steps of `dilation` positions away, to both sides."""

    window: int
    dilation: int
    shift_invariant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.window >= 0, "Dilated", f"window {self.window} is negative", "count steps from the query")
        require(
            self.dilation > 0,
            "Dilated",
            f"dilation {self.dilation} is not positive",
            "use 1 for a plain window",
        )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = (key - query).abs()
        return (distance <= self.window * self.dilation) & (distance % self.dilation == 0)

    def tile_states(self, tiles: Tiles) -> Tensor:
        reach = Window(self.window * self.dilation).tile_states(tiles)
        return reach if self.dilation == 1 else reach.clamp(max=1)


def _require_lengths(owner: str, name: str, lengths: Tensor) -> None:
    require(
        lengths.ndim == 1 and not lengths.is_floating_point() and lengths.dtype != torch.bool,
        owner,
        f"{name} of shape {tuple(lengths.shape)} and dtype {lengths.dtype}",
        "give an integer tensor with one length per sample",
    )


def _require_batch(owner: str, name: str, lengths: Tensor, batch: int) -> None:
    require(
        lengths.shape[0] == batch,
        owner,
        lambda: f"{name} has {lengths.shape[0]} entries for a batch of {batch}",
        "give one length per sample",
    )


def _key_states(tiles: Tiles, end: int | Tensor) -> Tensor:
    """States of "key < end", for one end or one per sample."""
    if isinstance(end, Tensor):
        end = end.cpu().view(-1, 1, 1, 1)
    shape = (len(tiles.query_low), tiles.key_low.shape[1])
    value = states(tiles.key_low >= end, tiles.key_high < end)
    return value.expand(*value.shape[:2], *shape)


def edges(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and last index of the tiles of queries and of keys."""
    return tiles.query_low, tiles.query_high, tiles.key_low, tiles.key_high
