"""MoBA. "MoBA: Mixture of Block Attention for Long-Context LLMs", Lu et al., 2025, arXiv 2502.13189.

    I_c  = positions c B … (c + 1) B − 1                               the c-th block of B keys
    s_c  = q_i · mean(K[I_c])                                          the gate, without 1/√d_h
    g_c  = 1 for the k highest scores, where s_c = ∞ for i in I_c and −∞ for blocks that come later, else 0
    o_i  = softmax over the j ≤ i in blocks with g = 1 of (q_i · k_j / √d_h), times v_j

B is `block_size`, k `top_k`. A query always visits its own block, which counts: of those before it k − 1 are chosen, by
each query and head for itself. Choosing has no gradient and no parameters, so that a layer may be switched between this
and full attention at any time, by its attribute `full`: the last layers of a model stay full (`full_from`), training
ends in full attention, or only the prompt is read sparsely and `step` is full, as in the paper's evaluation.

Cost: time O(n (n / B + k B) d), memory O(n (d + h n / B)), the gate's part first. The decoding state holds all tokens
and a mean for each block that is full.

Differences: none. As in the authors' code keys are turned by position before they are averaged, and the blocks of a
packed sequence begin with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, Attention, Position
from regard.nn.conversion import converted
from regard.nn.heads.gqa import GroupedQueryAttention
from regard.nn.heads.mqa import MultiQueryAttention
from regard.nn.heads.multi_head import MultiHeadAttention
from regard.ops.attention import attention, attention_weights, attention_with_lse
from regard.ops.blocks import BlockMap, block_means
from regard.ops.cache import KeyValueCache
from regard.ops.checks import one_of, require
from regard.ops.masks import Causal, Dense, Mask, Segments, segments_of
from regard.ops.precision import statistics_dtype, without_autocast

AT_ONCE = 2048
"""Queries that choose together: none of them looks at means that come after them all."""


@dataclass(frozen=True)
class BlockState:
    """Keys and values of all tokens, and the mean key of each block that is full (a cache without values)."""

    tokens: KeyValueCache
    means: KeyValueCache


@dataclass(frozen=True)
class PackedBlocks:
    """Blocks that begin with each sequence of a packed row; the last of a sequence may be short."""

    block: Segments
    """Which block a token is in."""
    tokens: Int[Tensor, "batch_or_1 full_blocks_times_size"]
    """The tokens of full blocks, one block after the other; of some sample there may be fewer blocks."""
    hidden: Bool[Tensor, "batch_or_1 1 length full_blocks"]
    """Which of them are not before a token's own block, in its sequence."""

    @classmethod
    def of(cls, segments: Segments, size: int, device: torch.device) -> PackedBlocks:
        places, starts = (part.to(device).view(-1, part.shape[-1]) for part in (segments.places(), segments.starts()))
        index, sequence = torch.arange(places.shape[1], device=device), starts.cumsum(-1)
        ends = places % size == size - 1
        # A sample with fewer full blocks than another gets blocks that come after everybody, which nobody sees.
        first = index.where(ends, len(index) + size).sort(-1).values[:, : int(ends.sum(-1).max())] - (size - 1)
        tokens = (first[..., None] + torch.arange(size, device=device)).clamp(max=len(index) - 1).flatten(1)
        own = index - places % size
        other = sequence.gather(1, tokens[:, ::size])[:, None] != sequence[..., None]
        hidden = (first[:, None] >= own[..., None]) | other
        return cls(Segments(own if len(own) > 1 else own[0]), tokens, hidden[:, None])

    def take(self, x: Float[Tensor, "batch heads length width"]) -> Float[Tensor, "batch heads taken width"]:
        """The tokens of full blocks."""
        return x.take_along_dim(self.tokens[:, None, :, None], 2)


