"""Normalizers: how a row of scores becomes a row of weights.

A normalizer computes whole rows (`weights`, the definition) and, if it is `tileable`, one tile at a time. `Softmax` is
tileable by its running maximum and sum, which the engines carry; `SoftplusL1` by two such sums, one after the other. A
`Pointwise` one maps every score alone, so its backward needs no statistic of the row either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from regard.ops.checks import one_of, require
from regard.ops.value import Value


class Normalizer(Value):
    """Turns scores (−inf where nothing may be attended) into weights."""

    tileable: ClassVar[bool] = False
    """Whether a weight can be computed without the whole row at hand."""

    def weights(
        self, scores: Float[Tensor, "*batch queries keys"], counts: Int[Tensor, "*batch queries 1"]
    ) -> Float[Tensor, "*batch queries keys"]:
        """The weights; `counts` is how many keys each query may attend. A row of −inf gives zeros."""
        raise NotImplementedError(f"{type(self).__name__} must define weights(scores, counts)")


@dataclass(frozen=True, eq=False, repr=False)
class Softmax(Normalizer):
    """``exp(s_ij) / Σ_j exp(s_ij)``."""

    tileable: ClassVar[bool] = True

    def weights(self, scores: Tensor, counts: Tensor) -> Tensor:
        allowed = scores > -torch.inf
        # A row of nothing but −inf is made finite first: its softmax and gradient would be NaN.
        finite = scores.masked_fill(~allowed & ~allowed.any(-1, keepdim=True), 0.0)
        return torch.softmax(finite, dim=-1).masked_fill(~allowed, 0.0)


class Pointwise(Normalizer):
    """A normalizer whose weight depends on its own score and the number of keys only."""

    tileable: ClassVar[bool] = True

    def slope(self, weights: Float[Tensor, ...], counts: Int[Tensor, ...]) -> Float[Tensor, ...]:
        """Derivative of a weight by its score, written in terms of the weight."""
        raise NotImplementedError(f"{type(self).__name__} must define slope(weights, counts)")


@dataclass(frozen=True, eq=False, repr=False)
class Sigmoid(Pointwise):
    """``σ(s_ij + b)`` with ``b = −log n`` ("Theory, Analysis, and Best Practices for Sigmoid Self-Attention", 2024,
    arXiv 2409.04431).

    n is the number of keys the query may attend: the paper's sequence length where nothing is masked, and what keeps a
    padded, packed or step-by-step call equal to the plain one. A `bias` fixes b for all rows instead.
    """

    bias: float | None = None

    def weights(self, scores: Tensor, counts: Tensor) -> Tensor:
        bias = -counts.clamp(min=1).to(scores.dtype).log() if self.bias is None else self.bias
        return torch.sigmoid(scores + bias)

    def slope(self, weights: Tensor, counts: Tensor) -> Tensor:
        return weights * (1 - weights)


@dataclass(frozen=True, eq=False, repr=False)
class Relu(Pointwise):
    """``max(s_ij, 0) / n`` with n the number of keys the query may attend ("Replacing softmax with ReLU in Vision
    Transformers", 2023, arXiv 2309.08586)."""

    def weights(self, scores: Tensor, counts: Tensor) -> Tensor:
        return torch.relu(scores) / counts.clamp(min=1)

    def slope(self, weights: Tensor, counts: Tensor) -> Tensor:
        return (weights > 0).to(weights.dtype) / counts.clamp(min=1)


@dataclass(frozen=True, eq=False, repr=False)
class SoftplusL1(Normalizer):
    """``a_ij = softplus(s_ij log n) / Σ_j softplus(s_ij log n)``, re-weighted: ``relu(n a_ij − o)^p / (Σ_j … + ε)``.

    From "Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models", 2025, arXiv
    2501.13428. n is the number of keys the query may attend; o is 1, and 0 where n is at most 3. With ``power=None``
    the weights are a. Both divisions are done in logarithms, so that any score and any n^p is finite. ε = 1e-12 settles
    what the formula leaves open: a row of equal scores has no weight above the mean, and gives zeros.
    """

    power: float | None = 15.0
    tileable: ClassVar[bool] = True
    FREE_ROWS: ClassVar[int] = 3
    LOG_EPSILON: ClassVar[float] = math.log(1e-12)

    def __post_init__(self) -> None:
        require(
            self.power is None or self.power >= 1,
            "SoftplusL1",
            f"power {self.power}",
            "give at least 1, or None for no re-weighting",
        )

    def weights(self, scores: Tensor, counts: Tensor) -> Tensor:
        logs = self.logs(scores, counts)
        shares = Softmax().weights(logs, counts)
        if self.power is None:
            return shares
        excess = shares * counts - self.offset(counts)
        above = excess > 0
        logs = (self.power * excess.masked_fill(~above, 1.0).log()).masked_fill(~above, -torch.inf)
        return torch.softmax(F.pad(logs, (0, 1), value=self.LOG_EPSILON), -1)[..., :-1]

    def logs(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Logarithm of the softplus of the scaled score, −inf where the score is."""
        allowed = scores > -torch.inf
        scaled = scores.masked_fill(~allowed, 0.0) * self.scale(scores, counts)
        far = scaled < -20.0
        near = torch.logaddexp(scaled.clamp(min=-20.0), torch.zeros_like(scaled)).log()
        return torch.where(far, scaled - scaled.clamp(max=-20.0).exp() / 2, near).masked_fill(~allowed, -torch.inf)

    def slope(self, scores: Tensor, logs: Tensor, counts: Tensor) -> Tensor:
        """Derivative of `logs` by the score; 0 where the score is −inf."""
        scale = self.scale(scores, counts)
        allowed = scores > -torch.inf
        slope = (F.logsigmoid(scores.masked_fill(~allowed, 0.0) * scale) - logs).exp()
        return slope.masked_fill(~allowed, 0.0) * scale

    def sharpened(self, log_shares: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of a re-weighted share, and of its derivative by the logarithm of the share."""
        if self.power is None:
            return log_shares, log_shares
        above_mean = log_shares + counts.clamp(min=1).to(log_shares.dtype).log()
        excess = (above_mean.exp() - self.offset(counts)).clamp(min=0.0)
        log_excess, none = excess.log(), excess == 0
        steepness = math.log(self.power) + above_mean + (self.power - 1) * log_excess
        return self.power * log_excess, steepness.masked_fill(none, -torch.inf)

    def scale(self, scores: Tensor, counts: Tensor) -> Tensor:
        """``log n``, which keeps the entropy of a row the same at any length."""
        return counts.clamp(min=1).to(scores.dtype).log()

    def offset(self, counts: Tensor) -> Tensor:
        """o: 1, or 0 for the rows too short to have weights above their mean to choose from."""
        return (counts > self.FREE_ROWS).to(counts.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class LayerNormScores(Normalizer):
    """``gain_h (s_ij − mean_j) / (std_j + ε) + bias_h`` over the keys a query may attend, which needs the whole row.

    From "Normalized Attention Without Probability Cage", 2020, arXiv 2005.09561. Weights may have any sign and sum;
    without gain and bias those of a row sum to zero.
    """

    gain: Float[Tensor, " heads"] | None = None
    bias: Float[Tensor, " heads"] | None = None
    epsilon: float = 1e-3

    def weights(self, scores: Tensor, counts: Tensor) -> Tensor:
        allowed, counts = scores > -torch.inf, counts.clamp(min=1)
        scores = scores.masked_fill(~allowed, 0.0)
        centred = (scores - scores.sum(-1, keepdim=True) / counts).masked_fill(~allowed, 0.0)
        # Not the root of a variance: where all scores are equal its gradient would be NaN.
        deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / counts.to(scores.dtype).sqrt()
        weights = centred / (deviation + self.epsilon)
        if self.gain is not None:
            weights = weights * self.gain.to(weights.dtype)[:, None, None]
        if self.bias is not None:
            weights = weights + self.bias.to(weights.dtype)[:, None, None]
        return weights.masked_fill(~allowed, 0.0)


@dataclass(frozen=True, eq=False, repr=False)
class ReversedSoftmax(Normalizer):
    """``exp(s_ij) / Σ_i exp(s_ij)``: queries compete for each key. A key that no query may attend gives a column of 0.

    With `epsilon` every row is then divided by its sum, ``(w_ij + ε) / Σ_j (w_ij + ε)`` over the keys it may attend, as
    slots read their inputs ("Object-Centric Learning with Slot Attention", 2020, arXiv 2006.15055). A weight depends on
    all queries: not for decoding step by step, and a causal mask does not keep later queries out.
    """

    epsilon: float | None = None

    def weights(self, scores: Tensor, counts: Tensor) -> Tensor:
        shares = Softmax().weights(scores.mT, counts).mT
        if self.epsilon is None:
            return shares
        shares = (shares + self.epsilon).masked_fill(scores == -torch.inf, 0.0)
        total = shares.sum(-1, keepdim=True)
        return shares / total.masked_fill(total == 0, 1.0)


_BY_NAME = {
    "softmax": Softmax(),
    "sigmoid": Sigmoid(),
    "relu": Relu(),
    "softplus_l1": SoftplusL1(),
    "layer_norm_scores": LayerNormScores(),
    "reversed": ReversedSoftmax(),
}


def normalizer_of(normalizer: str | Normalizer) -> Normalizer:
    """The normalizer itself, or the default one of that name."""
    if isinstance(normalizer, Normalizer):
        return normalizer
    one_of("attention", "normalizer", normalizer, _BY_NAME)
    return _BY_NAME[normalizer]
