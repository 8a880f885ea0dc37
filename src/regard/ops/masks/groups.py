"""Masks of grouped attention: blocks that begin elsewhere for some heads, and tokens that everything sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from regard.ops.checks import require
from regard.ops.masks.base import Mask, Tiles, range_states, states
from regard.ops.masks.patterns import edges
from regard.ops.masks.tensors import of_sample, tile_range


class _Placed(Mask):
    """A mask over positions in the row or, given `places`, an integer tensor (N,) or (B, N), over those."""

    places: Int[Tensor, "*batch keys"] | None

    def __post_init__(self) -> None:
        places = self.places
        require(
            places is None or (places.ndim in (1, 2) and not places.is_floating_point()),
            type(self).__name__,
            lambda: "places are not positions" if places is None else f"places {tuple(places.shape)}, {places.dtype}",
            "give integers of shape (N,) or (B, N)",
        )

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        places = self.places
        if places is None:
            return
        require(
            tuple(places.shape) in ((keys,), (batch, keys)) and queries <= keys,
            type(self).__name__,
            lambda: f"places of shape {tuple(places.shape)} for batch {batch}, {queries} queries and {keys} keys",
            lambda: f"give ({keys},) or ({batch}, {keys}), and no more queries than keys",
        )

    def placed(self, batch: Tensor, index: Tensor) -> Tensor:
        """The positions of queries or keys."""
        return index if self.places is None else of_sample(self.places, batch, index)

    def edges(self, tiles: Tiles) -> tuple[Tensor, ...]:
        """First and last position of the tiles of queries and of keys."""
        if self.places is None:
            return edges(tiles)
        places = self.places.cpu()
        query = tile_range(places[..., tiles.offset :], tiles.query_tile)
        key = tile_range(places, tiles.key_tile)
        return *(edge[..., :, None] for edge in query), *(edge[..., None, :] for edge in key)


@dataclass(frozen=True, eq=False, repr=False)
class ShiftedBlocks(_Placed):
    """Keys of the query's own block of `size` positions; for query heads from `first` on, blocks begin `shift` later.

    The first of the shifted blocks is what stands before `shift`: nothing wraps around. Positions are those in the row,
    or `places`: for packed sequences ``Segments(...).places()``.
    """

    size: int
    shift: int
    first: int = 0
    places: Int[Tensor, "*batch keys"] | None = None

    def __post_init__(self) -> None:
        require(self.size > 0, "ShiftedBlocks", f"size {self.size} is not positive", "give a number of positions")
        require(
            0 <= self.shift < self.size,
            "ShiftedBlocks",
            f"shift {self.shift} for blocks of {self.size}",
            "give 0 or more, less than the size",
        )
        require(self.first >= 0, "ShiftedBlocks", f"first {self.first} is negative", "give a head")
        super().__post_init__()

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        moved = self._moved(head)
        query, key = (self.placed(batch, index) + moved for index in (query, key))
        return query // self.size == key // self.size

    def tile_states(self, tiles: Tiles) -> Tensor:
        heads = torch.arange(tiles.heads)
        moved = self._moved(heads if 0 < self.first < tiles.heads else heads[:1])[:, None, None]
        return range_states(*((edge + moved) // self.size for edge in self.edges(tiles)))

    def _moved(self, head: Tensor) -> Tensor:
        # Added, not taken off: the first block then is number 0 and not one below.
        return (head >= self.first) * ((self.size - self.shift) % self.size)


@dataclass(frozen=True, eq=False, repr=False)
class GlobalTokens(_Placed):
    """Pairs of which the query or the key is one of the first `n`: those see everything and are seen by everything.

    Positions are those in the row, or `places`: for packed sequences ``Segments(...).places()``.
    """

    n: int
    places: Int[Tensor, "*batch keys"] | None = None

    def __post_init__(self) -> None:
        require(self.n >= 0, "GlobalTokens", f"n {self.n} is negative", "give a number of tokens")
        super().__post_init__()

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (self.placed(batch, query) < self.n) | (self.placed(batch, key) < self.n)

    def tile_states(self, tiles: Tiles) -> Tensor:
        query_low, query_high, key_low, key_high = self.edges(tiles)
        return states((query_low >= self.n) & (key_low >= self.n), (query_high < self.n) | (key_high < self.n))
