"""Wrong numbers: gradients, types, extremes, layouts, memory that was never written."""

from __future__ import annotations

from typing import Any

import torch
from correct import Correct
from torch import Tensor, nn

from broken.declaring import caught_by
from regard.ops.masks import Mask


@caught_by("every_parameter_learns")
class DeadParameter(Correct):
    """A parameter nobody uses."""

    def extend(self, **factory: Any) -> None:
        self.temperature = nn.Parameter(torch.ones(self.heads, **factory))


@caught_by("every_parameter_learns")
class BiasWithoutEffect(Correct):
    """Adds to all keys what the softmax takes away again: the gradient is roundoff, but not zero."""

    def extend(self, **factory: Any) -> None:
        self.key_bias = nn.Parameter(torch.ones(self.dim // self.heads, **factory))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x)
        return query, key + self.key_bias, value


@caught_by("every_parameter_learns", frozen=("output.bias",))
class FrozenInNameOnly(Correct):
    """Declares a parameter frozen that learns."""


@caught_by("every_input_matters", "gradients_are_right", "later_tokens_are_seen")
class CutsTheGraph(Correct):
    """Detaches its input."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x.detach())


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


@caught_by("gradients_are_right")
class WrongBackward(Correct):
    """A backward of its own that is off by a factor."""

    def combine(self, mixed: Tensor) -> Tensor:
        return super().combine(_HalfGradient.apply(mixed))


@caught_by("gradients_stand_alone")
class NeedsTheInputsGradient(Correct):
    """Records nothing for its projections where x asks for no gradient."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x)
        return (query, key, value) if x.requires_grad else (query.detach(), key.detach(), value.detach())


@caught_by("output_has_shape_and_dtype_of_x")
class ReturnsFloat32(Correct):
    """Half types come back as float32."""

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None) -> Tensor:
        out = super().forward(x, context, mask=mask)
        return out.float() if x.dtype == torch.bfloat16 else out


@caught_by("types_agree")
class ComputesInHalf(Correct):
    """Rounds float32 to bfloat16 inside."""

    def combine(self, mixed: Tensor) -> Tensor:
        return super().combine(mixed.bfloat16().to(mixed.dtype) if mixed.dtype == torch.float32 else mixed)


@caught_by("types_agree", steep=True)
class ComputesInHalfAndSaysItIsSteep(ComputesInHalf):
    """What rounding moves is measured, not taken for granted."""


@caught_by("extreme_inputs_stay_finite")
class OverflowsExp(Correct):
    """A softmax without the maximum taken away."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        weights = (query @ key.mT * query.shape[-1] ** -0.5).exp()
        return weights @ value / weights.sum(-1, keepdim=True)


@caught_by("extreme_inputs_stay_finite")
class RootOfZero(Correct):
    """Divides by a norm whose gradient at zero is not a number."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x / (x.square().sum(-1, keepdim=True).sqrt() + 1e-6))


@caught_by("smallest_sizes_work")
class DeviationOfOneToken(Correct):
    """Divides by the standard deviation over the tokens, which one token does not have."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        squares = (x - x.mean(1, keepdim=True)).square().sum(1, keepdim=True)
        return super().project(x / (squares / (x.shape[1] - 1) + 1e-6).sqrt())


@caught_by("memory_layout_is_irrelevant")
class ReadsRawMemory(Correct):
    """Takes it for granted that x is contiguous."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, dim = x.shape
        return super().project(x.as_strided((batch, length, dim), (length * dim, dim, 1)))


@caught_by("lengths_may_change")
class RemembersItsFirstLength(Correct):
    """Caches a constant of the first length it sees."""

    first = 0

    def combine(self, mixed: Tensor) -> Tensor:
        self.first = self.first or mixed.shape[2]
        return super().combine(mixed / self.first)


@caught_by("no_uninitialised_memory_is_read")
class ReadsUninitialisedMemory(Correct):
    """Multiplies by zero what it never wrote."""

    def combine(self, mixed: Tensor) -> Tensor:
        return super().combine(mixed + 0.0 * torch.empty_like(mixed))


@caught_by("dropout_acts_in_training")
class DropoutWithoutEffect(Correct):
    """Takes dropout and forgets it."""

    def extend(self, **factory: Any) -> None:
        self.dropout = 0.0


@caught_by("map_times_value_is_output", "map_is_a_distribution")
class MapBeforeTheSoftmax(Correct):
    """The map holds scores."""

    def attention_map(self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None) -> Any:
        weights, value = super().attention_map(x, context, mask=mask)
        return weights.clamp(min=1e-30).log(), value


@caught_by("map_times_value_is_output")
class MapOfAnotherScale(Correct):
    """The map is sharper than what forward uses."""

    def attention_map(self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None) -> Any:
        weights, value = super().attention_map(x, context, mask=mask)
        sharper = weights.square()
        return sharper / sharper.sum(-1, keepdim=True).clamp(min=1e-30), value
