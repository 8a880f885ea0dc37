"""Arguments taken that should be refused, abilities without a declaration and declarations without an ability."""

from __future__ import annotations

from typing import Any

import torch
from correct import CONTRACT, Correct, declares
from torch import Tensor, nn

from broken.declaring import caught_by
from regard.ops.masks import Mask


@caught_by("undeclared_masks_are_refused", "undeclared_methods_refuse", any_mask=False, step=False, state=None)
class TakesMoreThanItDeclares(Correct):
    """Takes every mask and declares two kinds; steps, and declares no step."""


@caught_by("declared_methods_exist")
class DeclaresMoreThanItHas(Correct):
    """Declares a map and has none."""

    attention_map: Any = None


@caught_by("formulas_can_be_evaluated", time="n*m*window*d")
class PricedInTheUnknown(Correct):
    """Declares a cost in an argument that it does not have."""


@caught_by("patterns_can_be_chosen")
class CannotChooseItsPattern(Correct):
    """Declares causal and noncausal patterns and has no argument for it."""

    def __init__(self, dim: int, *, heads: int = 4, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, heads=heads, device=device, dtype=dtype)


@caught_by("context_is_refused", "undeclared_patterns_are_refused")
class IgnoresTheContext(Correct):
    """Takes a context and attends to itself."""

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None) -> Tensor:
        return super().forward(x, None, mask=mask)


@caught_by("undeclared_patterns_are_refused", patterns=("noncausal self",), step=False, state=None)
class TakesCausalUndeclared(Correct):
    """Declares one pattern and can be built for another."""


@caught_by("bad_sizes_are_refused")
class RoundsHeadsDown(Correct):
    """Makes do with the heads that fit."""

    def __init__(
        self, dim: int, *, heads: int = 4, causal: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        while heads > 0 and dim % heads:
            heads -= 1
        super().__init__(dim, heads=heads, causal=causal, device=device, dtype=dtype)


class _Adapts(Correct):
    def adapt(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None) -> Tensor:
        return super().forward(self.adapt(x), context, mask=mask)


@caught_by("wrong_rank_is_refused")
class AddsABatchAxis(_Adapts):
    """Takes a single sample without a batch axis."""

    def adapt(self, x: Tensor) -> Tensor:
        return x[None] if x.ndim == 2 else x


@caught_by("wrong_width_is_refused")
class PadsTheWidth(_Adapts):
    """Makes every width fit."""

    def adapt(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, self.dim - x.shape[-1]))


@caught_by("integers_are_refused")
class ConvertsIntegers(_Adapts):
    """Takes indices for features."""

    def adapt(self, x: Tensor) -> Tensor:
        return x.to(self.qkv.weight.dtype) if x.dtype == torch.long else x


@caught_by("positions_are_heard", "misfit_positions_are_refused", positions=True)
class IgnoresPositions(Correct):
    """Declares positions and does nothing with them."""

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None, positions: Tensor | None = None
    ) -> Tensor:
        return super().forward(x, context, mask=mask)


class _Crosses(nn.Module):
    """Unchecked single-head cross-attention; without a context it attends to itself."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.value = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        return (x @ context.mT).softmax(-1) @ self.value(context)


declares(type(CONTRACT)(input="tokens", patterns=("noncausal cross",)))(_Crosses)


@caught_by("missing_context_is_refused")
class MakesUpItsContext(_Crosses):
    """Attends to itself where a context is missing."""


@caught_by("misfit_context_is_refused")
class FailsOnItsContext(_Crosses):
    """Leaves it to a matrix product to complain about a context that does not fit."""
