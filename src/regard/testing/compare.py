"""Comparisons that say by how much and where, and gradients as plain tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Roundoff of a few hundred operations in each type; what is proved here are equalities of the exact function.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def tolerance(dtype: torch.dtype) -> float:
    """The relative difference that counts as roundoff; none for integers."""
    return _TOLERANCE.get(dtype, 0.0)


def assert_same(actual: Tensor, expected: Tensor, what: str, *, within: float | None = None) -> None:
    """Equal shapes, and values within `within` (roundoff of the type) of the largest expected one, at least 1."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not actual.numel():
        return
    actual, expected = actual.detach(), expected.detach()
    assert_finite(actual, what)
    within = tolerance(expected.dtype) if within is None else within
    difference = (actual.double() - expected.double()).abs()
    allowed = within * max(1.0, float(expected.double().abs().max()))
    worst = float(difference.max())
    where = tuple(int(index) for index in torch.unravel_index(difference.argmax(), difference.shape))
    assert worst <= allowed, f"{what}: off by {worst:.3g} at index {where} (allowed {allowed:.1g})"


def assert_zero(value: Tensor, what: str, *, scale: float = 1.0) -> None:
    """Nothing but roundoff beside `scale`."""
    if not value.numel():
        return
    value = value.detach()
    worst, allowed = float(value.abs().max()), tolerance(value.dtype) * scale
    where = tuple(int(index) for index in torch.unravel_index(value.abs().argmax(), value.shape))
    assert worst <= allowed, f"{what}: {worst:.3g} at index {where} where nothing may be (allowed {allowed:.1g})"


def assert_finite(value: Tensor, what: str) -> None:
    """No NaN and no infinity."""
    bad = ~torch.isfinite(value)
    assert not bad.any(), (
        f"{what}: {int(bad.sum())} of {value.numel()} values are NaN or infinite, first at {_first(bad)}"
    )


def assert_differs(actual: Tensor, expected: Tensor, what: str) -> None:
    """Different by more than roundoff somewhere."""
    worst = float((actual.detach().double() - expected.detach().double()).abs().max())
    assert worst > tolerance(expected.dtype), f"{what}: nothing differs by more than {worst:.3g}"


def weighted_sum(out: Tensor) -> Tensor:
    """A loss without symmetries: every entry of the output counts, each with a different weight."""
    weights = torch.linspace(-1.0, 1.7, out.numel(), dtype=torch.float64, device=out.device)
    return (out * torch.sin(40.0 * weights).to(out.dtype).view(out.shape)).sum()


def gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Gradients, zeros where the loss does not depend on a tensor."""
    if not loss.requires_grad:
        return [torch.zeros_like(tensor) for tensor in tensors]
    return list(torch.autograd.grad(loss, tensors, retain_graph=True, materialize_grads=True))


def trained(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that ask for gradients, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _first(bad: Tensor) -> tuple[int, ...]:
    return tuple(int(index) for index in bad.nonzero()[0])
