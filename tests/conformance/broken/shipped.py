"""One for each defect that a released library shipped."""

from __future__ import annotations

from typing import Any

import torch
from correct import Correct
from torch import Tensor
from torch.nn import functional as F

from broken.declaring import caught_by
from regard.ops.attention import attention
from regard.ops.masks import Causal, Mask


@caught_by("future_changes_nothing", "future_has_no_gradient")
class ProjectsOverTheFlattenedSample(Correct):
    """Takes away from the outputs their part along the values of the whole sample, later ones included."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        mixed = super().mix(query, key, value, mask)
        unit = F.normalize(value.flatten(1), dim=-1).view_as(value)
        return mixed - (mixed * unit).sum((1, 2, 3), keepdim=True) * unit


@caught_by("step_equals_forward", "segments_equal_forward")
class ForgetsShiftedTokens(Correct):
    """Adds to each token the one before it; a step knows of none before it."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x + F.pad(x, (0, 0, 1, -1)))


@caught_by("future_changes_nothing_with_padding", "future_has_no_gradient_with_padding")
class PaddingReplacesCausality(Correct):
    """Given a mask, drops its own."""

    def full_mask(self, mask: Mask | None) -> Mask | None:
        return super().full_mask(None) if mask is None else mask


@caught_by("eval_is_repeatable", "eval_leaves_global_state")
class DropsInEval(Correct):
    """Dropout does not listen to eval()."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        return attention(query, key, value, mask=mask, dropout=self.dropout)


@caught_by("padding_is_invisible", "mask_is_obeyed")
class IgnoresTheMaskInTraining(Correct):
    """The path taken for dropout knows of causality only."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        return super().mix(query, key, value, self.full_mask(None) if self.training and self.dropout else mask)


@caught_by("inference_mode_changes_nothing")
class IgnoresTheMaskWithoutGradients(Correct):
    """The fast path taken under no_grad knows of causality only."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        return super().mix(query, key, value, mask if torch.is_grad_enabled() else self.full_mask(None))


@caught_by("empty_sample_stays_finite", "mask_is_obeyed", "gradients_are_right_with_padding")
class NaNForEmptyRows(Correct):
    """A softmax over nothing but minus infinity."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if mask is not None:
            allowed = mask.dense(query.shape[2], key.shape[2], batch=query.shape[0], heads=query.shape[1])
            scores = scores.masked_fill(~allowed, -torch.inf)
        return scores.softmax(-1) @ value


@caught_by("map_times_value_is_output", "map_obeys_masks")
class EmptyMap(Correct):
    """The map is never built, because the path that forward takes does not need it."""

    def attention_map(self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None) -> Any:
        weights, value = super().attention_map(x, context, mask=mask)
        return torch.zeros_like(weights), value


@caught_by("inputs_stay_unchanged", "step_leaves_its_input")
class OverwritesItsInput(Correct):
    """Scales x in place, out of sight of autograd."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x.data.mul_(0.5)
        return super().project(x)


@caught_by("state_dict_restores_the_function", "tensors_are_parameters_or_buffers")
class KeepsItsBiasOutOfTheStateDict(Correct):
    """A bias kept as a plain tensor."""

    def extend(self, **factory: Any) -> None:
        self.offset = torch.randn(self.dim, **factory)

    def combine(self, mixed: Tensor) -> Tensor:
        return super().combine(mixed) + self.offset.to(mixed.dtype)


@caught_by("memory_grows_as_declared")
class BuildsScores(NaNForEmptyRows):
    """Declares n*d and builds n×n scores."""


@caught_by("memory_grows_as_declared")
class BuildsAMask(Correct):
    """Declares n*d and builds an n×n mask of one byte an entry, only to drop it again."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        Causal().dense(query.shape[2], key.shape[2]).contiguous()
        return super().mix(query, key, value, mask)


@caught_by("memory_grows_as_declared")
class BuildsAMaskBesideAWorkspace(Correct):
    """The same beside an engine whose tiles take more memory than the mask of a short sequence."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        Causal().dense(query.shape[2], key.shape[2]).contiguous()
        return attention(query, key, value, mask=mask, backend="tiled")


@caught_by("unknown_arguments_are_refused", "signature_is_the_librarys", "undeclared_positions_are_refused")
class SwallowsArguments(Correct):
    """Takes whatever it is given and uses what it knows."""

    def __init__(self, dim: int, *, causal: bool = False, device: Any = None, dtype: Any = None, **rest: Any) -> None:
        super().__init__(dim, causal=causal, device=device, dtype=dtype)

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None, **rest: Any) -> Tensor:
        return super().forward(x, context, mask=mask)
