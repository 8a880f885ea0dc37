"""Normalized attention pooling. "Normalized Attention Without Probability Cage", Richter and Wattenhofer, 2020, arXiv
2005.09561.

    S_ij = q_i · k_j,    W_ij = g_h (S_ij − mean_j S_ij) / (std_j S_ij + ε) + b_h,    y = GELU(LN(W V)) W^O

Weights are scores normalised over the keys, with a gain and a bias per head (1 and 0 at first) in place of softmax.
They may be negative and sum to anything: the output leaves the convex hull of the values, and at initialisation it
neither isolates single tokens nor averages them all, whatever the length and the scale of the scores.

Cost: time O(n m d), memory O(n m h): a weight needs mean and deviation of its whole row, which only the reference
engine has at hand.

Accuracy: a row of two keys is a step at equal scores, of slope up to 1 / ε = 1000, which LN may steepen further. Where
a draw meets one, the gradient in float32 is right to some 3e-4 only, as is that in float64 after the inputs are rounded
to float32: it is the function, not its computation.

Differences: the projections start from Glorot's initialisation, the release's from a truncated normal of deviation
0.02. GELU is exact, the release's the tanh approximation. The paper has self-attention that sees all tokens; causal
and cross-attention are ours.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ALIBI, ATTENTION, CROSS, ROTARY, Attention, Position
from regard.ops.normalizers import LayerNormScores, Normalizer


@register(
    "nap",
    paper="nap",
    contract=replace(
        ATTENTION,
        exact=False,
        memory="n*m*h + (n+m)*d",
        # A key's bias adds the same to every score of a row, which the mean takes off again.
        frozen=("key.bias",),
        steep=True,
        options=(
            replace(ROTARY, changes={**ROTARY.changes, "frozen": ()}),
            replace(ALIBI, arguments={**ALIBI.arguments, "norm": False}),
            OptionSet({"position": "relative", "gelu": False}, {"permutation": None}),
            OptionSet({"norm": False, "gelu": False, "head_dim": 6, "bias": False, "dropout": 0.1}, {"frozen": ()}),
            CROSS,
        ),
    ),
)
class NormalizedAttentionPooling(Attention):
    """Scores normalised over the keys instead of softmax: weights of any sign and sum.

    Args:
        norm: LayerNorm of what is pooled, over all heads together, before the output projection.
        gelu: GELU after it.

    The other arguments are those of `Attention`; `bias` is on by default.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        position: Position | None = None,
        norm: bool = True,
        gelu: bool = True,
        bias: bool = True,
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
        factory = {"device": device, "dtype": dtype}
        self.gain = nn.Parameter(torch.ones(heads, **factory))
        self.shift = nn.Parameter(torch.zeros(heads, **factory))
        self.norm = nn.LayerNorm(heads * self.head_dim, eps=1e-3, **factory) if norm else nn.Identity()
        self.gelu = gelu

    @property
    def normalizer(self) -> Normalizer:  # pyright: ignore[reportIncompatibleVariableOverride] it holds parameters
        return LayerNormScores(self.gain, self.shift)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().split(x, source)
        # Takes the score's own scale off again: the deviation is all the scale there is.
        return query * math.sqrt(self.head_dim), key, value

    def combine(self, mixed: Float[Tensor, "batch heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        pooled = self.norm(mixed.transpose(1, 2).flatten(2))
        return self.output(F.gelu(pooled) if self.gelu else pooled)
