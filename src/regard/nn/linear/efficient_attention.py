"""Efficient attention. "Efficient Attention: Attention with Linear Complexities", Shen et al., 2018, arXiv 1812.01243.

    E(Q, K, V) = ρ_q(Q) (ρ_k(K)ᵀ V)        Q, K = x W^Q, x W^K of width d_k,  V = x W^V of width d_v
    y          = x + E W^O

    softmax    ρ_q: softmax over the channels of each query;  ρ_k: softmax over the positions of each key channel
    scaling    ρ_q(Y) = ρ_k(Y) = Y / √n, which makes E plain dot-product attention without softmax, Q Kᵀ V / n

A key channel is a map over all positions that gathers one global vector of values; a query mixes these d_k vectors.
ρ_q(Q) ρ_k(K)ᵀ is the n × n map this amounts to: never built. With softmax its rows sum to one. There is no scale.

Cost: time O(n d_k d_v / h) besides the projections, memory O(n d + d_k d_v / h).

Differences: several heads are from the authors' code, the paper has one. Keys have no bias with softmax, where it would
cancel in ρ_k. As in the paper there is no cross-attention.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.catalogue import Contract, OptionSet, register
from regard.nn.mechanism import Mechanism
from regard.ops.checks import one_of, require
from regard.ops.linear import linear_attention
from regard.ops.masks import Padding
from regard.ops.normalizers import Softmax
from regard.ops.precision import statistics_dtype


@register(
    "efficient_attention",
    paper="efficient_attention",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self",),
        time="n*d*d",
        memory="n*d + d*d/h",
        padding=True,
        permutation="equivariant",
        minimum={"dim": 1, "heads": 1, "length": 1},
        options=(
            OptionSet({"key_dim": 16, "value_dim": 24}),
            OptionSet({"residual": False}, {"attention_map": True}),
            OptionSet({"normalization": "scaling", "residual": False}, {"attention_map": True}),
        ),
    ),
)
class EfficientAttention(Mechanism):
    """Queries mix global vectors that key channels gather, in linear time.

    Args:
        dim: width of the tokens.
        heads: number of heads, a divisor of `key_dim` and `value_dim`.
        key_dim: width d_k of queries and keys, all heads together; `dim` by default.
        value_dim: width d_v of values, all heads together; `dim` by default.
        normalization: ``"softmax"`` or ``"scaling"``, the paper's two choices of ρ.
        residual: whether the input is added to the output.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        key_dim: int | None = None,
        value_dim: int | None = None,
        normalization: Literal["softmax", "scaling"] = "softmax",
        residual: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.residual = dim, heads, residual
        self.key_dim = dim if key_dim is None else key_dim
        self.value_dim = dim if value_dim is None else value_dim
        one_of(self._name, "normalization", normalization, ("softmax", "scaling"))
        self.normalization = normalization
        require(heads > 0, self._name, f"heads {heads}", "give a positive number")
        for name in ("dim", "key_dim", "value_dim"):
            width = getattr(self, name)
            require(width > 0, self._name, f"{name} {width}", "give a positive width")
            require(
                name == "dim" or width % heads == 0,
                self._name,
                f"heads {heads} does not divide {name} {width}",
                f"change either; {name} need not be dim",
            )
        factory = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, self.key_dim, **factory)
        self.key = nn.Linear(dim, self.key_dim, bias=normalization == "scaling", **factory)
        self.value = nn.Linear(dim, self.value_dim, **factory)
        self.output = nn.Linear(self.value_dim, dim, **factory)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Tensor | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself; `mask` may be a ``Padding``, whose tokens are then in no sum over positions.

        Raises ValueError for a context, for positions and for any other mask.
        """
        query, key, value = self.project(x, context, mask, positions)
        out = self.combine(linear_attention(query, key, value, causal=False).to(x.dtype))
        return x + out if self.residual else out

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch heads length length"], Float[Tensor, "batch heads length value_head_dim"]]:
        """The map ρ_q(Q) ρ_k(K)ᵀ and the values: ``combine(weights @ value)`` is the output.

        This one is n × n. Raises ValueError with ``residual=True``, where the output is more than what the map mixes.
        """
        require(
            not self.residual,
            self._name,
            "attention_map with residual=True, which adds x to what the map mixes",
            "build with residual=False and add x outside",
        )
        query, key, value = self.project(x, context, mask, positions)
        return (query @ key.mT).to(x.dtype), value.to(x.dtype)

    def combine(self, mixed: Float[Tensor, "batch heads length value_head_dim"]) -> Float[Tensor, "batch length dim"]:
        """Concatenate the heads and project."""
        return self.output(rearrange(mixed, "batch heads length width -> batch length (heads width)"))

    def project(
        self, x: Tensor, context: Tensor | None, mask: Padding | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Checked arguments as ρ_q(Q), ρ_k(K) and V in heads, at least float32."""
        self.check_tokens(x, context, mask, positions, takes_positions=False)
        self.check_width(x, self.dim)
        query, key, value = (self.split(projection(x)) for projection in (self.query, self.key, self.value))
        if self.normalization == "softmax":
            return query.softmax(-1), softmax_over_positions(key, mask), value
        return *scaled(query, key, mask), value

    def split(self, projected: Float[Tensor, "batch length width"]) -> Float[Tensor, "batch heads length head_width"]:
        """Heads, in the type the softmaxes and sums are computed in."""
        precise = statistics_dtype(projected.dtype)
        pattern = "batch length (heads width) -> batch heads length width"
        return rearrange(projected.to(precise), pattern, heads=self.heads)


def softmax_over_positions(
    key: Float[Tensor, "batch heads length head_dim"], mask: Padding | None
) -> Float[Tensor, "batch heads length head_dim"]:
    """ρ_k: every channel is a distribution over the positions that are not padding, zero where all are."""
    if mask is None:
        return key.softmax(-2)
    real = real_positions(key, mask).mT
    scores = key.mT.masked_fill(~real, -torch.inf)
    return Softmax().weights(scores, real.sum(-1, keepdim=True)).mT


def scaled(query: Tensor, key: Tensor, mask: Padding | None) -> tuple[Tensor, Tensor]:
    """ρ of the scaling normalization: queries and keys over √n, with n the positions that are not padding."""
    if mask is None:
        return query * query.shape[-2] ** -0.5, key * key.shape[-2] ** -0.5
    real = real_positions(key, mask)
    root = real.sum(-2, keepdim=True).clamp(min=1).to(key.dtype).sqrt()
    return query / root, key.masked_fill(~real, 0.0) / root


def real_positions(key: Tensor, mask: Padding) -> Bool[Tensor, "batch 1 length 1"]:
    """Which positions are not padding."""
    batch, _, length, _ = key.shape
    mask.validate(batch, 1, length, length)
    return mask.real(length).to(key.device)[:, None, :, None]
