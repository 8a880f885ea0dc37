"""Sigmoid attention. "Theory, Analysis, and Best Practices for Sigmoid Self-Attention", Ramapuram et al., 2024,
arXiv 2409.04431.

    y_i = Σ_j σ(q_i · k_j / √d_h + b) v_j,     b = −log n

Every weight stands alone: there is no competition between keys and no statistic of the row. The bias keeps a row's mass
near one when training starts; the paper's stabilisers are LayerNorm of queries and keys per head (``qk_norm``) and a
learned scale per channel on the output (``layer_scale``).

Cost: time O(n m d), memory O(n d): the tiled engine needs no running maximum or sum, forward or backward.

Differences: n is the number of keys a query may attend, which is the paper's sequence length unless something is
masked. With a causal mask the paper has one n for all rows; ours lets token i count i + 1, so that decoding step by
step, padding and packing give what the plain forward gives. ``fixed_bias=-log(n)`` is the paper's constant. The
authors' release leaves the bias at 0 unless it is set; ``fixed_bias=0.0`` is that.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, Attention, Position
from regard.ops.normalizers import Sigmoid


@register(
    "sigmoid_attention",
    paper="sigmoid_attention",
    contract=replace(
        ATTENTION,
        exact=False,
        options=(
            OptionSet({"position": "rotary", "qk_norm": True}, {"positions": True, "permutation": None}),
            OptionSet({"position": "alibi", "layer_scale": 1e-4}, {"permutation": None}),
            OptionSet({"position": "relative"}, {"permutation": None}),
            OptionSet({"fixed_bias": -3.0, "head_dim": 6, "dropout": 0.1, "bias": True}),
        ),
    ),
)
class SigmoidAttention(Attention):
    """Softmax replaced by a sigmoid of each score.

    Args:
        fixed_bias: b for every row; None for ``−log n``.
        qk_norm: LayerNorm over each head's query and key (before rotary).
        layer_scale: initial value of a learned scale per output channel; None for none (the paper uses 1e-4 in vision).

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        position: Position | None = None,
        fixed_bias: float | None = None,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        bias: bool = False,
        dropout: float = 0.0,
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
            device=device,
            dtype=dtype,
        )
        factory = {"device": device, "dtype": dtype}
        self.normalizer = Sigmoid(fixed_bias)
        self.query_norm = nn.LayerNorm(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.layer_scale = nn.Parameter(torch.full((dim,), layer_scale, **factory)) if layer_scale is not None else None

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().split(x, source)
        return self.query_norm(query), self.key_norm(key), value

    def combine(self, mixed: Float[Tensor, "batch heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        out = super().combine(mixed)
        return out if self.layer_scale is None else out * self.layer_scale
