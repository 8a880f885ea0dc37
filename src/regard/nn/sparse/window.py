"""Sliding-window attention with attention sinks. "Longformer: The Long-Document Transformer", Beltagy et al., 2020,
arXiv 2004.05150; sinks: "Efficient Streaming Language Models with Attention Sinks", Xiao et al., 2023, arXiv
2309.17453.

    causal      allowed(i, j) = j ≤ i and (i − w < j or j < s): the last w tokens, the own one included, and s sinks
    otherwise   allowed(i, j) = |i − j| ≤ w / 2 or j < s: w / 2 tokens to each side, and s sinks
    head_h      = softmax over the allowed j of (q_i · k_j / √d_h), times v_j

Cost: time O(n (w + s) d), memory O(n d); the decoding state holds w − 1 + s tokens however many were seen.

Differences: positions are those of the sequence. StreamingLLM counts positions inside its cache, which lets a
pretrained model run beyond its training length but makes decoding differ from the full forward; here they are equal.
Longformer's global tokens see everything in return and have projections of their own; sinks are only seen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from regard.catalogue import OptionSet, Paper, Taxonomy, register
from regard.nn.attention import ATTENTION, Attention, Position
from regard.ops.attention import attention
from regard.ops.checks import one_of, require
from regard.ops.masks import Causal, Keys, Mask, Sinks, Window, segments_of


@dataclass(frozen=True)
class WindowState:
    """Keys and values still in sight (sinks first), and how many tokens were seen."""

    key: Float[Tensor, "batch heads kept head_dim"]
    value: Float[Tensor, "batch heads kept head_dim"]
    length: int


@register(
    "window",
    paper=(
        Paper(key="longformer", title="Longformer: The Long-Document Transformer", year=2020, arxiv="2004.05150"),
        Paper(
            key="streaming_llm",
            title="Efficient Streaming Language Models with Attention Sinks",
            year=2023,
            arxiv="2309.17453",
        ),
    ),
    taxonomy=Taxonomy(positions="local"),
    contract=replace(
        ATTENTION,
        patterns=("noncausal self", "causal self"),
        time="n*min(n, window+sinks)*d",
        memory="n*d",
        state="constant",
        permutation=None,
        options=(
            OptionSet({"window": 8}),
            OptionSet({"window": 5, "sinks": 2}),
            OptionSet({"window": 6, "position": "rotary"}, {"positions": True}),
            # A key's bias adds the same to every score of a row, which softmax takes off again.
            OptionSet(
                {"window": 3, "kv_heads": 2, "head_dim": 6, "bias": True, "dropout": 0.1}, {"frozen": ("key.bias",)}
            ),
        ),
    ),
)
class WindowAttention(Attention):
    """A token attends to its neighbours within a window, and to the first tokens.

    Args:
        window: number of tokens in sight: causal, the own one and ``window − 1`` before it; otherwise ``window // 2``
            to each side.
        sinks: number of first tokens that every later token may attend to (StreamingLLM uses 4).

    The other arguments are those of `Attention`; `position` is None or ``"rotary"``.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 256,
        sinks: int = 0,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
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
            causal=causal,
            position=position,
            bias=bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        require(window > 0, self._name, f"window {window}", "give a positive number of tokens")
        require(sinks >= 0, self._name, f"sinks {sinks}", "give 0 or more")
        self.window, self.sinks = window, sinks

    def full_mask(self, mask: Mask | None) -> Mask:
        near = Window(self.window - 1, 0) if self.causal else Window(self.window // 2)
        if self.sinks:
            segments = segments_of(mask)
            first = Sinks(self.sinks) if segments is None else Keys(segments.places() < self.sinks)
            near = Causal() & (near | first) if self.causal else near | first
        return near if mask is None else near & mask

    def init_state(self, batch: int) -> WindowState:
        weight = self.key.weight
        none = torch.empty(batch, self.kv_heads, 0, self.head_dim, device=weight.device, dtype=weight.dtype)
        return WindowState(none, none, 0)

    def step(self, x: Float[Tensor, "batch new dim"], state: WindowState) -> tuple[Tensor, WindowState]:
        query, key, value = self.project_step(x, state.length, state.key.shape[0])
        key, value = torch.cat([state.key, key], dim=2), torch.cat([state.value, value], dim=2)
        # What lies between sinks and window is gone, so that aligned at the end every distance in sight is still right.
        mixed = attention(query, key, value, mask=self.full_mask(None))
        return self.combine(mixed), WindowState(self._kept(key), self._kept(value), state.length + x.shape[1])

    def _kept(self, tokens: Tensor) -> Tensor:
        if tokens.shape[2] <= self.sinks + self.window - 1:
            return tokens
        recent = tokens[:, :, tokens.shape[2] - (self.window - 1) :]
        return torch.cat([tokens[:, :, : self.sinks], recent], dim=2)
