"""Prefix scans: all running results of an associative operator at once, in a logarithmic number of steps.

With an operator ∘ that may stand in any brackets, (a ∘ b) ∘ c = a ∘ (b ∘ c), a sequence x_1, x_2, … has the prefixes

    y_t = x_1 ∘ x_2 ∘ … ∘ x_t = y_{t−1} ∘ x_t

so that ∘ itself is the step from one token to the next. "Prefix Sums and Their Applications", Blelloch, 1990:
neighbours are combined in pairs, the half as long sequence of pairs is scanned, and its results are those of every
second token; the others need one more ∘ each. That applies ∘ less than 2 N times, in at most 3 log₂ N calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from regard.ops.checks import require

Elements = tuple[Tensor, ...]
Combine = Callable[[Any, Any], Elements]
_OWNER = "associative_scan"


def associative_scan(
    combine: Combine,
    elements: Elements,
    *,
    dim: int,
    reverse: bool = False,
    starts: Bool[Tensor, "*batch length"] | None = None,
) -> Elements:
    """``y_t = combine(y_{t−1}, x_t)`` for all t along axis `dim`, where x_t is a tuple of slices of `elements`.

    `combine` takes two tuples like `elements`, of any one length along `dim`, and returns a third: the operator, for
    each place along `dim`. It has to be associative, not commutative; the first argument is what came earlier.

    `dim` counts from the front, because tensors of `elements` may have different numbers of axes; their lengths along
    `dim` are equal. With `reverse` the scan begins at the end: as if all stood in the opposite order. Where `starts`
    is true it begins anew; that has the axes of `elements` up to `dim`, each of their size or 1.

    Gradients are those of the calls of `combine`, to any order. Time and memory are those of 2 N applications.
    Under torch.compile the log₂ N levels are unrolled, for each length anew.
    """
    _check(elements, dim, starts)
    if starts is not None:
        bounded = associative_scan(
            _restarting(combine, dim), (_spread(starts, elements[0], dim), *elements), dim=dim, reverse=reverse
        )
        return bounded[1:]
    if reverse:
        return _flipped(_scan(combine, _flipped(elements, dim), dim), dim)
    return _scan(combine, elements, dim)


def _scan(combine: Combine, elements: Elements, dim: int) -> Elements:
    """Named by counting from 0: `pairs` and `odd` stand at 1, 3, 5, …, `even` at 0, 2, 4, …"""
    length = elements[0].shape[dim]
    if length == 1:
        return elements
    half, whole = length // 2, length - length % 2
    # Unbinding costs less than slices with a step: its backward writes each gradient once.
    pair = [element.narrow(dim, 0, whole).unflatten(dim, (half, 2)).unbind(dim + 1) for element in elements]
    left, right = (tuple(sides) for sides in zip(*pair, strict=True))
    pairs = combine(left, right)
    _check_result(pairs, left)
    odd = _scan(combine, pairs, dim)
    even = _part(left, dim, 0, 1)
    if half > 1:
        even = _joined(even, combine(_part(odd, dim, 0, half - 1), _part(left, dim, 1, half - 1)), dim)
    both = tuple(torch.stack(sides, dim + 1).flatten(dim, dim + 1) for sides in zip(even, odd, strict=True))
    if whole < length:
        both = _joined(both, combine(_part(odd, dim, half - 1, 1), _part(elements, dim, whole, 1)), dim)
    return both


def _restarting(combine: Combine, dim: int) -> Combine:
    """`combine` of elements whose first tensor says where a start has been since: it forgets what came before one."""

    def restarting(left: Elements, right: Elements) -> Elements:
        start, *later = right
        together = combine(left[1:], tuple(later))
        kept = (torch.where(_spread(start, new, dim), new, old) for new, old in zip(later, together, strict=True))
        return left[0] | start, *kept

    return restarting


def _spread(starts: Tensor, element: Tensor, dim: int) -> Tensor:
    """`starts` with an axis for every axis of `element`."""
    return starts.reshape(*starts.shape[: dim + 1], *(1,) * (element.ndim - dim - 1))


def _part(elements: Elements, dim: int, start: int, length: int) -> Elements:
    return tuple(element.narrow(dim, start, length) for element in elements)


def _joined(first: Elements, second: Elements, dim: int) -> Elements:
    return tuple(torch.cat(sides, dim) for sides in zip(first, second, strict=True))


def _flipped(elements: Elements, dim: int) -> Elements:
    return tuple(element.flip(dim) for element in elements)


def _check(elements: Elements, dim: int, starts: Tensor | None) -> None:
    require(
        isinstance(elements, tuple) and len(elements) > 0,
        _OWNER,
        f"elements is a {type(elements).__name__}",
        "give a tuple of tensors, (tensor,) for one",
    )
    least = min(element.ndim for element in elements)
    require(
        0 <= dim < least,
        _OWNER,
        f"dim {dim} for elements with {least} axes or more",
        "count the axis from the front, from 0",
    )
    shapes = [tuple(element.shape) for element in elements]
    length = shapes[0][dim]
    require(
        length > 0 and all(shape[dim] == length for shape in shapes),
        _OWNER,
        lambda: f"elements of shapes {shapes} along axis {dim}",
        "give all the same length, at least 1",
    )
    if starts is not None:
        wanted = shapes[0][: dim + 1]
        fits = starts.ndim == dim + 1 and starts.shape[dim] == length
        fits = fits and all(size in (1, full) for size, full in zip(starts.shape, wanted, strict=True))
        require(
            fits and starts.dtype == torch.bool,
            _OWNER,
            lambda: f"starts of shape {tuple(starts.shape)} and dtype {starts.dtype}",
            lambda: f"give booleans of shape {wanted}, or 1 for axes before the last",
        )


def _check_result(result: Elements, given: Elements) -> None:
    fits = len(result) == len(given) and all(
        new.shape == old.shape and new.dtype == old.dtype for new, old in zip(result, given, strict=True)
    )
    require(
        fits,
        _OWNER,
        lambda: (
            f"combine made {[(tuple(new.shape), new.dtype) for new in result]} of "
            f"{[(tuple(old.shape), old.dtype) for old in given]}"
        ),
        "an operator returns tensors like those it takes",
    )
