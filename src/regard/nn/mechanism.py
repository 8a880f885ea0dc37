"""What every mechanism of floor 2 is: a module with a card, which takes what its contract declares and nothing else."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from regard.catalogue import Card
from regard.ops.checks import require
from regard.ops.masks import Mask


class Mechanism(nn.Module):
    """Base of registered modules; holds the checks of `forward`'s arguments."""

    card: ClassVar[Card]

    @property
    def _name(self) -> str:
        return type(self).__name__

    def check_shape(self, x: Tensor, expected: str, axes: int | tuple[int, ...], *, name: str = "x") -> None:
        """Raise ValueError unless `x` is floating with one of these numbers of axes."""
        allowed = (axes,) if isinstance(axes, int) else axes
        require(
            x.ndim in allowed and x.is_floating_point(),
            self._name,
            f"{name} of shape {tuple(x.shape)} and dtype {x.dtype}",
            f"give a floating tensor {expected}",
        )

    def check_width(self, x: Tensor, width: int, *, name: str = "x", axis: int = -1) -> None:
        """Raise ValueError unless axis `axis` of `x` is `width`."""
        require(
            x.shape[axis] == width,
            self._name,
            lambda: f"{name} has width {x.shape[axis]} (shape {tuple(x.shape)}), built for {width}",
            lambda: f"give width {width}, or build for {x.shape[axis]}",
        )

    def check_tokens(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Mask | None,
        positions: Tensor | None,
        *,
        takes_positions: bool,
    ) -> None:
        """Raise ValueError for anything about token arguments that the contract does not declare."""
        contract = self.card.contract
        self.check_shape(x, "(batch, length, dim)", 3)
        require(x.shape[1] > 0, self._name, f"x of shape {tuple(x.shape)} has no tokens", "give at least one")
        if context is not None:
            require(
                any(pattern.endswith("cross") for pattern in contract.patterns),
                self._name,
                f"context of shape {tuple(context.shape)} given to a self-attention",
                "leave context out or use a mechanism with a cross pattern",
            )
            self.check_shape(context, "(batch, context length, width)", 3, name="context")
            require(
                context.shape[0] == x.shape[0],
                self._name,
                lambda: f"context has batch {context.shape[0]}, x {x.shape[0]}",
                "give one context per sample",
            )
        if mask is not None:
            self._check_mask(mask)
        if positions is not None:
            require(
                takes_positions,
                self._name,
                f"positions of shape {tuple(positions.shape)} mean nothing here",
                "leave positions out or build with an option that uses them, where there is one",
            )
            require(
                tuple(positions.shape) in ((x.shape[1],), tuple(x.shape[:2])),
                self._name,
                f"positions of shape {tuple(positions.shape)} for x of shape {tuple(x.shape)}",
                lambda: f"give ({x.shape[1]},) or {tuple(x.shape[:2])}",
            )

    def check_step(self, x: Tensor, width: int, batch: int) -> None:
        """Raise ValueError unless this is causal and `x` holds further tokens for a state of this batch."""
        causal = getattr(self, "causal", True)
        require(causal, self._name, "step with causal=False", "build with causal=True to decode step by step")
        self.check_tokens(x, None, None, None, takes_positions=False)
        self.check_width(x, width)
        require(
            x.shape[0] == batch,
            self._name,
            lambda: f"x has batch {x.shape[0]} (shape {tuple(x.shape)}), the state {batch}",
            "go on with the batch the state was made for",
        )

    def _check_mask(self, mask: Mask) -> None:
        contract = self.card.contract
        require(
            isinstance(mask, Mask),
            self._name,
            f"mask is a {type(mask).__name__}",
            "give a mask of regard.ops.masks; a boolean tensor goes in as Dense(tensor), True = may attend",
        )
        taken = {"Padding": contract.padding, "Segments": contract.packed}
        require(
            contract.any_mask or taken.get(type(mask).__name__, False),
            self._name,
            f"mask {type(mask).__name__} is not one it takes",
            f"it takes {' and '.join(name for name, declared in taken.items() if declared) or 'no mask'}",
        )


def head_width(owner: str, dim: int, heads: int, head_dim: int | None) -> int:
    """The width of a head: `head_dim`, or dim / heads, which must divide."""
    require(dim > 0, owner, f"dim {dim}", "give a positive width")
    require(heads > 0, owner, f"heads {heads}", "give a positive number")
    if head_dim is None:
        require(
            dim % heads == 0,
            owner,
            f"heads {heads} does not divide dim {dim}",
            "change either, or pass head_dim",
        )
        return dim // heads
    require(head_dim > 0, owner, f"head_dim {head_dim}", "give a positive width")
    return head_dim
