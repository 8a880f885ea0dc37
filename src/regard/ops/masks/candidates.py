"""Masks for a context and several candidates that go on from it, all in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from regard.ops.checks import one_of, require
from regard.ops.masks.base import Mask, Tiles, range_states, states
from regard.ops.masks.tensors import Segments, of_sample, tile_range

Arrow = Literal["arrow", "one_way", "diagonal"]


@dataclass(frozen=True, eq=False, repr=False)
class CandidateIsolation(Mask):
    """A context and its candidates: a candidate looks at itself and the context, never at another candidate.

    `ids` is an integer tensor (N,) or (B, N): 0 for the context, 1, 2, … for the candidates. In ``"arrow"`` attention,
    the paper's, the context looks at everything, so that what candidates say reaches the others in the next layer; in
    ``"one_way"`` it looks at itself only, and each candidate gets exactly what it gets alone with the context; in
    ``"diagonal"`` context and candidates do not look at each other. From "Uni-Encoder: A Fast and Accurate Response
    Selection Paradigm for Generation-Based Dialogue Systems", 2021, arXiv 2106.01263.
    """

    ids: Int[Tensor, "*batch keys"]
    pattern: Arrow = "arrow"

    def __post_init__(self) -> None:
        one_of("CandidateIsolation", "pattern", self.pattern, get_args(Arrow))
        require(
            self.ids.ndim in (1, 2) and not self.ids.is_floating_point() and self.ids.dtype != torch.bool,
            "CandidateIsolation",
            f"ids of shape {tuple(self.ids.shape)} and dtype {self.ids.dtype}",
            "give integers of shape (N,) or (B, N)",
        )

    @classmethod
    def from_lengths(cls, context: int, candidates: Sequence[int], pattern: Arrow = "arrow") -> Self:
        """The mask for a context and candidates of these lengths, one after the other."""
        return cls(Segments.from_lengths([context, *candidates]).ids, pattern)

    def positions(self) -> Int[Tensor, "*batch keys"]:
        """Position ids: every candidate goes on from the end of the context, which stands first."""
        return Segments(self.ids).places() + (self.ids > 0) * (self.ids == 0).sum(-1, keepdim=True)

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        require(
            tuple(self.ids.shape) in ((keys,), (batch, keys)) and queries <= keys,
            "CandidateIsolation",
            lambda: f"ids of shape {tuple(self.ids.shape)} for batch {batch}, {queries} queries and {keys} keys",
            lambda: f"give ({keys},) or ({batch}, {keys}), and no more queries than keys",
        )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query, key = (of_sample(self.ids, batch, index) for index in (query, key))
        allowed = query == key
        if self.pattern != "diagonal":
            allowed = allowed | (key == 0)
        return allowed | (query == 0) if self.pattern == "arrow" else allowed

    def tile_states(self, tiles: Tiles) -> Tensor:
        ids = self.ids.cpu()
        queries, keys = ids[..., tiles.offset :], ids
        if self.pattern == "diagonal":
            return range_states(*_tile_edges(queries, keys, tiles))
        # Ranges of candidates; in a tile without any the lowest is above the highest.
        most = torch.iinfo(ids.dtype).max
        query_low, _, key_low, _ = _tile_edges(_without(queries, most), _without(keys, most), tiles)
        _, query_high, _, key_high = _tile_edges(_without(queries, -most), _without(keys, -most), tiles)
        _, query_context, _, key_context = _tile_edges(queries == 0, keys == 0, tiles)
        one = (query_low == query_high) & (key_low == key_high) & (query_low == key_low)
        apart = (query_high < key_low) | (key_high < query_low)
        if self.pattern == "arrow":
            free = (query_low > query_high) | (key_low > key_high)
            return states(apart & ~query_context & ~key_context, one | free)
        return states(apart & ~key_context, (one & ~query_context) | (key_low > key_high))


def _without(ids: Tensor, instead: int) -> Tensor:
    return ids.masked_fill(ids == 0, instead)


def _tile_edges(queries: Tensor, keys: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query_low, query_high = tile_range(queries, tiles.query_tile)
    key_low, key_high = tile_range(keys, tiles.key_tile)
    return query_low[..., :, None], query_high[..., :, None], key_low[..., None, :], key_high[..., None, :]
