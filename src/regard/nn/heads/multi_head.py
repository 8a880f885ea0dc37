"""Multi-head attention. "Attention Is All You Need", Vaswani et al., 2017, arXiv 1706.03762; heads of any width:
"Low-Rank Bottleneck in Multi-head Attention Models", Bhojanapalli et al., 2020, arXiv 2002.07028.

    head_h = softmax(Q_h K_hᵀ / √d_h) V_h        Q_h = x W_h^Q,  K_h = c W_h^K,  V_h = c W_h^V
    y      = [head_1, …, head_H] W^O             c = x (self-attention) or the context (cross-attention)

Cost: time O(n m d), memory O(n d) beyond input and parameters (no n × m map is kept).

The scores of a head have rank d_h at most, so that many narrow heads of a fixed d can express less each. The second
paper's heads are as wide as the sequence is long, ``head_dim = n`` whatever their number, and then express every
attention pattern where the tokens are independent (`attention_rank` says what a configuration can).

Differences: none for the defaults. Rotary, ALiBi and relative (T5) positions are options, where the paper adds
sinusoids to the input (`regard.ops.positions.sinusoidal`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from regard.catalogue import OptionSet, Paper, register
from regard.nn.attention import ALIBI, ATTENTION, CROSS, RELATIVE, ROTARY, Attention, Position
from regard.nn.mechanism import head_width
from regard.ops.checks import require


class ScoreRank(NamedTuple):
    """The highest rank a head's scores can have, and the rank from which on every attention pattern is possible."""

    highest: int
    enough: int

    @property
    def bottleneck(self) -> bool:
        """Whether there are attention patterns that no weights give."""
        return self.highest < self.enough


def attention_rank(
    dim: int,
    length: int,
    *,
    heads: int = 8,
    head_dim: int | None = None,
    context_dim: int | None = None,
    context_length: int | None = None,
) -> ScoreRank:
    """What the query-key products of one head can express, without positions and biases.

    ``highest`` is the least of head_dim, the widths and the lengths. ``enough`` is the number of queries, or the number
    of keys less one if that is less: softmax takes off what is added to a whole row, and with it one rank. The sizes
    are those of `MultiHeadAttention`; raises ValueError for sizes it refuses and for lengths below one.
    """
    owner = "attention_rank"
    width = head_width(owner, dim, heads, head_dim)
    source = dim if context_dim is None else context_dim
    keys = length if context_length is None else context_length
    require(source > 0, owner, f"context_dim {source}", "give a positive width")
    require(length > 0 and keys > 0, owner, f"length {length}, context_length {keys}", "give one or more")
    return ScoreRank(min(width, dim, source, length, keys), min(length, keys - 1))


@register(
    "multi_head",
    paper=(
        Paper(key="multi_head", title="Attention Is All You Need", year=2017, arxiv="1706.03762"),
        "fixed_head",
    ),
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
