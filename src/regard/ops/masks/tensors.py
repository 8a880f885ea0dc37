"""Masks given by tensors or by a grid: which keys, which segments, which pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.ops.checks import require, require_grid
from regard.ops.masks.base import And, Mask, Tiles, classify, range_states, states, tile_counts
from regard.ops.masks.patterns import Window
from regard.ops.neighborhood import attends


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
            lambda: f"chosen of shape {tuple(self.chosen.shape)} for batch {batch} and {keys} keys",
            lambda: f"give one boolean per key: ({keys},) or ({batch}, {keys})",
        )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return of_sample(self.chosen, batch, key)

    def tile_states(self, tiles: Tiles) -> Tensor:
        counts = tile_counts(self.chosen[..., None, :].cpu(), tiles.key_tile)
        state = classify(counts, (tiles.key_high - tiles.key_low + 1)[0])
        return state.view(-1, 1, 1, state.shape[-1]).expand(-1, 1, len(tiles.query_low), -1)


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
        _require_ids("ids", self.ids, batch, keys)
        if self.query_ids is not None:
            _require_ids("query_ids", self.query_ids, batch, queries)
        require(
            self.query_ids is not None or queries <= keys,
            "Segments",
            lambda: f"{queries} queries for {keys} ids",
            "give query_ids when the queries are not the last keys",
        )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = self.ids if self.query_ids is None else self.query_ids
        row = query - (self.ids.shape[-1] - own.shape[-1])
        if self.ids.ndim == 1 and own.ndim == 1:
            return own[row] == self.ids[key]
        return of_sample(own, batch, row) == of_sample(self.ids, batch, key)

    def tile_states(self, tiles: Tiles) -> Tensor:
        query_ids = self.ids[..., tiles.offset :] if self.query_ids is None else self.query_ids
        query_range = tile_range(query_ids.cpu(), tiles.query_tile)
        key_range = tile_range(self.ids.cpu(), tiles.key_tile)
        return range_states(*(edge[..., :, None] for edge in query_range), *(edge[..., None, :] for edge in key_range))


@dataclass(frozen=True, eq=False, repr=False)
class Ordered(Mask):
    """Keys whose position is not after the query's, for queries and keys that stand in any order.

    Both are integer tensors (N,) or (B, N); a position may occur more than once.
    """

    query_positions: Int[Tensor, "*batch queries"]
    key_positions: Int[Tensor, "*batch keys"]

    def __post_init__(self) -> None:
        for name in ("query_positions", "key_positions"):
            positions = getattr(self, name)
            require(
                positions.ndim in (1, 2) and not positions.is_floating_point() and positions.dtype != torch.bool,
                "Ordered",
                f"{name} of shape {tuple(positions.shape)} and dtype {positions.dtype}",
                "give integers of shape (N,) or (B, N)",
            )

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        for name, length in (("query_positions", queries), ("key_positions", keys)):
            shape = tuple(getattr(self, name).shape)
            require(
                shape in ((length,), (batch, length)),
                "Ordered",
                lambda name=name, shape=shape: f"{name} of shape {shape} for batch {batch}, {queries} × {keys} pairs",
                lambda length=length: f"give one position each: ({length},) or ({batch}, {length})",
            )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = query - (self.key_positions.shape[-1] - self.query_positions.shape[-1])
        return of_sample(self.key_positions, batch, key) <= of_sample(self.query_positions, batch, row)

    def tile_states(self, tiles: Tiles) -> Tensor:
        query_low, query_high = (
            edge[..., :, None] for edge in tile_range(self.query_positions.cpu(), tiles.query_tile)
        )
        key_low, key_high = (edge[..., None, :] for edge in tile_range(self.key_positions.cpu(), tiles.key_tile))
        return states(key_low > query_high, key_high <= query_low)


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
        require_grid("Neighborhood", self.grid, queries, keys)

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
            lambda: f"mask of shape {shape} for batch {batch}, heads {heads}, {queries} queries and {keys} keys",
            lambda: f"give shape ({queries}, {keys}) or ({batch} or 1, {heads} or 1, {queries}, {keys})",
        )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = query - (self.allowed.shape[-1] - self.allowed.shape[-2])
        allowed, index = self.allowed, [row, key]
        if allowed.ndim == 4:
            # An axis of size 1 is taken away, so that the result does not grow along it.
            index = [of for of, size in ((batch, allowed.shape[0]), (head, allowed.shape[1])) if size > 1] + index
            allowed = allowed.squeeze((0, 1))
        return allowed[tuple(index)]

    def tile_states(self, tiles: Tiles) -> Tensor:
        rows = self.allowed.split(tiles.query_tile, dim=-2)
        counts = torch.stack([tile_counts(row, tiles.key_tile) for row in rows], dim=-2).cpu()
        sizes = (tiles.query_high - tiles.query_low + 1) * (tiles.key_high - tiles.key_low + 1)
        return classify(counts.view(*(1,) * (4 - counts.ndim), *counts.shape), sizes)


def segments_of(mask: Mask | None) -> Segments | None:
    """The packed sequences that a mask keeps apart, if it does."""
    if isinstance(mask, And):
        return segments_of(mask.left) or segments_of(mask.right)
    return mask if isinstance(mask, Segments) else None


def _require_ids(name: str, ids: Tensor, batch: int, length: int) -> None:
    require(
        ids.shape[-1] == length and (ids.ndim == 1 or ids.shape[0] == batch),
        "Segments",
        lambda: f"{name} of shape {tuple(ids.shape)} for batch {batch} and length {length}",
        lambda: f"give one id per position: ({length},) or ({batch}, {length})",
    )


def of_sample(of_key: Tensor, batch: Tensor, position: Tensor) -> Tensor:
    """What a tensor (N,) or (B, N) says of the positions of a sample."""
    return of_key[position] if of_key.ndim == 1 else of_key[batch, position]


def tile_range(ids: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest id of every tile."""
    pieces = ids.split(tile, dim=-1)
    low = torch.stack([piece.amin(-1) for piece in pieces], dim=-1)
    high = torch.stack([piece.amax(-1) for piece in pieces], dim=-1)
    return (low, high) if ids.ndim == 1 else (low[:, None], high[:, None])
