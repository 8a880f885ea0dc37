"""Distance, separability and steepness of the selected tokens, with their bounds.

See `regard.inspect.selectivity` for the equations and their source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.ops.checks import require
from regard.ops.normalizers import Normalizer, Relu, ReversedSoftmax, Sigmoid, Softmax

_OWNER = "selectivity"


def spread(queries: int, rows: int) -> Int[Tensor, " rows"]:
    """At most so many queries, evenly spread."""
    return torch.linspace(0, queries - 1, min(rows, queries)).round().long()


def measured(
    scores: Float[Tensor, "batch heads queries keys"],
    tokens: Float[Tensor, "batch heads keys width"],
    normalizer: Normalizer,
    temperature: float,
    top: Sequence[int],
    radius: float | None,
    rows: int,
) -> Iterator[tuple[int, int, dict[str, float]]]:
    """N, head and means over rows."""
    allowed = scores > -torch.inf
    counts = allowed.sum(-1, keepdim=True)
    weights = normalizer.weights(scores / temperature, counts)
    picked = spread(scores.shape[2], rows)
    scores, weights, allowed, counts = (part[:, :, picked] for part in (scores, weights, allowed, counts))
    pairs = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist")
    steep = _steepness(normalizer, scores, counts, temperature)
    for number in top:
        usable = counts.squeeze(-1) > number
        most = int(counts.max())
        require(
            bool(usable.any(2).any(0).all()),
            _OWNER,
            f"top {number} of rows with up to {most} keys",
            "give less than that",
        )
        measured = {
            "keys": counts.squeeze(-1).double(),
            **_geometry(tokens, pairs, weights, allowed, number, radius),
            **steep,
        }
        means = {
            name: torch.where(usable, value, 0.0).sum((0, 2)) / usable.sum((0, 2)) for name, value in measured.items()
        }
        for head in range(scores.shape[1]):
            yield number, head, {name: value[head].item() for name, value in means.items()}


def _geometry(
    tokens: Float[Tensor, "batch heads keys width"],
    pairs: Float[Tensor, "batch heads keys keys"],
    weights: Float[Tensor, "batch heads rows keys"],
    allowed: Bool[Tensor, "batch heads rows keys"],
    number: int,
    radius: float | None,
) -> dict[str, Float[Tensor, "batch heads rows"]]:
    ranked = weights.masked_fill(~allowed, -torch.inf).sort(descending=True, stable=True).indices
    top = ranked[..., :number]
    selected = torch.zeros_like(allowed).scatter(-1, top, True)
    others = allowed & ~selected
    scaled = weights[..., None] * tokens[:, :, None]
    context = (scaled * selected[..., None]).sum(-2, keepdim=True)
    gap = torch.linalg.vector_norm(scaled - context, dim=-1)
    nearest = gap.masked_fill(~others, torch.inf).amin(-1)

    inner, outer = weights * selected, (weights * others).sum(-1)
    norms = torch.linalg.vector_norm(tokens, dim=-1)[:, :, None] * selected
    largest = norms.amax(-1)
    to_top = torch.take_along_dim(pairs[:, :, None], top[..., None], 3)
    farthest = to_top.masked_fill(~others[..., None, :], 0.0).amax((-1, -2))
    between = torch.take_along_dim(to_top, top[..., None, :], 4)
    same = torch.eye(number, dtype=torch.bool)
    # Points of norm M are never further apart than 2 M, which is what is left of no pair.
    closest = torch.minimum(between.masked_fill(same, torch.inf).amin((-1, -2)), 2 * largest)

    # Of the selected without token i: sums of weights, of their squares, and of their products in pairs.
    one, two = _without_own(inner), _without_own(inner**2)
    crossed = (largest**2 - closest**2 / 2)[..., None] * (one**2 - two)
    reach = (largest[..., None] ** 2 * two + crossed).clamp(min=0).sqrt() * selected
    ball = nearest if radius is None else torch.full_like(nearest, radius)
    inside = gap < ball[..., None] if radius is None else (gap <= radius) & (nearest > radius)[..., None]
    clear = (ball > 0) & (nearest >= ball) if radius is None else nearest > radius
    least = torch.where(clear, 1 - reach.sum(-1) / (number * ball), 0.0).clamp(min=0)
    pull = inner * norms
    span = _without_own(pull)
    mean = torch.where(span > 0, _without_own(pull**2) / span, 0.0)
    short = torch.where(span > 0, (mean - ball[..., None]).clamp(min=0) / span, 0.0)
    signed = (weights < 0).any(-1)

    def unsigned(bound: Tensor) -> Tensor:
        return bound.masked_fill(signed, torch.nan)

    left = others.sum(-1)
    random_least, random_most = _at_random(scaled, allowed, number)
    return {
        "distance": gap.masked_fill(~others, 0.0).sum(-1),
        "distance_most": unsigned(outer * farthest + (left * inner.sum(-1) - outer) * largest),
        "random_least": random_least,
        "random_most": random_most,
        "separable": (inside & selected).sum(-1) / number,
        "separable_least": unsigned(least),
        "separable_most": unsigned(((-2 * short**2).exp() * selected).sum(-1) / number),
    }


def _at_random(
    scaled: Float[Tensor, "batch heads rows keys width"], allowed: Bool[Tensor, "batch heads rows keys"], number: int
) -> tuple[Tensor, Tensor]:
    """Bounds of the mean distance over all sets of so many tokens: of a mean of norms by a mean, and of its square."""
    count = allowed.sum(-1, keepdim=True)
    square = scaled.square().sum(-1)
    mean = (scaled.sum(-2, keepdim=True) - scaled) / (count - 1).clamp(min=1)[..., None]
    variance = (_without_own(square) / (count - 1).clamp(min=1) - mean.square().sum(-1)).clamp(min=0)
    drift = (number * mean - scaled).square().sum(-1)
    drawn = number * (count - 1 - number) / (count - 2).clamp(min=1)
    excluded = (count - number) / count
    least, most = (torch.where(allowed, value.clamp(min=0).sqrt(), 0.0) for value in (drift, drift + drawn * variance))
    return (excluded * least).sum(-1), (excluded * most).sum(-1)


def _without_own(values: Tensor) -> Tensor:
    """Sums of all other values, never negative for values that are not."""
    return (values.sum(-1, keepdim=True) - values).clamp(min=0)


def _steepness(
    normalizer: Normalizer,
    scores: Float[Tensor, "batch heads rows keys"],
    counts: Int[Tensor, "batch heads rows 1"],
    temperature: float,
) -> dict[str, Float[Tensor, "batch heads rows"]]:
    shape = scores.shape[:3]
    undefined = scores.new_full(shape, torch.nan)
    if isinstance(normalizer, ReversedSoftmax):
        return dict.fromkeys(("slope", "slope_most", "entry", "entry_most"), undefined)

    def weights(scores: Tensor) -> Tensor:
        return normalizer.weights(scores / temperature, counts).sum((0, 1, 2))

    # Rows do not depend on one another, so that a sum over them keeps their derivatives apart.
    jacobian = torch.func.jacrev(weights, chunk_size=64)(scores).movedim(0, -2)  # pyright: ignore[reportAttributeAccessIssue]
    slope, entry = undefined, undefined
    if isinstance(normalizer, Softmax):
        slope, entry = torch.full_like(undefined, 0.5), torch.full_like(undefined, 0.25)
    elif isinstance(normalizer, Sigmoid):
        slope = entry = torch.full_like(undefined, 0.25)
    elif isinstance(normalizer, Relu):
        slope = entry = 1 / counts.squeeze(-1).clamp(min=1).double()
    return {
        "slope": torch.linalg.matrix_norm(jacobian, ord=2),
        "slope_most": slope / temperature,
        "entry": jacobian.abs().amax((-1, -2)),
        "entry_most": entry / temperature,
    }
