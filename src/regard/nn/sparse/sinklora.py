"""Shifted sparse attention. "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language
Models", Zhang, 2024, arXiv 2406.05678. S²-Attn: "LongLoRA: Efficient Fine-tuning of Long-Context Large Language
Models", Chen et al., 2023, arXiv 2309.12307.

    group_h(i)      = (i + shift_h) // G,   shift_h = ⌊G/2⌋ for the shifted heads, 0 for the others
    allowed_h(i, j) = group_h(i) = group_h(j)  or  i < g  or  j < g         and j ≤ i when causal
    head_h          = softmax over the allowed j of (q_i · k_j / √d_h), times v_j

G is `block_size` and g `sinks`, tokens at the start that see all and are seen by all (B(i, :) = B(:, i) = 1). S²-Attn
shifts the second half of the heads and has no sinks: ``unshifted=0, sinks=0``. SF-Attn cuts that half in two, leaves
the share `unshifted` of it in place and shifts the rest.

Cost: time O(n (G + g) d), memory O(n d); the exact decoding state holds G − 1 + g tokens. At inference the paper takes
the fine-tuned weights for full attention with the cache of H2O (arXiv 2306.14048) instead, ``init_state(batch,
budget=k)``: a token then sees the k tokens that are kept, half of them those that had most attention, half the last.

Differences: shifted groups do not wrap around, so that no token sees later ones: the first and the last G/2 tokens are
groups of their own, as in LongLoRA's FlashAttention path (SinkLoRA's release wraps, and without a mask for it the first
G/2 tokens then see the last). G is a number of tokens; the release takes a quarter of the training length. There is no
dropout of weights. SinkLoRA's release has S²-Attn only; the paper was read in a translation in which Figure 4 and
Algorithm 1 are missing, so that the default of `unshifted`, one half, and which heads stay are from its sentences.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from regard.catalogue import OptionSet, Paper, Taxonomy, register
from regard.nn.attention import ATTENTION, Attention, Position
from regard.nn.conversion import converted
from regard.nn.sparse._heavy_hitters import HeavyHitterCache
from regard.nn.sparse.window import WindowState
from regard.ops.attention import attention
from regard.ops.checks import one_of, require
from regard.ops.masks import Causal, GlobalTokens, Mask, ShiftedBlocks, segments_of


@register(
    "sinklora",
    paper=(
        "sinklora",
        Paper(
            key="longlora",
            title="LongLoRA: Efficient Fine-tuning of Long-Context Large Language Models",
            year=2023,
            arxiv="2309.12307",
        ),
    ),
    taxonomy=Taxonomy(positions="local"),
    contract=replace(
        ATTENTION,
        patterns=("noncausal self", "causal self"),
        time="n*min(n, block_size+sinks)*d",
        memory="n*d",
        state="constant",
        permutation=None,
        options=(
            OptionSet({"block_size": 4, "sinks": 2}),
            OptionSet({"block_size": 5, "sinks": 0, "unshifted": 0.0}),
            OptionSet({"block_size": 6, "sinks": 1, "unshifted": 1.0, "position": "rotary"}, {"positions": True}),
            # A key's bias adds the same to every score of a row, which softmax takes off again.
            OptionSet({"block_size": 8, "kv_heads": 2, "head_dim": 6, "bias": True}, {"frozen": ("key.bias",)}),
        ),
    ),
)
class ShiftedSparseAttention(Attention):
    """Tokens attend within groups, in some heads shifted by half a group, and to the first tokens.

    Args:
        block_size: number of positions of a group.
        sinks: number of first tokens that see everything and are seen by everything.
        unshifted: share of the second half of the heads that is not shifted; the last heads are.

    The other arguments are those of `Attention`; `position` is None or ``"rotary"``. Parameters are those of
    `MultiHeadAttention`, with `kv_heads` of `GroupedQueryAttention`, and load into either for full attention.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        block_size: int = 1024,
        sinks: int = 4,
        unshifted: float = 0.5,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        position: Position | None = None,
        bias: bool = False,
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
            causal=causal,
            position=position,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        require(block_size > 0, self._name, f"block_size {block_size}", "give a positive number of tokens")
        require(sinks >= 0, self._name, f"sinks {sinks}", "give 0 or more")
        require(0.0 <= unshifted <= 1.0, self._name, f"unshifted {unshifted}", "give a share in [0, 1]")
        self.block_size, self.sinks, self.unshifted = block_size, sinks, unshifted

    @classmethod
    def from_multi_head(
        cls, layer: Attention, *, block_size: int = 1024, sinks: int = 4, unshifted: float = 0.5
    ) -> ShiftedSparseAttention:
        """The layer to fine-tune on long sequences in the place of a pretrained one, with its parameters.

        `layer` is a `MultiHeadAttention` or `GroupedQueryAttention`. Raises ValueError if it attends to a context of
        another width or has positions that this does not have.
        """
        return converted(cls, layer, block_size=block_size, sinks=sinks, unshifted=unshifted)

    @property
    def shifted_heads(self) -> int:
        """How many heads are shifted: the last ones."""
        half = self.heads // 2
        return half - int(self.unshifted * half)

    def full_mask(self, mask: Mask | None) -> Mask:
        segments = segments_of(mask)
        own = self._groups(None if segments is None else segments.places())
        return own if mask is None else own & mask

    def init_state(self, batch: int, *, budget: int | None = None) -> WindowState | HeavyHitterCache:
        """The state before the first token.

        Decoding from it equals the forward. With a `budget` it is the cache of H2O for full attention, which never
        holds more tokens than that; while it has not been full, decoding equals full attention.
        """
        weight = self.key.weight
        factory = {"device": weight.device, "dtype": weight.dtype}
        if budget is not None:
            return HeavyHitterCache.empty(batch, self.kv_heads, self.head_dim, budget, **factory)
        none = torch.empty(batch, self.kv_heads, 0, self.head_dim, **factory)
        return WindowState(none, none, 0)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: WindowState | HeavyHitterCache
    ) -> tuple[Tensor, WindowState | HeavyHitterCache]:
        query, key, value = self.project_step(x, state.length, state.key.shape[0])
        if isinstance(state, HeavyHitterCache):
            mixed, state = state.attend(query, key, value)
            return self.combine(mixed), state
        key, value = torch.cat([state.key, key], dim=2), torch.cat([state.value, value], dim=2)
        end = state.length + x.shape[1]
        # What was let go lies between the sinks and the rest.
        index = torch.arange(key.shape[2], device=x.device)
        places = index.where(index < self.sinks, index + (end - key.shape[2]))
        mixed = attention(query, key, value, mask=self._groups(places))
        return self.combine(mixed), WindowState(self._kept(key), self._kept(value), end)

    def _groups(self, places: Tensor | None) -> Mask:
        shift = self.block_size - self.block_size // 2
        own: Mask = ShiftedBlocks(self.block_size, shift % self.block_size, self.heads - self.shifted_heads, places)
        if self.sinks:
            own = own | GlobalTokens(self.sinks, places)
        return Causal() & own if self.causal else own

    def _kept(self, tokens: Tensor) -> Tensor:
        """The sinks, and the last tokens that may be in a group with the next one."""
        recent = self.block_size - 1
        if tokens.shape[2] <= self.sinks + recent:
            return tokens
        return torch.cat([tokens[:, :, : self.sinks], tokens[:, :, tokens.shape[2] - recent :]], dim=2)
