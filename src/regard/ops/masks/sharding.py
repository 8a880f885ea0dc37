"""Masks over blocks of positions: a band of near blocks, and the shards of S2-Attention, which differ by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Int
from torch import Tensor

from regard.ops.checks import require
from regard.ops.masks.base import Mask, Tiles, states
from regard.ops.masks.patterns import edges
from regard.ops.masks.tensors import of_sample, tile_range


@dataclass(frozen=True, eq=False, repr=False)
class LocalBlocks(Mask):
    """Keys fewer than `blocks` blocks of `size` positions away; ``LocalBlocks(size, 1)`` is ``Blocks(size)``."""

    size: int
    blocks: int

    def __post_init__(self) -> None:
        for name in ("size", "blocks"):
            value = getattr(self, name)
            require(value > 0, "LocalBlocks", f"{name} {value} is not positive", "count from 1")

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query // self.size - key // self.size).abs() < self.blocks

    def tile_states(self, tiles: Tiles) -> Tensor:
        query_low, query_high, key_low, key_high = (edge // self.size for edge in edges(tiles))
        return states(
            (key_low - query_high >= self.blocks) | (query_low - key_high >= self.blocks),
            (query_high - key_low < self.blocks) & (key_high - query_low < self.blocks),
        )


@dataclass(frozen=True, eq=False, repr=False)
class Sharded(Mask):
    """The shard of a head, which is every `stride`-th block of `block_size` positions, and the near blocks.

    Key head g has the blocks b with ``(b + g · head_step + offset) % stride == 0``, besides all that are fewer than
    `local_blocks` blocks away. With a `head_step` of 1 and at least `stride` key heads the shards together are the
    whole context; 0 gives every head the same shard. `group` query heads share a key head. Positions are those in the
    row, or `places`, an integer tensor (N,) or (B, N): for packed sequences ``Segments(...).places()``.

    From "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads", 2024, arXiv
    2407.17678, which uses it as ``Causal() & Sharded(...)``.
    """

    block_size: int
    local_blocks: int
    stride: int
    head_step: int = 1
    offset: int = 0
    group: int = 1
    places: Int[Tensor, "*batch keys"] | None = None

    def __post_init__(self) -> None:
        for name in ("block_size", "local_blocks", "stride", "group"):
            value = getattr(self, name)
            require(value > 0, "Sharded", f"{name} {value} is not positive", "count from 1")
        require(self.head_step >= 0, "Sharded", f"head_step {self.head_step} is negative", "use 0 for equal heads")
        if self.places is not None:
            require(
                self.places.ndim in (1, 2) and not self.places.is_floating_point(),
                "Sharded",
                f"places of shape {tuple(self.places.shape)} and dtype {self.places.dtype}",
                "give integers of shape (N,) or (B, N)",
            )

    @classmethod
    def for_heads(
        cls, heads: int, kv_heads: int, block_size: int, local_blocks: int, stride: int, places: Tensor | None = None
    ) -> Self:
        """The shards spread evenly when there are fewer heads than shards."""
        return cls(block_size, local_blocks, stride, max(1, stride // heads), 0, heads // kv_heads, places)

    def first_block(self, head: Int[Tensor, ...]) -> Int[Tensor, ...]:
        """The first block of the shard of a query head."""
        return -self._shift(head) % self.stride

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        require(
            heads % self.group == 0,
            "Sharded",
            lambda: f"{heads} heads in groups of {self.group}",
            "give a group that divides the heads",
        )
        places = self.places
        if places is None:
            return
        require(
            tuple(places.shape) in ((keys,), (batch, keys)) and queries <= keys,
            "Sharded",
            lambda: f"places of shape {tuple(places.shape)} for batch {batch}, {queries} queries and {keys} keys",
            lambda: f"give ({keys},) or ({batch}, {keys}), and no more queries than keys",
        )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if self.places is not None:
            query, key = (of_sample(self.places, batch, index) for index in (query, key))
        query, key = query // self.block_size, key // self.block_size
        near = (query - key).abs() < self.local_blocks
        return near | ((key + self._shift(head)) % self.stride == 0)

    def tile_states(self, tiles: Tiles) -> Tensor:
        query_low, query_high, key_low, key_high = (edge // self.block_size for edge in self._edges(tiles))
        shift = self._shift(torch.arange(tiles.heads if self.head_step else 1))[:, None, None]

        def others(low: Tensor, high: Tensor) -> Tensor:
            """How many blocks of a range are not in the shard."""
            mine = (high + shift) // self.stride - (low - 1 + shift) // self.stride
            return (high - low + 1 - mine).where(high >= low, 0)

        blocks = others(key_low, key_high)
        # What every query of the tile has near.
        low = torch.maximum(key_low, query_high - self.local_blocks + 1)
        high = torch.minimum(key_high, query_low + self.local_blocks - 1)
        far = (key_low - query_high >= self.local_blocks) | (query_low - key_high >= self.local_blocks)
        return states(far & (blocks == key_high - key_low + 1), blocks == others(low, high))

    def _shift(self, head: Tensor) -> Tensor:
        return head // self.group * self.head_step + self.offset

    def _edges(self, tiles: Tiles) -> tuple[Tensor, ...]:
        if self.places is None:
            return edges(tiles)
        places = self.places.cpu()
        query = tile_range(places[..., tiles.offset :], tiles.query_tile)
        key = tile_range(places, tiles.key_tile)
        return *(edge[..., :, None] for edge in query), *(edge[..., None, :] for edge in key)
