"""Images of several coloured shapes, to be taken apart without being told what an object is, and the score for it.

Squares, discs and triangles of a random size, place and colour lie on a dark ground, later ones over earlier ones. The
score is that of "Object-Centric Learning with Slot Attention", Locatello et al., 2020, arXiv 2006.15055: the adjusted
Rand index of the pixels of objects, each pixel given to the slot that paints it most; 0 is chance, 1 is perfect.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.ops.checks import require

GROUND = 0
"""The id of pixels that belong to no object."""

COLOURS = torch.tensor(
    [[1, 0.2, 0.2], [0.2, 1, 0.2], [0.3, 0.4, 1], [1, 1, 0.2], [1, 0.3, 1], [0.2, 1, 1], [1, 0.6, 0.2], [0.9, 0.9, 0.9]]
)
SMALLEST, LARGEST = 0.2, 0.36
"""Sides of a shape, as parts of the side of the image."""


@dataclass(frozen=True)
class Scenes:
    """Square images of `size` pixels with `fewest` to `most` objects, of which some may be partly covered."""

    size: int = 32
    fewest: int = 2
    most: int = 3

    def __post_init__(self) -> None:
        require(self.size >= 8, "Scenes", f"size {self.size}", "give at least 8 pixels")
        require(
            1 <= self.fewest <= self.most,
            "Scenes",
            f"{self.fewest} to {self.most} objects",
            "give at least one, and at most no fewer than at least",
        )

    def batch(
        self, count: int, random: torch.Generator
    ) -> tuple[Float[Tensor, "count 3 size size"], Int[Tensor, "count size size"]]:
        """`count` images, with values from −1 to 1, and the object that each pixel shows: 1, 2, … or `GROUND`."""

        def uniform() -> Float[Tensor, "count most 1 1"]:
            return torch.rand(count, self.most, 1, 1, generator=random)

        side = SMALLEST + (LARGEST - SMALLEST) * uniform()
        places = (torch.arange(self.size) + 0.5) / self.size
        down = places[:, None] - side / 2 - uniform() * (1 - side)
        right = places - side / 2 - uniform() * (1 - side)
        inside = torch.stack(
            [
                torch.maximum(down.abs(), right.abs()) <= side / 2,
                down.square() + right.square() <= (side / 2).square(),
                (down <= side / 2) & (2 * right.abs() <= down + side / 2),
            ]
        )
        shape = torch.randint(len(inside), (count, self.most), generator=random)
        shown = inside.gather(0, shape[None, ..., None, None].expand(1, *inside.shape[1:]))[0]
        number = torch.randint(self.fewest, self.most + 1, (count, 1), generator=random)
        order = torch.arange(1, self.most + 1)
        ids = (shown * (order * (order <= number))[..., None, None]).amax(1)

        colour = COLOURS[torch.randint(len(COLOURS), (count, self.most), generator=random)]
        palette = torch.cat([torch.zeros(count, 1, 3), colour], dim=1)
        pixels = palette.gather(1, ids.flatten(1)[..., None].expand(-1, -1, 3)).mT.unflatten(2, ids.shape[1:])
        return 2 * pixels - 1, ids


def foreground_ari(true: Int[Tensor, "count height width"], found: Int[Tensor, "count height width"]) -> list[float]:
    """The adjusted Rand index of each image's pixels that are not `GROUND`. Needs scikit-learn."""
    from sklearn.metrics import adjusted_rand_score

    require(
        true.shape == found.shape,
        "foreground_ari",
        lambda: f"found of shape {tuple(found.shape)} for true of shape {tuple(true.shape)}",
        "give an id per pixel",
    )
    return [
        float(adjusted_rand_score(ids[ids != GROUND].numpy(), guess[ids != GROUND].numpy()))
        for ids, guess in zip(true.cpu(), found.cpu(), strict=True)
    ]
