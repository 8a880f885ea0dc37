"""The masks: each states its rule once, in `allows`, and its tiles by bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.ops.checks import require
from regard.ops.masks.base import Mask, Tiles, classify, states, tile_counts
from regard.ops.neighborhood import attends


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
class Keys(Mask):
    """Chosen keys, from everywhere: a boolean tensor (N,) or (B, N)."""

    chosen: Bool[Tensor, "*batch keys"]

    def __post_init__(self) -> None:
        require(
            self.chosen.ndim in (1, 2) and self.chosen.dtype == torch.bool,
            "Keys",
            f"tensor of shape {tuple(self.chosen.shape)} and dtype {self.chosen.dtype}",
            "give booleans of shape (N,) or (B, N)",
        )

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        require(
            tuple(self.chosen.shape) in ((keys,), (batch, keys)),
            "Keys",
            f"chosen of shape {tuple(self.chosen.shape)} for batch {batch} and {keys} keys",
            f"give one boolean per key: ({keys},) or ({batch}, {keys})",
        )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return _of_sample(self.chosen, batch, key)

    def tile_states(self, tiles: Tiles) -> Tensor:
        counts = tile_counts(self.chosen[..., None, :].cpu(), tiles.key_tile)
        state = classify(counts, (tiles.key_high - tiles.key_low + 1)[0])
        return state.view(-1, 1, 1, state.shape[-1]).expand(-1, 1, len(tiles.query_low), -1)


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Mask):
    """Keys of the query's own block of `size` consecutive positions."""

    size: int

    def __post_init__(self) -> None:
        require(self.size > 0, "Blocks", f"size {self.size} is not positive", "give a number of positions")

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // self.size == key // self.size

    def tile_states(self, tiles: Tiles) -> Tensor:
        return _range_states(*(edge // self.size for edge in _edges(tiles)))


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


@dataclass(frozen=True, eq=False, repr=False)
class Segments(Mask):
    """Keys with the query's own id: several sequences packed in one row.

    `ids` is an integer tensor (N,) or (B, N) over the keys; `query_ids` likewise over the queries when they are another
    sequence, otherwise queries are the last keys.
    """

    ids: Int[Tensor, "*batch keys"]
    query_ids: Int[Tensor, "*batch queries"] | None = None

    def __post_init__(self) -> None:
        for name, ids in (("ids", self.ids), ("query_ids", self.query_ids)):
            if ids is not None:
                require(
                    ids.ndim in (1, 2) and not ids.is_floating_point(),
                    "Segments",
                    f"{name} of shape {tuple(ids.shape)} and dtype {ids.dtype}",
                    "give integers of shape (N,) or (B, N)",
                )

    @classmethod
    def from_lengths(cls, lengths: Sequence[int]) -> Segments:
        """Ids for sequences of these lengths, one after the other."""
        counts = torch.as_tensor(lengths)
        return cls(torch.repeat_interleave(torch.arange(len(counts)), counts))

    def starts(self) -> Bool[Tensor, "*batch keys"]:
        """Which positions are the first of a run of one id."""
        changes = self.ids[..., 1:] != self.ids[..., :-1]
        return torch.cat([torch.ones_like(self.ids[..., :1], dtype=torch.bool), changes], dim=-1)

    def places(self) -> Int[Tensor, "*batch keys"]:
        """Position of each token in its run of one id."""
        index = torch.arange(self.ids.shape[-1], device=self.ids.device)
        return index - (index * self.starts()).cummax(-1).values

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        for name, ids, length in (("ids", self.ids, keys), ("query_ids", self.query_ids, queries)):
            if ids is not None:
                require(
                    ids.shape[-1] == length and (ids.ndim == 1 or ids.shape[0] == batch),
                    "Segments",
                    f"{name} of shape {tuple(ids.shape)} for batch {batch} and length {length}",
                    f"give one id per position: ({length},) or ({batch}, {length})",
                )
        require(
            self.query_ids is not None or queries <= keys,
            "Segments",
            f"{queries} queries for {keys} ids",
            "give query_ids when the queries are not the last keys",
        )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = self.ids if self.query_ids is None else self.query_ids
        row = query - (self.ids.shape[-1] - own.shape[-1])
        if self.ids.ndim == 1 and own.ndim == 1:
            return own[row] == self.ids[key]
        return _of_sample(own, batch, row) == _of_sample(self.ids, batch, key)

    def tile_states(self, tiles: Tiles) -> Tensor:
        query_ids = self.ids[..., tiles.offset :] if self.query_ids is None else self.query_ids
        query_range = _tile_range(query_ids.cpu(), tiles.query_tile)
        key_range = _tile_range(self.ids.cpu(), tiles.key_tile)
        return _range_states(*(edge[..., :, None] for edge in query_range), *(edge[..., None, :] for edge in key_range))


@dataclass(frozen=True, eq=False, repr=False)
class Neighborhood(Mask):
    """The neighbourhood of `regard.ops.neighborhood_attention` over a grid flattened in row-major order.

    All arguments are tuples with one entry per axis; `dilation`, `stride` and `is_causal` default to 1, 1 and False.
    """

    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    is_causal: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        axes = len(self.grid)
        for name, default in (("dilation", 1), ("stride", 1), ("is_causal", False)):
            object.__setattr__(self, name, getattr(self, name) or (default,) * axes)
        for name in ("kernel_size", "dilation", "stride", "is_causal"):
            value = getattr(self, name)
            require(
                isinstance(value, tuple) and len(value) == axes,
                "Neighborhood",
                f"{name} {value!r} for the {axes} axes of grid {self.grid}",
                "give a tuple with one entry per axis",
            )

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        require(
            queries == keys == prod(self.grid),
            "Neighborhood",
            f"grid {self.grid} has {prod(self.grid)} positions, the call {queries} queries and {keys} keys",
            "flatten the grid the mask was made for",
        )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        result = None
        rest = prod(self.grid)
        for axis, length in enumerate(self.grid):
            rest //= length
            inside = attends(
                query // rest % length,
                key // rest % length,
                length,
                self.kernel_size[axis],
                self.dilation[axis],
                self.stride[axis],
                self.is_causal[axis],
            )
            result = inside if result is None else result & inside
        assert result is not None
        return result

    def tile_states(self, tiles: Tiles) -> Tensor:
        # Bounds along the first axis only: no window reaches further than its kernel plus a stride from the query.
        rest = prod(self.grid[1:])
        reach = (self.kernel_size[0] - 1) * self.dilation[0] + self.stride[0]
        return Window(reach * rest + rest - 1).tile_states(tiles).clamp(max=1)


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Mask):
    """A boolean tensor, ``True`` where the query may look: (Nq, Nk) or (B or 1, H or 1, Nq, Nk)."""

    allowed: Bool[Tensor, "*batch_heads queries keys"]

    def __post_init__(self) -> None:
        require(
            self.allowed.ndim in (2, 4) and self.allowed.dtype == torch.bool,
            "Dense",
            f"tensor of shape {tuple(self.allowed.shape)} and dtype {self.allowed.dtype}",
            "give booleans of shape (queries, keys) or (batch or 1, heads or 1, queries, keys), True = may attend",
        )

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        shape = tuple(self.allowed.shape)
        require(
            shape[-2:] == (queries, keys) and (len(shape) == 2 or (shape[0] in (1, batch) and shape[1] in (1, heads))),
            "Dense",
            f"mask of shape {shape} for batch {batch}, heads {heads}, {queries} queries and {keys} keys",
            f"give shape ({queries}, {keys}) or ({batch} or 1, {heads} or 1, {queries}, {keys})",
        )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = query - (self.allowed.shape[-1] - self.allowed.shape[-2])
        if self.allowed.ndim == 2:
            return self.allowed[row, key]
        # Indexing a size-1 axis with zeros keeps the result from growing along it.
        sample = batch if self.allowed.shape[0] > 1 else row.new_zeros(())
        of_head = head if self.allowed.shape[1] > 1 else row.new_zeros(())
        return self.allowed[sample, of_head, row, key]

    def tile_states(self, tiles: Tiles) -> Tensor:
        rows = self.allowed.split(tiles.query_tile, dim=-2)
        counts = torch.stack([tile_counts(row, tiles.key_tile) for row in rows], dim=-2).cpu()
        sizes = (tiles.query_high - tiles.query_low + 1) * (tiles.key_high - tiles.key_low + 1)
        return classify(counts.view(*(1,) * (4 - counts.ndim), *counts.shape), sizes)


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
        f"{name} has {lengths.shape[0]} entries for a batch of {batch}",
        "give one length per sample",
    )


