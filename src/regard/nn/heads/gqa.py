"""Grouped-query attention. "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints",
Ainslie et al., 2023, arXiv 2305.13245.

    head_h = softmax(Q_h K_gᵀ / √d_h) V_g        g = ⌊h · G / H⌋: H query heads in G groups, one key and value head each
    y      = [head_1, …, head_H] W^O             G = 1 is multi-query, G = H multi-head attention

Uptraining starts from a multi-head checkpoint whose key and value projections are averaged over each group:
``W_g^K = mean_{h in g} W_h^K``, ``W_g^V = mean_{h in g} W_h^V`` (`GroupedQueryAttention.from_multi_head`).

Cost: time O(n m d) as multi-head; the decoding state is H / G times smaller.

Differences: none. Positions other than none are options the paper does not discuss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import reduce

from regard.catalogue import OptionSet, register
from regard.nn.attention import ALIBI, ATTENTION, CROSS, RELATIVE, ROTARY, Attention, Position
from regard.nn.conversion import converted
from regard.nn.heads.multi_head import MultiHeadAttention
from regard.ops.checks import require


@register(
    "gqa",
    paper="gqa",
    contract=replace(
        ATTENTION, options=(ROTARY, ALIBI, RELATIVE, CROSS, OptionSet({"kv_heads": 1, "head_dim": 6, "dropout": 0.1}))
    ),
)
class GroupedQueryAttention(Attention):
    """Groups of query heads share a key and value head."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int = 2,
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
            kv_heads=kv_heads,
            head_dim=head_dim,
            causal=causal,
            position=position,
            bias=bias,
            dropout=dropout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )

    @classmethod
    def from_multi_head(cls, layer: MultiHeadAttention, kv_heads: int) -> GroupedQueryAttention:
        """A grouped layer whose key and value heads are the means of the groups of `layer`'s.

        Query, output and position parameters are copied. Raises ValueError if `kv_heads` does not divide the heads.
        """
        require(
            kv_heads > 0 and layer.heads % kv_heads == 0,
            "GroupedQueryAttention.from_multi_head",
            f"kv_heads {kv_heads} does not divide heads {layer.heads}",
            "give a divisor",
        )
        state = layer.state_dict()
        for projection in ("key", "value"):
            for name in (f"{projection}.weight", f"{projection}.bias"):
                if name in state:
                    state[name] = _group_mean(state[name], kv_heads, layer.head_dim)
        return converted(cls, layer, kv_heads=kv_heads, state=state)


def _group_mean(parameter: torch.Tensor, groups: int, head_dim: int) -> torch.Tensor:
    return reduce(parameter, "(group heads width) ... -> (group width) ...", "mean", group=groups, width=head_dim)
