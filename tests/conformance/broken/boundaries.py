"""Leaks between tokens, sequences and samples."""

from __future__ import annotations

from typing import Any

import torch
from correct import Correct
from torch import Tensor
from torch.nn import functional as F

from broken.declaring import caught_by
from regard.ops.masks import Causal, Dense, Mask, Padding, Segments
from regard.ops.masks.base import Or


@caught_by("future_changes_nothing", "future_has_no_gradient", "map_times_value_is_output", "step_equals_forward")
class LeaksOneToken(Correct):
    """Token 6 sees token 7."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        mixed = super().mix(query, key, value, mask)
        return mixed + F.pad(value[:, :, 7:8], (0, 0, 6, mixed.shape[2] - 7)) if mixed.shape[2] > 7 else mixed


@caught_by("future_changes_nothing")
class LeaksAtBlockEdges(Correct):
    """A block of 64 ends one token too late: no short sequence shows it."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        mixed = super().mix(query, key, value, mask)
        return mixed + F.pad(value[:, :, 64:65], (0, 0, 63, mixed.shape[2] - 64)) if mixed.shape[2] > 64 else mixed


@caught_by("future_has_no_gradient")
class LeaksInTraining(Correct):
    """Centres the values over the whole sample, in training only, as a batch norm does."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x)
        return query, key, value - value.mean(2, keepdim=True) if self.training else value


@caught_by("later_tokens_are_seen", "permutation_of_tokens_does_as_declared")
class AlwaysCausal(Correct):
    """Takes causal=False and stays causal."""

    def full_mask(self, mask: Mask | None) -> Mask | None:
        return Causal() if mask is None else Causal() & mask


@caught_by("padding_is_invisible", "padded_equals_alone")
class AveragesPadding(Correct):
    """Takes the mean of all values away, padding included."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x)
        return query, key, value if self.causal else value - value.mean(2, keepdim=True)


@caught_by("padding_is_invisible")
class MasksWithAConstant(Correct):
    """Adds -1e4 for minus infinity: a large enough key behind it is seen."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if mask is not None:
            allowed = mask.dense(query.shape[2], key.shape[2], batch=query.shape[0], heads=query.shape[1])
            scores = scores - 1e4 * ~allowed
        return scores.softmax(-1) @ value


@caught_by("full_padding_mask_is_no_mask", "mask_expressions_equal_dense_masks")
class MaskedAtAnotherScale(Correct):
    """The path for masks forgets the scale."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        return super().mix(query if mask is None or self.causal else 2 * query, key, value, mask)


@caught_by("mask_expressions_equal_dense_masks")
class ReadsHalfAnExpression(Correct):
    """Takes the left side of ``|`` for the whole."""

    def full_mask(self, mask: Mask | None) -> Mask | None:
        return super().full_mask(mask.left if isinstance(mask, Or) else mask)


@caught_by("padding_is_invisible", "mask_is_obeyed", "packed_equals_alone", "misfit_masks_are_refused")
class IgnoresTheMask(Correct):
    """Takes a mask and does nothing with it."""

    def full_mask(self, mask: Mask | None) -> Mask | None:
        return super().full_mask(None)


@caught_by("packed_equals_alone", "packed_sequences_are_isolated")
class TakesSegmentsForPadding(Correct):
    """Reads the ids of packed sequences as "real or not"."""

    def full_mask(self, mask: Mask | None) -> Mask | None:
        real = isinstance(mask, Segments)
        return super().full_mask(None if real else mask)


@caught_by("tensors_as_masks_are_refused")
class GuessesTheConvention(Correct):
    """Takes a boolean tensor and guesses that True means real."""

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Any = None) -> Tensor:
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            mask = Dense(mask[:, None, None].expand(-1, 1, x.shape[1], -1))
        return super().forward(x, context, mask=mask)


@caught_by("samples_are_independent", "padded_equals_alone")
class MixesTheBatch(Correct):
    """Centres the values over batch and tokens."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x)
        return query, key, value - value.mean((0, 2), keepdim=True)


@caught_by("samples_are_independent", "order_of_samples_is_irrelevant")
class UsesTheFirstSample(Correct):
    """Computes its gate from the first sample and applies it to all."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x)
        return query, key, value * x[:1, :1, :1, None].sigmoid()


@caught_by("empty_sample_stays_finite")
class DividesByTheLength(Correct):
    """Divides by the lengths of the padding mask, one of which is zero."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        mixed = super().mix(query, key, value, mask)
        if isinstance(mask, Padding):
            mixed = mixed * (key.shape[2] / mask.lengths.view(-1, 1, 1, 1).to(mixed.dtype))
        return mixed
