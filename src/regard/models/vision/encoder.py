"""A classifier of grids (images, volumes, sequences) around any mechanism.

    x = linear(features) + position;   per layer:  x += mechanism(norm(x));  x += mlp(norm(x))
    logits = head(mean over positions of norm(x))

Nothing but the mechanism lets positions know of each other before the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalogue import card
from regard.models.mixers import build_mixers, mix_grid
from regard.ops.checks import require


class EncoderBlock(nn.Module):
    """Pre-norm residual layers: mechanism, MLP."""

    def __init__(
        self, mixer: Any, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.mixer = mixer
        self.norms = nn.ModuleList(nn.RMSNorm(dim, **factory) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim, **factory), nn.GELU(), nn.Linear(4 * dim, dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        x = x + mix_grid(self.mixer, self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Encoder(nn.Module):
    """A grid of features in, logits of its class out.

    Args:
        grid: size of the grid, one number per axis.
        features: width of the input at each position.
        classes: number of classes.
        mechanism: key of a mechanism with the pattern "noncausal self", or of a gate over feature maps.
        dim, heads: width of a position and number of heads.
        layers: number of blocks.
        options: further arguments of the mechanism.
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        features: int,
        classes: int,
        mechanism: str,
        *,
        dim: int = 64,
        heads: int = 2,
        layers: int = 2,
        options: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("features", features), ("classes", classes), ("layers", layers)):
            require(value > 0, "Encoder", f"{name} {value}", "give a positive number")
        factory = {"device": device, "dtype": dtype}
        self.grid = tuple(grid)
        self.embedding = nn.Linear(features, dim, **factory)
        self.position = nn.Parameter(torch.empty(*self.grid, dim, **factory))
        nn.init.normal_(self.position)
        pattern = None if card(mechanism).contract.input == "feature_map" else "noncausal self"
        mixers = build_mixers(mechanism, dim, heads=heads, layers=layers, pattern=pattern, options=options, **factory)
        self.blocks = nn.ModuleList(EncoderBlock(mixer, dim, **factory) for mixer in mixers)
        self.norm = nn.RMSNorm(dim, **factory)
        self.head = nn.Linear(dim, classes, **factory)

    def forward(self, x: Float[Tensor, "batch *grid features"]) -> Float[Tensor, "batch classes"]:
        """Logits of the class of each grid."""
        require(
            tuple(x.shape[1:-1]) == self.grid,
            "Encoder",
            lambda: f"x of shape {tuple(x.shape)} for a grid {self.grid}",
            "give (batch, *grid, features)",
        )
        x = self.embedding(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).flatten(1, -2).mean(1))
