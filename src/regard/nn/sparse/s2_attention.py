"""S2-Attention. "Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads", Lin et
al., 2024, arXiv 2407.17678.

    allowed_h(i, j) = j ≤ i and (b_i − b_j < l or (b_j + h) mod s = 0)   b = position // B, the block of a position
    head_h          = softmax over the allowed j of (q_i · k_j / √d_h), times v_j

B is `block_size`, l `local_blocks`, s `vertical_stride`. Every head keeps another shard of the context, and s heads
together keep all of it. The blocks of a shard are the same for every query, so that keys and values out of reach of
the band are never needed again by that head: the cache holds the shard and the band.

Cost: time O(n (n / s + l B) d), memory O(n d); the decoding state holds n / s + l B tokens a head.

A shard lies in every s-th block. It is copied together and put before the other keys, so that all heads walk the same
few wide tiles: of the copy they look at what is before the band, of the others at the band.

Differences: with fewer key heads than s some of the context is seen by no head; the released code allows that, and here
too heads are then spread evenly (`Sharded.for_heads`). With packed sequences blocks are counted from the start of each.
The paper's model has a few dense layers beside these: choose the mechanism of each layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from regard.catalogue import OptionSet, Taxonomy, register
from regard.nn.attention import ATTENTION, Attention, Position
from regard.ops.attention import attention
from regard.ops.checks import one_of, require
from regard.ops.masks import Causal, Mask, Sharded, Tiles, segments_of
from regard.ops.masks.base import PARTIAL, states
from regard.ops.masks.tensors import tile_range


@dataclass(frozen=True)
class ShardState:
    """Keys and values of each head's shard (as of `_gather`) and of the near blocks, and how many tokens were seen."""

    shard_key: Float[Tensor, "batch heads slots head_dim"]
    shard_value: Float[Tensor, "batch heads slots head_dim"]
    key: Float[Tensor, "batch heads near head_dim"]
    value: Float[Tensor, "batch heads near head_dim"]
    length: int


