"""Length-scaled softplus attention with re-weighting. "Softplus Attention with Re-weighting Boosts Length Extrapolation
in Large Language Models", Gao and Spratling, 2025, arXiv 2501.13428.

    A = softplus(log d_h · log n_i · cos(q_i, k_j)),    a_ij = A_ij / Σ_j A_ij                 LSSA
    R = relu(n_i a_ij − o_i)^p,    y_i = Σ_j R_ij v_j / Σ_j R_ij                               LSSAR, p = 15

n_i is the number of keys query i may attend to and o_i = 1, but 0 where n_i ≤ 3. log n keeps the entropy of a row the
same at any length. a·n is 1 for a key of mean weight: the second stage drops all keys below the mean and sharpens what
is left, so that attention does not flatten as the sequence grows. Nothing has to be set or tuned for longer sequences.

Cost: time O(n m d), memory O((n + m) d): both sums of a row are carried along tiles, the second in a second walk over
the keys, so that forward and backward each compute the scores twice where softmax does once.

Differences: a row all of whose scores are equal has no weight above its mean, which leaves the paper's second division
0 / 0; with ε = 1e-12 in the denominator it gives zeros. The paper is causal with rotary positions (``causal=True,
position="rotary"``) and counts n_i = i; ours counts what is not masked, noncausal rows too.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ALIBI, ATTENTION, CROSS, ROTARY, Attention, Position
from regard.ops.normalizers import SoftplusL1
from regard.ops.precision import statistics_dtype


@register(
    "lssa",
    paper="lssa",
    contract=replace(
        ATTENTION,
        exact=False,
        options=(
            ROTARY,
            replace(ALIBI, arguments={**ALIBI.arguments, "power": 3.0}),
            OptionSet({"position": "relative", "power": None}, {"permutation": None}),
            OptionSet({"kv_heads": 2, "head_dim": 6, "bias": True, "dropout": 0.1}),
            CROSS,
        ),
    ),
)
class LSSA(Attention):
    """Softplus and l1 norm in place of softmax, scaled by log-length and sharpened by a power.

    Args:
        power: p of the re-weighting; None for LSSA alone. The paper's choice for long sequences is 15, and 3 is as good
            at the training length.

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        position: Position | None = None,
        power: float | None = 15.0,
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
        self.normalizer = SoftplusL1(power)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().split(x, source)
        # The score's own scale is 1 / √d_h.
        scale = math.log(self.head_dim) * math.sqrt(self.head_dim)
        return unit(query) * scale, unit(key), value


def unit(x: Tensor) -> Tensor:
    """Each head's vector over its length."""
    return F.normalize(x.to(statistics_dtype(x.dtype)), dim=-1).to(x.dtype)
