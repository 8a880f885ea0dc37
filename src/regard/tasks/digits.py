"""Handwritten digits: scikit-learn's 1797 images of 8×8 pixels, each pixel a position ("Optical Recognition of
Handwritten Digits", Alpaydin and Kaynak, 1998).
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.ops.checks import one_of

GRID, CLASSES = (8, 8), 10
HELD_OUT = 4
"""One image in this many is held out."""


@cache
def images(split: Literal["train", "test"]) -> tuple[Float[Tensor, "count 8 8 1"], Int[Tensor, "count"]]:
    """Pixels from 0 to 1 and the digits they show. Needs scikit-learn."""
    from sklearn.datasets import load_digits

    one_of("digits", "split", split, ("train", "test"))
    pixels, shown = map(torch.from_numpy, load_digits(return_X_y=True))
    held_out = torch.arange(len(shown)) % HELD_OUT == 0
    chosen = held_out if split == "test" else ~held_out
    return pixels.float().view(-1, *GRID, 1)[chosen] / 16, shown.long()[chosen]
