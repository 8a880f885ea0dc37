"""Multi-head attention. "Attention Is All You Need", Vaswani et al., 2017, arXiv 1706.03762.

    head_h = softmax(Q_h K_hᵀ / √d_h) V_h        Q_h = x W_h^Q,  K_h = c W_h^K,  V_h = c W_h^V
    y      = [head_1, …, head_H] W^O             c = x (self-attention) or the context (cross-attention)

Cost: time O(n m d), memory O(n d) beyond input and parameters (no n × m map is kept).

Differences: none for the defaults. The width of a head may be chosen free of the number of heads; rotary, ALiBi and
relative (T5) positions are options, where the paper adds sinusoids to the input (`regard.ops.positions.sinusoidal`).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from regard.catalogue import OptionSet, Paper, register
from regard.nn.attention import ALIBI, ATTENTION, CROSS, RELATIVE, ROTARY, Attention, Position


@register(
    "multi_head",
    paper=Paper(key="multi_head", title="Attention Is All You Need", year=2017, arxiv="1706.03762"),
    contract=replace(ATTENTION, options=(ROTARY, ALIBI, RELATIVE, CROSS, OptionSet({"head_dim": 6, "dropout": 0.1}))),
)
class MultiHeadAttention(Attention):
    """Every head attends with its own query, key and value projection."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        position: Position | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            head_dim=head_dim,
            causal=causal,
            position=position,
            bias=bias,
            dropout=dropout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )
