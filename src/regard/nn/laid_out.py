"""Mechanisms of one mathematics for tokens in a row and for images, with or without a class token."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from regard.nn.mechanism import Mechanism
from regard.ops.checks import require
from regard.ops.masks import Padding


class LaidOut(Mechanism, ABC):
    """What looks at where its tokens lie. A mechanism of it defines `attend` and is also one of the two below."""

    dim: int
    class_token: bool
    """Whether a class token stands before the others."""

    @abstractmethod
    def attend(
        self, x: Float[Tensor, "batch length dim"], grid: tuple[int, ...], mask: Padding | None
    ) -> Float[Tensor, "batch length dim"]:
        """Attention of the flattened grid, with the class token before it if there is one, to itself."""


class OverTokens(LaidOut):
    """Tokens (batch, length, dim) in a row; the first may be a class token."""

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Tensor | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself; `mask` may be a ``Padding``. Raises ValueError for anything else."""
        self.check_tokens(x, context, mask, positions, takes_positions=False)
        self.check_width(x, self.dim)
        return self.attend(x, (x.shape[1] - self.class_token,), mask)


class OverImage(LaidOut):
    """Images (batch, height, width, dim), and perhaps a class token beside each."""

    def forward(
        self,
        x: Float[Tensor, "batch height width dim"],
        *,
        class_token: Float[Tensor, "batch dim"] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from the grid to itself. Built with ``class_token=True`` it takes one and returns grid and token."""
        self.check_shape(x, "(batch, height, width, dim)", 4)
        self.check_width(x, self.dim)
        require(
            (class_token is not None) is self.class_token,
            self._name,
            f"class_token {'missing' if class_token is None else 'given'}, built with class_token={self.class_token}",
            "give one exactly if built for one",
        )
        grid = (x.shape[1], x.shape[2])
        tokens = x.flatten(1, 2)
        if class_token is None:
            return self.attend(tokens, grid, None).unflatten(1, grid)
        self.check_shape(class_token, "(batch, dim)", 2, name="class_token")
        self.check_width(class_token, self.dim, name="class_token")
        out = self.attend(torch.cat([class_token[:, None], tokens], dim=1), grid, None)
        return out[:, 1:].unflatten(1, grid), out[:, 0]
