"""Efficient channel attention. "ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks", Wang et
al., 2019, arXiv 1910.03151.

    ω = σ(C1D_k(GAP(X)))        GAP: mean over the positions of each of the C channels
    y = ω ⊙ X                   C1D_k: convolution of size k along the channels, one kernel for all, no bias
    k = ψ(C) = |log₂(C)/γ + b/γ|_odd,  the nearest odd number, with γ = 2 and b = 1

Cost: time O(n C), memory O(n C) for the output and O(C) beside it; k parameters.

Differences: none. A tie between two odd numbers (C = 128: 4) goes up, as in the authors' code. Their released networks
choose k by hand: ResNet-50 has 3, 5, 5, 7 for 256 to 2048 channels, where ψ gives 5, 5, 5, 7; `kernel_size` takes it.
"""

from __future__ import annotations

from math import floor, log2

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalogue import Contract, OptionSet, Taxonomy, register
from regard.nn.mechanism import Mechanism
from regard.ops.checks import require

GAMMA, OFFSET = 2, 1


def adaptive_kernel_size(dim: int) -> int:
    """ψ(C): the odd number nearest to ``(log₂ dim + 1) / 2``."""
    return 2 * floor((log2(dim) + OFFSET) / GAMMA / 2) + 1


@register(
    "eca",
    paper="eca",
    taxonomy=Taxonomy(representations="multi-dimensional"),
    contract=Contract(
        input="feature_map",
        time="n*d",
        memory="n*d",
        permutation="equivariant",
        minimum={"dim": 1, "length": 1},
        options=(OptionSet({"kernel_size": 9}),),
    ),
)
class ECA(Mechanism):
    """Every channel is gated by its own mean and those of its neighbours.

    Args:
        dim: number of channels.
        kernel_size: how many neighbouring channels, an odd number, decide on a channel; `adaptive_kernel_size` of
            `dim` by default.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(dim > 0, self._name, f"dim {dim}", "give a positive number of channels")
        self.dim = dim
        self.kernel_size = adaptive_kernel_size(dim) if kernel_size is None else kernel_size
        require(
            self.kernel_size > 0 and self.kernel_size % 2 == 1,
            self._name,
            f"kernel_size {self.kernel_size} is not odd and positive",
            f"use an odd one, or leave it out for {adaptive_kernel_size(dim)}",
        )
        self.convolution = nn.Conv1d(
            1, 1, self.kernel_size, padding=self.kernel_size // 2, bias=False, device=device, dtype=dtype
        )

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """The feature map with every channel times its gate."""
        self.check_shape(x, "(batch, dim, height, width)", 4)
        self.check_width(x, self.dim, axis=1)
        return x * self.gate(x)

    def gate(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim 1 1"]:
        """ω, between 0 and 1."""
        pooled = x.mean((2, 3))
        return torch.sigmoid(self.convolution(pooled.unsqueeze(1))).mT.unsqueeze(-1)
