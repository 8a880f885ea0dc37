"""Multi-query attention. "Fast Transformer Decoding: One Write-Head is All You Need", Shazeer, 2019, arXiv 1911.02150.

    head_h = softmax(Q_h Kᵀ / √d_h) V        Q_h = x W_h^Q,  K = c W^K,  V = c W^V
    y      = [head_1, …, head_H] W^O         one key and value head, shared by all H query heads

Cost: time O(n m d) as multi-head; the decoding state is H times smaller, which is what bounds a step.

Differences: none. Positions other than none are options the paper does not discuss.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from regard.catalogue import OptionSet, register
from regard.nn.attention import ALIBI, ATTENTION, CROSS, RELATIVE, ROTARY, Attention, Position


@register(
    "mqa",
    paper="mqa",
    contract=replace(ATTENTION, options=(ROTARY, ALIBI, RELATIVE, CROSS, OptionSet({"head_dim": 6, "dropout": 0.1}))),
)
class MultiQueryAttention(Attention):
    """Many query heads share one key and value head."""

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
            kv_heads=1,
            head_dim=head_dim,
            causal=causal,
            position=position,
            bias=bias,
            dropout=dropout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )
