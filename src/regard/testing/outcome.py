"""Everything a call gives: the output and the gradients of inputs and parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from regard.testing.cases import Case, Inputs
from regard.testing.compare import assert_finite, assert_same, gradients, trained, weighted_sum


def outcome(
    case: Case,
    module: nn.Module,
    arguments: dict[str, Any] | None = None,
    *,
    inputs: Inputs | None = None,
    called_as: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Output and gradients by name; `called_as` is another form of `module` to call, with the same parameters."""
    leaves = (case.inputs() if inputs is None else inputs).with_gradients()
    out = case.run(module if called_as is None else called_as, leaves, **(arguments or {}))
    named = dict(zip(("gradient of x", "gradient of context"), leaves.tensors(), strict=False))
    named |= {f"gradient of {name}": parameter for name, parameter in trained(module).items()}
    found = gradients(weighted_sum(out), list(named.values()))
    return {"output": out.detach(), **dict(zip(named, found, strict=True))}


def assert_same_outcome(actual: dict[str, Tensor], expected: dict[str, Tensor], when: str) -> None:
    """The same output and gradients."""
    for name, value in actual.items():
        assert_same(value, expected[name], f"{name} {when}")


def assert_finite_outcome(found: dict[str, Tensor], when: str) -> None:
    """No NaN and no infinity in output and gradients."""
    for name, value in found.items():
        assert_finite(value, f"{name} {when}")
