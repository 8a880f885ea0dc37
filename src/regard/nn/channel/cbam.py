"""Convolutional block attention. "CBAM: Convolutional Block Attention Module", Woo et al., 2018, arXiv 1807.06521.

    M_c(F)  = σ(MLP(AvgPool(F)) + MLP(MaxPool(F)))          pooled over positions; MLP: C → C/r → C with a ReLU
    F'      = M_c(F) ⊗ F
    M_s(F') = σ(BN(f^{k×k}([AvgPool(F'); MaxPool(F')])))    pooled over channels; f: a convolution of the two pools
    F''     = M_s(F') ⊗ F'

Cost: time O(n (C + k²) + C²/r), memory O(n C) for F'; 2C²/r + C/r + C + 2k² + 2 parameters.

Differences: none from the authors' code, which has what the paper's equations leave out: biases in the MLP (the paper's
28.09 M parameters of a ResNet-50 count them) and the batch norm BN. It stacks the spatial pools as [MaxPool; AvgPool];
exchange the two input channels of f to load its weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalogue import Contract, OptionSet, Taxonomy, register
from regard.nn.mechanism import Mechanism
from regard.ops.checks import require

KERNEL_SIZE, MOMENTUM = 7, 0.01


@register(
    "cbam",
    paper="cbam",
    taxonomy=Taxonomy(representations="multi-dimensional"),
    contract=Contract(
        input="feature_map",
        time="n*(d + kernel_size**2) + d*d/reduction",
        memory="n*d",
        minimum={"dim": 16, "length": 1},
        options=(
            OptionSet({"reduction": 4, "kernel_size": 3}, {"minimum": {"dim": 4, "length": 1}}),
            OptionSet({"spatial": False}, {"time": "n*d + d*d/reduction", "permutation": "equivariant"}),
        ),
    ),
)
class CBAM(Mechanism):
    """A gate per channel, then a gate per position.

    Args:
        dim: number of channels.
        reduction: the ratio r by which the hidden layer of the MLP is narrower.
        kernel_size: side of the convolution in the spatial gate, an odd number.
        spatial: whether there is a spatial gate.
    """

    def __init__(
        self,
        dim: int,
        *,
        reduction: int = 16,
        kernel_size: int = KERNEL_SIZE,
        spatial: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(dim > 0, self._name, f"dim {dim}", "give a positive number of channels")
        require(
            0 < reduction <= dim,
            self._name,
            f"reduction {reduction} leaves no hidden channel of dim {dim}",
            f"use one from 1 to {dim}",
        )
        require(
            kernel_size > 0 and kernel_size % 2 == 1,
            self._name,
            f"kernel_size {kernel_size} is not odd and positive",
            "use an odd one; the paper compares 3 and 7",
        )
        require(
            spatial or kernel_size == KERNEL_SIZE,
            self._name,
            f"kernel_size {kernel_size} with spatial=False, which has no convolution",
            "leave kernel_size out",
        )
        factory = {"device": device, "dtype": dtype}
        self.dim, self.spatial = dim, spatial
        hidden = dim // reduction
        self.shared = nn.Sequential(nn.Linear(dim, hidden, **factory), nn.ReLU(), nn.Linear(hidden, dim, **factory))
        if spatial:
            self.convolution = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False, **factory)
            self.norm = nn.BatchNorm2d(1, momentum=MOMENTUM, **factory)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """The feature map times its channel gate, and that times its own spatial gate."""
        self.check_shape(x, "(batch, dim, height, width)", 4)
        self.check_width(x, self.dim, axis=1)
        x = x * self.channel_gate(x)
        return x * self.spatial_gate(x) if self.spatial else x

    def channel_gate(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim 1 1"]:
        """M_c, between 0 and 1."""
        scores = self.shared(x.mean((2, 3))) + self.shared(x.amax((2, 3)))
        return torch.sigmoid(scores)[..., None, None]

    def spatial_gate(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch 1 height width"]:
        """M_s of a map already gated by channel, between 0 and 1."""
        pooled = torch.stack((x.mean(1), x.amax(1)), dim=1)
        return torch.sigmoid(self.norm(self.convolution(pooled)))
