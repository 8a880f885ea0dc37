"""An autoencoder that takes images apart. "Object-Centric Learning with Slot Attention", Locatello et al., 2020, arXiv
2006.15055.

    inputs       = MLP(LN(CNN(image) + position))              every place of the grid an input
    slots        = SlotAttention(first slots, inputs)
    part_i, α_i  = CNN(slot_i everywhere + position)           spatial broadcast decoder, the same for all slots
    image        = Σ_i softmax over slots of α_i · part_i

Trained by nothing but the squared error of the image, slots come to hold an object each. A position is a linear map of
the distances from the four borders ("soft position embedding").

The paper's model of CLEVR is the default, for images of 128 × 128: the decoder starts from 8 × 8 and doubles four
times. It is trained by Adam with a learning rate of 4e-4, warmed up and decayed, on batches of 64 images from −1 to 1.

Differences: none. Convolutions pad as in the authors' code, where a transposed one that doubles cuts one row and column
off at the start and two at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.nn.sets.slot_attention import InitialSlots, SlotAttention
from regard.ops.checks import require

COLOURS, KERNEL = 3, 5


class Discovered(NamedTuple):
    """An image and what it was put together from."""

    image: Float[Tensor, "batch 3 height width"]
    parts: Float[Tensor, "batch slots 3 height width"]
    masks: Float[Tensor, "batch slots height width"]
    slots: Float[Tensor, "batch slots dim"]

    @property
    def objects(self) -> Int[Tensor, "batch height width"]:
        """The slot that paints most of each pixel."""
        return self.masks.argmax(1)


class SoftPosition(nn.Module):
    """Adds a linear map of the distances from the four borders of a grid."""

    borders: Tensor

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        axes = (torch.linspace(0.0, 1.0, size, device=device, dtype=dtype) for size in grid)
        near = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        self.register_buffer("borders", torch.cat([near, 1 - near], dim=-1), persistent=False)
        self.linear = nn.Linear(4, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return x + self.linear(self.borders).movedim(-1, 0)


class Doubling(nn.ConvTranspose2d):
    """A transposed convolution with stride 2 whose output is twice as high and wide."""

    def __init__(self, features: int, out: int, **factory: torch.device | str | torch.dtype | None) -> None:
        super().__init__(features, out, KERNEL, stride=2, padding=1, **factory)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Float[Tensor, "batch features height width"]) -> Tensor:
        return super().forward(x)[..., :-1, :-1]


class ObjectDiscovery(nn.Module):
    """Images in; the same images out, as sums of parts that a slot each has painted.

    Args:
        size: height and width of the images, a multiple of ``2 ** doublings``.
        slots: number of slots, the ground's included.
        dim: width of a slot.
        width: features of all convolutions.
        iterations, implicit: those of `SlotAttention`.
        learned: that of `InitialSlots`.
        encoder_layers: number of 5 × 5 layers of the encoder.
        layers: number of 5 × 5 layers of the decoder, before its last layer.
        doublings: how many of these double the grid.
    """

    def __init__(
        self,
        size: int = 128,
        slots: int = 7,
        *,
        dim: int = 64,
        width: int = 64,
        iterations: int = 3,
        implicit: int = 0,
        learned: bool = False,
        encoder_layers: int = 4,
        layers: int = 5,
        doublings: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("width", width), ("encoder_layers", encoder_layers)):
            require(value > 0, "ObjectDiscovery", f"{name} {value}", "give a positive number")
        require(
            0 <= doublings <= layers,
            "ObjectDiscovery",
            f"doublings {doublings} among {layers} layers",
            "give from 0 to the number of layers",
        )
        require(
            size % 2**doublings == 0,
            "ObjectDiscovery",
            f"size {size} cannot be reached by {doublings} doublings",
            f"give a multiple of {2**doublings}",
        )
        self.size, self.start = size, size // 2**doublings
        factory = {"device": device, "dtype": dtype}

        def convolution(features: int) -> nn.Module:
            return nn.Conv2d(features, width, KERNEL, padding=KERNEL // 2, **factory)

        def decoder_layer(index: int) -> nn.Module:
            features = width if index else dim
            if index < doublings:
                return Doubling(features, width, **factory)
            return nn.ConvTranspose2d(features, width, KERNEL, padding=KERNEL // 2, **factory)

        self.encoder = nn.ModuleList(convolution(width if index else COLOURS) for index in range(encoder_layers))
        self.encoder_position = SoftPosition(width, (size, size), **factory)
        self.inputs = nn.Sequential(
            nn.LayerNorm(width, **factory),
            nn.Linear(width, width, **factory),
            nn.ReLU(),
            nn.Linear(width, width, **factory),
        )
        self.first = InitialSlots(slots, dim, learned=learned, **factory)
        self.attention = SlotAttention(dim, context_dim=width, iterations=iterations, implicit=implicit, **factory)
        self.decoder_position = SoftPosition(dim, (self.start, self.start), **factory)
        self.decoder = nn.ModuleList(decoder_layer(index) for index in range(layers))
        self.paint = nn.ConvTranspose2d(width if layers else dim, COLOURS + 1, 3, padding=1, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform weights and zero biases, as in the authors' code."""
        for module in [*self.encoder, *self.inputs, *self.decoder, self.paint, *self._positions()]:
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        image: Float[Tensor, "batch 3 height width"],
        *,
        slots: Float[Tensor, "batch slots dim"] | None = None,
    ) -> Discovered:
        """Take images apart and put them together, from `slots` or from new ones of `first`."""
        inputs = self.encode(image)
        return self.decode(self.attention(self.first(len(image)) if slots is None else slots, inputs))

    def encode(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch places width"]:
        """What slots compete for: a vector for each pixel."""
        require(
            image.ndim == 4 and tuple(image.shape[1:]) == (COLOURS, self.size, self.size),
            "ObjectDiscovery",
            lambda: f"image of shape {tuple(image.shape)}",
            f"give (batch, {COLOURS}, {self.size}, {self.size})",
        )
        for layer in self.encoder:
            image = torch.relu(layer(image))
        return self.inputs(self.encoder_position(image).flatten(2).mT)

    def decode(self, slots: Float[Tensor, "batch slots dim"]) -> Discovered:
        """Paint every slot by itself and lay them over each other."""
        x = slots.flatten(0, 1)[..., None, None].expand(-1, -1, self.start, self.start)
        x = self.decoder_position(x)
        for layer in self.decoder:
            x = torch.relu(layer(x))
        painted = self.paint(x).unflatten(0, slots.shape[:2])
        parts, masks = painted[:, :, :-1], painted[:, :, -1].softmax(1)
        return Discovered((parts * masks[:, :, None]).sum(1), parts, masks, slots)

    def loss(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, ""]:
        """Mean squared error of the image."""
        return F.mse_loss(self(image).image, image)

    def _positions(self) -> list[nn.Module]:
        return [self.encoder_position.linear, self.decoder_position.linear]
