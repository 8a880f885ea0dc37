"""Normalizers: how a row of scores becomes a row of weights.

A normalizer computes whole rows (`weights`, the definition) and, if it is `tileable`, one tile at a time. `Softmax` is
tileable by its running maximum and sum, which the engines carry. A `Pointwise` one maps every score alone, so its
backward needs no statistic of the row either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.ops.checks import one_of
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


_BY_NAME = {"softmax": Softmax(), "sigmoid": Sigmoid(), "relu": Relu()}


def normalizer_of(normalizer: str | Normalizer) -> Normalizer:
    """The normalizer itself, or the default one of that name."""
    if isinstance(normalizer, Normalizer):
        return normalizer
    one_of("attention", "normalizer", normalizer, _BY_NAME)
    return _BY_NAME[normalizer]