@dataclass(frozen=True, eq=False, repr=False)
class _ShardThenBand(Mask):
    """Of the first keys, copies of the shards, a query sees what is before its band; of the others it sees its band.

    `rows` and `places` say where queries and keys really stand; there `mask` is asked, too.
    """

    rows: Int[Tensor, " queries"]
    places: Int[Tensor, "key_heads keys"]
    copied: Bool[Tensor, " keys"]
    block_size: int
    local_blocks: int
    group: int
    mask: Mask | None

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        if self.mask is not None:
            self.mask.validate(batch, heads, queries, queries)

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query = self.rows[query - (self.places.shape[1] - self.rows.shape[0])]
        place, copied = self.places[head // self.group, key], self.copied[key]
        beyond = query // self.block_size - place // self.block_size >= self.local_blocks
        allowed = (beyond == copied) & (place <= query)
        if self.mask is None:
            return allowed
        # The last turn of the shards may go beyond the end.
        return allowed & self.mask.allows(batch, head, query, place.minimum(self.rows[-1]))

    def tile_states(self, tiles: Tiles) -> Tensor:
        # The same for all heads, so that they are computed together.
        low, high, copied = self.places.amin(0).cpu(), self.places.amax(0).cpu(), self.copied.cpu()
        never = torch.iinfo(low.dtype).max // 2
        edges = (
            tile_range(part, tiles.key_tile)[side]
            for chosen in (copied, ~copied)
            for side, part in enumerate((low.where(chosen, never), high.where(chosen, -never)))
        )
        shard_low, shard_high, band_low, band_high = edges
        query_low, query_high = (edge[:, None] for edge in tile_range(self.rows.cpu(), tiles.query_tile))

        def blocks(query: Tensor, key: Tensor) -> Tensor:
            return query // self.block_size - key // self.block_size

        made = states(
            (blocks(query_high, shard_low) < self.local_blocks)
            & ((band_low > query_high) | (blocks(query_low, band_high) >= self.local_blocks)),
            (blocks(query_low, shard_high) >= self.local_blocks)
            & (band_high <= query_low)
            & (blocks(query_high, band_low) < self.local_blocks),
        )
        return made if self.mask is None else made.clamp(max=PARTIAL)


@register(
    "s2_attention",
    paper="s2_attention",
    taxonomy=Taxonomy(positions="local"),
    contract=replace(
        ATTENTION,
        patterns=("causal self",),
        time="n*min(n, n/vertical_stride+local_blocks*block_size)*d",
        memory="n*d",
        permutation=None,
        options=(
            OptionSet({"block_size": 2, "local_blocks": 1, "vertical_stride": 4}),
            OptionSet(
                {"block_size": 3, "local_blocks": 2, "vertical_stride": 2, "position": "rotary"}, {"positions": True}
            ),
            # A key's bias adds the same to every score of a row, which softmax takes off again.
            OptionSet(
                {"block_size": 4, "local_blocks": 1, "vertical_stride": 3, "kv_heads": 2, "head_dim": 6}
                | {"bias": True, "dropout": 0.1},
                {"frozen": ("key.bias",)},
            ),
        ),
    ),
)
class S2Attention(Attention):
    """Each head keeps a shard of the context, every s-th block of it, and the near blocks; together they keep it all.

    Args:
        block_size: number of positions of a block.
        local_blocks: number of near blocks that every head attends to, the own one included.
        vertical_stride: number of shards. The whole context is seen where there are at least as many key heads.

    The other arguments are those of `Attention`; `position` is None or ``"rotary"``. Causal only.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        block_size: int = 64,
        local_blocks: int = 4,
        vertical_stride: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        position: Position | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if position is not None:
            one_of(self._name, "position", position, ("rotary",))
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            causal=True,
            position=position,
            bias=bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        sizes = {"block_size": block_size, "local_blocks": local_blocks, "vertical_stride": vertical_stride}
        for name, size in sizes.items():
            require(size > 0, self._name, f"{name} {size}", "give a positive number")
        self.block_size, self.local_blocks, self.vertical_stride = block_size, local_blocks, vertical_stride

    def full_mask(self, mask: Mask | None) -> Mask:
        segments = segments_of(mask)
        own = Causal() & self._shards(None if segments is None else segments.places())
        return own if mask is None else own & mask

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        query, key, value = self.project(x, context, mask, positions)
        dropout = self.dropout if self.training else 0.0
        return self.combine(self.attend(query, key, value, mask, dropout))

    def attend(
        self,
        query: Float[Tensor, "batch heads length head_dim"],
        key: Float[Tensor, "batch kv_heads length head_dim"],
        value: Float[Tensor, "batch kv_heads length head_dim"],
        mask: Mask | None = None,
        dropout: float = 0.0,
    ) -> Float[Tensor, "batch heads length head_dim"]:
        """Attention under ``full_mask(mask)`` between projected heads."""
        if segments_of(mask) is not None:
            # Shards begin anew with each sequence: no copy holds them side by side.
            return attention(query, key, value, mask=self.full_mask(mask), dropout=dropout)
        length = query.shape[2]
        own = self._mask(length, 0, length, mask, query.device)
        key, value = (torch.cat([self._gather(each, each[:, :, :0], 0), each], dim=2) for each in (key, value))
        return attention(query, key, value, mask=own, dropout=dropout)

    def init_state(self, batch: int) -> ShardState:
        weight = self.key.weight
        none = torch.empty(batch, self.kv_heads, 0, self.head_dim, device=weight.device, dtype=weight.dtype)
        return ShardState(none, none, none, none, 0)

    def step(self, x: Float[Tensor, "batch new dim"], state: ShardState) -> tuple[Tensor, ShardState]:
        query, key, value = self.project_step(x, state.length, state.key.shape[0])
        shard_key = self._gather(key, state.shard_key, state.length)
        shard_value = self._gather(value, state.shard_value, state.length)
        key, value = torch.cat([state.key, key], dim=2), torch.cat([state.value, value], dim=2)
        end = state.length + x.shape[1]
        start = end - key.shape[2]
        mixed = attention(
            query,
            torch.cat([shard_key, key], dim=2),
            torch.cat([shard_value, value], dim=2),
            mask=self._mask(x.shape[1], start, end, None, x.device),
        )
        # What the next token has near begins with a block.
        kept = max(0, (end // self.block_size - self.local_blocks + 1) * self.block_size) - start
        after = ShardState(shard_key, shard_value, key[:, :, kept:], value[:, :, kept:], end)
        return self.combine(mixed), after

    def _shards(self, places: Tensor | None = None) -> Sharded:
        numbers = self.block_size, self.local_blocks, self.vertical_stride
        return Sharded.for_heads(self.heads, self.kv_heads, *numbers, places)

    def _mask(self, queries: int, start: int, end: int, mask: Mask | None, device: torch.device) -> Mask:
        """The mask over the shards and the tokens from `start` to `end`, for queries that are the last of those."""
        rows, shards = torch.arange(end - queries, end, device=device), self._places(end, device)
        near = torch.arange(start, end, device=device).expand(self.kv_heads, -1)
        copied = torch.arange(shards.shape[1] + end - start, device=device) < shards.shape[1]
        numbers = self.block_size, self.local_blocks, self.heads // self.kv_heads
        return _ShardThenBand(rows, torch.cat([shards, near], dim=1), copied, *numbers, mask)

    def _places(self, end: int, device: torch.device) -> Int[Tensor, "kv_heads slots"]:
        """Where the tokens of each head's shard stand, up to the turn of the shards that `end` falls into."""
        turns = -(-end // (self.block_size * self.vertical_stride))
        heads = torch.arange(self.kv_heads, device=device) * (self.heads // self.kv_heads)
        block = torch.arange(turns, device=device) * self.vertical_stride + self._shards().first_block(heads)[:, None]
        inside = torch.arange(self.block_size, device=device)
        return (block[..., None] * self.block_size + inside).flatten(1)

    def _gather(self, tokens: Tensor, shard: Tensor, start: int) -> Float[Tensor, "batch kv_heads slots head_dim"]:
        """`shard`, of what stands before `start`, with what it gets of the tokens from there on; zeros come later."""
        new = tokens.shape[2]
        places = self._places(start + new, tokens.device) - start
        index = places.clamp(0, new - 1)[None, :, :, None].expand(*tokens.shape[:2], -1, tokens.shape[3])
        shard = F.pad(shard, (0, 0, 0, places.shape[1] - shard.shape[2]))
        return tokens.gather(2, index).where(((places >= 0) & (places < new))[..., None], shard)