@register(
    "moba",
    paper="moba",
    contract=replace(
        ATTENTION,
        patterns=("causal self",),
        time="n*min(n, n/block_size+top_k*block_size)*d",
        memory="n*d+h*n*n/block_size",
        any_mask=False,
        permutation=None,
        options=(
            OptionSet({"block_size": 2, "top_k": 2}),
            OptionSet({"block_size": 3, "top_k": 1, "position": "rotary"}, {"positions": True}),
            # A key's bias adds the same to every score of a row, which softmax takes off again.
            OptionSet(
                {"block_size": 1, "top_k": 4, "kv_heads": 2, "head_dim": 6, "bias": True}, {"frozen": ("key.bias",)}
            ),
            OptionSet({"block_size": 2, "layer": 3, "full_from": 2}, {"time": "n*n*d", "memory": "n*d"}),
        ),
    ),
)
class MixtureOfBlockAttention(Attention):
    """Each query attends to the blocks of keys whose means it likes best, and to its own block.

    Args:
        block_size: number of keys in a block (512 in the paper's scaling experiments).
        top_k: number of blocks that a query visits, its own included.
        layer: which layer of a model this is, from 0.
        full_from: the first layer with full attention; None for none. It sets the attribute `full`, which may be set
            anew at any time, between two steps of decoding too.

    The other arguments are those of `Attention`; `position` is None or ``"rotary"``. Causal only.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        block_size: int = 512,
        top_k: int = 3,
        layer: int = 0,
        full_from: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        position: Position | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if position is not None:
            one_of(self._name, "position", position, ("rotary",))
        for name, size in (("block_size", block_size), ("top_k", top_k)):
            require(size > 0, self._name, f"{name} {size}", "give a positive number")
        for name, index in (("layer", layer), ("full_from", full_from)):
            require(index is None or index >= 0, self._name, f"{name} {index}", "count layers from 0")
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            causal=True,
            position=position,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.block_size, self.top_k = block_size, top_k
        self.full = full_from is not None and layer >= full_from

    @classmethod
    def from_attention(
        cls,
        layer: MultiHeadAttention | GroupedQueryAttention | MultiQueryAttention,
        *,
        block_size: int = 512,
        top_k: int = 3,
    ) -> MixtureOfBlockAttention:
        """A layer to train on from a trained one with full attention, which it equals up to `top_k` blocks."""
        return converted(cls, layer, causal=True, block_size=block_size, top_k=top_k)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself; `mask` is None, ``Padding`` or ``Segments``."""
        query, key, value = self.project(x, context, mask, positions)
        blocks = self._blocks(x, mask)
        if blocks is None:
            return self.combine(attention(query, key, value, mask=self._mask(query, key, mask)))
        near, near_lse = attention_with_lse(query, key, value, mask=Causal() & blocks.block)
        chosen = self._earlier(query, key, blocks)
        if chosen is None:
            return self.combine(near)
        far, far_lse = attention_with_lse(query, blocks.take(key), blocks.take(value), mask=chosen)
        share = torch.stack([near_lse, far_lse]).softmax(0).to(near.dtype)[..., None]
        return self.combine(share[0] * near + share[1] * far)

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        query, key, value = self.project(x, context, mask, positions)
        blocks = self._blocks(x, mask)
        own = self._mask(query, key, mask) if blocks is None else self._dense(query, key, blocks)
        weights = attention_weights(query, key, mask=own)
        return weights.to(value.dtype), value.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def init_state(self, batch: int) -> BlockState:
        weight, shape = self.key.weight, (batch, self.kv_heads, self.head_dim)
        precise = statistics_dtype(weight.dtype)
        return BlockState(
            KeyValueCache.empty(*shape, device=weight.device, dtype=weight.dtype),
            KeyValueCache.empty(*shape, value_dim=0, device=weight.device, dtype=precise),
        )

    def step(self, x: Float[Tensor, "batch new dim"], state: BlockState) -> tuple[Tensor, BlockState]:
        query, key, value = self.project_step(x, state.tokens.length, state.tokens.key.shape[0])
        tokens, means = state.tokens.append(key, value), state.means
        closed = tokens.length // self.block_size
        if closed > means.length:
            new = tokens.key[:, :, means.length * self.block_size : closed * self.block_size]
            new = self._means(new)
            means = means.append(new, new[..., :0])
        own = Causal() if self.full else Causal() & self.route(query, means.key, tokens.length)
        mixed = attention(query, tokens.key, tokens.value, mask=own)
        return self.combine(mixed), BlockState(tokens, means)

    def route(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        means: Float[Tensor, "batch kv_heads blocks head_dim"],
        keys: int,
    ) -> BlockMap:
        """The blocks that queries visit which stand at the end of `keys` keys; the last block may have no mean."""
        size, offset = self.block_size, keys - query.shape[2]
        parts, start = [], offset
        for some in query.split(AT_ONCE, dim=2):
            stop = start + some.shape[2]
            # Blocks from `near` on are not before all these queries, and from `far` on come after them all.
            near, far = start // size, -(-stop // size)
            scores = self._gate(some, means[:, :, :far])
            scores = F.pad(scores, (0, far - scores.shape[3])) if scores.shape[3] < far else scores
            own = torch.arange(start, stop, device=query.device)[:, None] // size
            block = torch.arange(near, far, device=query.device)
            scores[..., near:].masked_fill_(block > own, -torch.inf).masked_fill_(block == own, torch.inf)
            parts.append(BlockMap.top_k(scores, self.top_k, query_block=1, key_block=size, offset=offset))
            start = stop
        if len(parts) == 1:
            return parts[0]
        # By key, as maps lie in memory.
        blocks = -(-keys // size)
        by_key = [F.pad(part.visits.mT, (0, 0, 0, blocks - part.visits.shape[3])) for part in parts]
        return replace(parts[0], visits=torch.cat(by_key, dim=-1).mT)

    @torch.no_grad()
    def _gate(self, query: Tensor, means: Tensor) -> Float[Tensor, "batch heads queries blocks"]:
        with without_autocast(query.device):
            grouped = query.to(means.dtype).unflatten(1, (self.kv_heads, -1))
            return (grouped @ means[:, :, None].mT).flatten(1, 2)

    @torch.no_grad()
    def _means(self, key: Float[Tensor, "batch kv_heads length head_dim"]) -> Tensor:
        return block_means(key.to(statistics_dtype(key.dtype)), self.block_size)

    def _mask(self, query: Tensor, key: Tensor, mask: Mask | None) -> Mask:
        own = Causal() if self.full else Causal() & self.route(query, self._means(key), key.shape[2])
        return own if mask is None else own & mask

    def _blocks(self, x: Tensor, mask: Mask | None) -> PackedBlocks | None:
        segments = segments_of(mask)
        if segments is None or self.full:
            return None
        segments.validate(x.shape[0], self.heads, x.shape[1], x.shape[1])
        owner, problem = self._name, "Segments with query_ids for a self-attention"
        require(segments.query_ids is None, owner, problem, "give ids alone")
        return PackedBlocks.of(segments, self.block_size, x.device)

    def _earlier(self, query: Tensor, key: Tensor, blocks: PackedBlocks) -> BlockMap | None:
        """The blocks visited beside the own one, among the full ones; None where there can be none."""
        if blocks.tokens.shape[1] == 0 or self.top_k == 1:
            return None
        scores = self._gate(query, self._means(blocks.take(key))).masked_fill(blocks.hidden, -torch.inf)
        offset = blocks.tokens.shape[1] - query.shape[2]
        return BlockMap.top_k(scores, self.top_k - 1, query_block=1, key_block=self.block_size, offset=offset)

    def _dense(self, query: Tensor, key: Tensor, blocks: PackedBlocks) -> Mask:
        """The choice over all tokens."""
        length, chosen = query.shape[2], self._earlier(query, key, blocks)
        own = (Causal() & blocks.block).dense(length, length, batch=query.shape[0], device=query.device)
        if chosen is None:
            return Dense(own)
        visits = chosen.visits.repeat_interleave(self.block_size, -1)
        tokens = blocks.tokens[:, None, None].expand_as(visits)
        far = torch.zeros(*visits.shape[:3], length, dtype=torch.int, device=query.device)
        return Dense(own | (far.scatter_add(3, tokens, visits.int()) > 0))