def _of_sample(of_key: Tensor, batch: Tensor, position: Tensor) -> Tensor:
    return of_key[position] if of_key.ndim == 1 else of_key[batch, position]


def _key_states(tiles: Tiles, end: int | Tensor) -> Tensor:
    """States of "key < end", for one end or one per sample."""
    if isinstance(end, Tensor):
        end = end.cpu().view(-1, 1, 1, 1)
    shape = (len(tiles.query_low), tiles.key_low.shape[1])
    value = states(tiles.key_low >= end, tiles.key_high < end)
    return value.expand(*value.shape[:2], *shape)


def _edges(tiles: Tiles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tiles.query_low, tiles.query_high, tiles.key_low, tiles.key_high


def _tile_range(ids: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest id of every tile."""
    pieces = ids.split(tile, dim=-1)
    low = torch.stack([piece.amin(-1) for piece in pieces], dim=-1)
    high = torch.stack([piece.amax(-1) for piece in pieces], dim=-1)
    return (low, high) if ids.ndim == 1 else (low[:, None], high[:, None])


def _range_states(query_low: Tensor, query_high: Tensor, key_low: Tensor, key_high: Tensor) -> Tensor:
    """States of "same id", from the range of ids in each tile."""
    same = (query_low == query_high) & (key_low == key_high) & (query_low == key_low)
    return states((query_high < key_low) | (key_high < query_low), same)
