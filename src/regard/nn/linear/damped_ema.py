"""The damped exponential moving average of "Mega: Moving Average Equipped Gated Attention", Ma et al., 2022, arXiv
2209.10655, with which Mega and SeqBoat mix tokens before they attend.

    h_t = p β x_t + q h_{t−1},   q = 1 − p a,   p = σ(δ), a = σ(α)        e numbers for each feature of a token
    y_t = Σ_e γ_e h_te / √e + ω x_t

and without causality a second such average from the end to the beginning, which counts the token itself once more.
Unrolled it is a convolution with k_l = Σ_e γ_e p_e β_e q_e^l / √e.

Cost: time O(n d e + n d log n), memory O(n d + √n d e); the decoding state is d e numbers. Differences: none.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.ops.long_convolution import long_convolution, toeplitz_product
from regard.ops.precision import statistics_dtype, without_autocast


class DampedEMA(nn.Module):
    """A moving average of every feature in several decays, as a convolution and as a recurrence."""

    def __init__(
        self,
        dim: int,
        *,
        size: int,
        causal: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.size, self.causal = dim, size, causal
        factory = {"device": device, "dtype": dtype}
        rows = dim if causal else 2 * dim
        self.delta, self.alpha, self.beta, self.gamma = (
            nn.Parameter(torch.empty(rows, size, **factory)) for _ in range(4)
        )
        self.omega = nn.Parameter(torch.empty(dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal values cut off at 2σ; β about 1 and −1 in turn."""
        parameters = (self.delta, self.alpha, self.beta, self.gamma, self.omega)
        for parameter, std in zip(parameters, (0.2, 0.2, 0.02, 1.0, 1.0), strict=True):
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        with torch.no_grad():
            self.beta[:, ::2] += 1
            self.beta[:, 1::2] -= 1

    def forward(
        self, x: Float[Tensor, "batch length dim"], state: Float[Tensor, "batch dim size"] | None = None
    ) -> tuple[Float[Tensor, "batch length dim"], Tensor | None]:
        """The average at every token, and with a `state` (causal) the one after the last."""
        with without_autocast(x.device):
            entry, rate, exit = self._coefficients()
            ahead, within = _powers(rate, x.shape[1])
            kernel = _geometric(entry * exit, ahead, within, x.shape[1])
            if not self.causal:
                past, future = kernel.chunk(2)
                both = torch.cat([past[:, 1:].flip(-1), past[:, :1] + future[:, :1], future[:, 1:]], -1)
                return toeplitz_product(x.mT, both).mT + x * self.omega, None
            averaged = long_convolution(x.mT, kernel)
            if state is not None:
                decayed = rate.exp() * state
                averaged = averaged + _geometric(exit * decayed, ahead, within, x.shape[1]).to(x.dtype)
                state = (x.shape[1] * rate).exp() * state + entry * _accumulated(x.mT, ahead, within)
            return averaged.mT + x * self.omega, state

    def init_state(self, batch: int) -> Float[Tensor, "batch dim size"]:
        """The state before the first token: zeros, at least float32."""
        return self.omega.new_zeros(batch, self.dim, self.size, dtype=statistics_dtype(self.omega.dtype))

    def _coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """p β, log q and γ / √e, at least float32."""
        precise = statistics_dtype(self.delta.dtype)
        delta, alpha, beta, gamma = (
            parameter.to(precise) for parameter in (self.delta, self.alpha, self.beta, self.gamma)
        )
        share = delta.sigmoid()
        # Never 1, where q would be 0 and its logarithm infinite.
        lost = (share * alpha.sigmoid()).clamp(max=1 - torch.finfo(precise).eps)
        return share * beta, torch.log1p(-lost), gamma * self.size**-0.5


def _powers(rate: Float[Tensor, "rows size"], length: int) -> tuple[Tensor, Tensor]:
    """q^0, q^b, q^2b, … and q^0, …, q^(b−1) with b about √length: their products are all powers up to `length`."""
    block = math.isqrt(length - 1) + 1
    return tuple(
        (rate.unsqueeze(-1) * torch.arange(0, end, step, device=rate.device)).exp()
        for end, step in ((length, block), (block, 1))
    )  # pyright: ignore[reportReturnType] two of them


def _geometric(factor: Tensor, ahead: Tensor, within: Tensor, length: int) -> Float[Tensor, "*batch rows length"]:
    """``Σ_e factor_e q_e^l`` for l = 0 … length − 1."""
    return ((factor.unsqueeze(-1) * ahead).mT @ within).flatten(-2)[..., :length]


def _accumulated(x: Float[Tensor, "batch rows length"], ahead: Tensor, within: Tensor) -> Tensor:
    """``Σ_l q_e^(length − 1 − l) x_l``."""
    blocks, block = ahead.shape[-1], within.shape[-1]
    latest = F.pad(x.to(within.dtype).flip(-1), (0, blocks * block - x.shape[-1])).unflatten(-1, (blocks, block))
    return ((latest @ within.mT) * ahead.mT).sum(-2)
