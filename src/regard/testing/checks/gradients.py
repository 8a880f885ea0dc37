"""Gradients: they exist, they are right, and they do not depend on which others are asked for."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError, gradcheck

from regard.ops.masks import Padding
from regard.testing.cases import Case, Inputs
from regard.testing.compare import assert_finite, assert_same, gradients, trained, weighted_sum
from regard.testing.proof import proves

# Beside the largest gradient. Roundoff keeps a parameter without effect at 1e-17 or so instead of zero.
_NOTHING = 1e-10


@proves()
def every_parameter_learns(case: Case) -> None:
    """Every parameter receives a finite gradient other than zero, except those declared frozen, which receive none."""
    module = case.build()
    everything = dict(module.named_parameters())
    missing = [name for name in case.contract.frozen if name not in everything]
    assert not missing, f"declared frozen but not among the parameters: {missing}"
    parameters = trained(module)
    sizes = dict.fromkeys(everything, 0.0)
    loss = weighted_sum(case.run(module, case.inputs()))
    for name, gradient in zip(parameters, gradients(loss, list(parameters.values())), strict=True):
        assert_finite(gradient, f"gradient of {name}")
        sizes[name] = float(gradient.abs().max())
    largest = max(sizes.values(), default=0.0)
    for name, size in sizes.items():
        what = f"parameter {name} has a gradient of {size:.2g}, the largest is {largest:.2g}"
        if name in case.contract.frozen:
            assert size <= _NOTHING * largest, f"{what}: declared frozen, but it learns"
        else:
            assert size > _NOTHING * largest, f"{what}: it does not learn"


@proves()
def every_input_matters(case: Case) -> None:
    """x and the context receive finite gradients other than zero in every sample."""
    inputs = case.inputs().with_gradients()
    found = gradients(weighted_sum(case.run(case.build(), inputs)), inputs.tensors())
    for name, gradient in zip(("x", "context"), found, strict=False):
        assert_finite(gradient, f"gradient of {name}")
        for sample, size in enumerate(gradient.abs().flatten(1).amax(1).tolist()):
            assert size > _NOTHING, f"gradient of {name} in sample {sample} is {size:.2g}"


@proves(lambda case: case.dtype == torch.float64)
def gradients_are_right(case: Case) -> None:
    """Finite differences in float64 agree with the gradients of all inputs and parameters (`gradcheck`)."""
    _check_gradients(case, case.inputs(5), {})
    _check_gradients(case, case.inputs(70, batch=1), {})


@proves(lambda case: case.dtype == torch.float64 and case.takes_padding)
def gradients_are_right_with_padding(case: Case) -> None:
    """The same with a padding mask, one sample of which is nothing but padding."""
    inputs = case.inputs(5)
    keys = case.sizes(inputs).keys
    _check_gradients(case, inputs, {"mask": Padding(torch.tensor([keys, keys - 2, 0]))})


def _check_gradients(case: Case, drawn: Inputs, arguments: dict[str, object]) -> None:
    module, inputs = case.build(), drawn.with_gradients()
    names, parameters = list(trained(module)), list(trained(module).values())
    count = len(inputs.tensors())

    def function(*tensors: Tensor) -> Tensor:
        changed = dict(zip(names, tensors[count:], strict=True))
        return torch.func.functional_call(module, changed, tensors[:count], arguments)

    try:
        gradcheck(function, (*inputs.tensors(), *parameters), fast_mode=True)
    except GradcheckError as error:
        raise AssertionError(" ".join(str(error).split())) from error


@proves()
def gradients_stand_alone(case: Case) -> None:
    """Gradients of inputs without those of parameters, and the reverse, are what both together give."""
    module, inputs = case.build(), case.inputs()
    leaves, parameters = inputs.with_gradients(), trained(module)
    together = gradients(weighted_sum(case.run(module, leaves)), [*leaves.tensors(), *parameters.values()])
    count = len(leaves.tensors())
    alone = gradients(weighted_sum(case.run(module, inputs)), list(parameters.values()))
    for name, gradient, expected in zip(parameters, alone, together[count:], strict=True):
        assert_same(gradient, expected, f"gradient of {name} when no input asks for one")
    frozen = copy.deepcopy(module).requires_grad_(False)
    leaves = inputs.with_gradients()
    found = gradients(weighted_sum(case.run(frozen, leaves)), leaves.tensors())
    for gradient, expected in zip(found, together, strict=False):
        assert_same(gradient, expected, "gradient of an input when no parameter asks for one")
