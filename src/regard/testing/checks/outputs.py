"""Shape, type and finiteness of the output."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import torch
from torch import nn

from regard.testing.arguments import forward_arguments
from regard.testing.cases import LONG, Case, Inputs
from regard.testing.compare import assert_finite, assert_same, tolerance
from regard.testing.outcome import assert_finite_outcome, outcome
from regard.testing.proof import proves


@proves()
def output_has_shape_and_dtype_of_x(case: Case) -> None:
    """The output has the shape of x and its type, in every declared type."""
    module = case.build()
    for dtype in case.contract.dtypes:
        inputs = case.inputs(dtype=dtype)
        out = case.run(copy.deepcopy(module).to(dtype), inputs)
        assert out.shape == inputs.x.shape, f"output of shape {tuple(out.shape)} for x of shape {tuple(inputs.x.shape)}"
        assert out.dtype == dtype, f"output is {out.dtype} for x of {dtype}"
        assert_finite(out, f"output in {dtype}")


@proves()
def types_agree(case: Case) -> None:
    """Every declared type gives the output of the most accurate one, to its own accuracy; float32 its gradients too."""
    module, inputs = case.build(), case.inputs(LONG)
    for name, arguments in forward_arguments(case, inputs).items():
        for dtype in set(case.contract.dtypes) - {case.dtype}:
            less = copy.deepcopy(module).to(dtype)
            rounded, exact = inputs.to(dtype), copy.deepcopy(less).to(case.dtype)
            expected = outcome(case, exact, arguments, inputs=rounded.to(case.dtype))
            actual = outcome(case, less, arguments, inputs=rounded)
            largest = max(float(value.norm()) for value in expected.values())
            moves = {}
            if case.contract.steep and dtype == torch.float32:
                moves = _moved_by_rounding(case, exact, arguments, rounded.to(case.dtype), expected)
            for key in actual if dtype == torch.float32 else ("output",):
                # Norms: where a choice (top-k, rounding) falls the other way a few entries differ wholly.
                error = float((actual[key].to(case.dtype) - expected[key]).norm())
                size = float(expected[key].norm()) if key == "output" else largest
                assert error <= tolerance(dtype) * size + 10 * moves.get(key, 0.0), (
                    f"{name}: {key} in {dtype} is off by {error:.2g} beside {size:.2g}"
                )


def _moved_by_rounding(
    case: Case, exact: nn.Module, arguments: dict[str, Any], inputs: Inputs, expected: dict[str, torch.Tensor]
) -> dict[str, float]:
    """How far parameters and inputs that each stand half a float32 step elsewhere move what `exact` gives, at most."""
    random, half_step = torch.Generator().manual_seed(0), torch.finfo(torch.float32).eps / 2

    def nearby(tensor: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(2, tensor.shape, generator=random, dtype=tensor.dtype) * 2 - 1
        return tensor * (1 + half_step * signs)

    moves = dict.fromkeys(expected, 0.0)
    for _ in range(4):
        moved = copy.deepcopy(exact)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.copy_(nearby(parameter))
        found = outcome(case, moved, arguments, inputs=Inputs(*map(nearby, inputs.tensors())))
        moves = {key: max(most, float((found[key] - expected[key]).norm())) for key, most in moves.items()}
    return moves


@proves()
def extreme_inputs_stay_finite(case: Case) -> None:
    """Output and gradients are finite for zeros and for inputs a hundred times too large (logits of 1e4)."""
    module = case.build()
    for dtype in case.contract.dtypes:
        converted, drawn = copy.deepcopy(module).to(dtype), case.inputs(dtype=dtype)
        for scale, factor in (("zero inputs", 0.0), ("inputs times 100", 100.0)):
            scaled = type(drawn)(*(tensor * factor for tensor in drawn.tensors()))
            for name, arguments in forward_arguments(case, scaled).items():
                found = outcome(case, converted, arguments, inputs=scaled)
                assert_finite_outcome(found, f"in {dtype} for {scale}, {name}")


@proves()
def smallest_sizes_work(case: Case) -> None:
    """Works forward and backward for a batch of one at the declared minimum of dim, heads and length."""
    minimum = case.contract.minimum
    sizes = {name: size for name, size in minimum.items() if name in ("dim", "heads") and name in case.card.arguments}
    module = case.build(sizes)
    axes = len(case.lengths())
    for lengths in {(minimum.get("length", 1),) * axes, (minimum.get("length", 1) + 1,) * axes}:
        inputs = case.inputs(lengths, batch=1, context_length=1, dim=sizes.get("dim"))
        found, shape = outcome(case, module, inputs=inputs), tuple(inputs.x.shape)
        assert found["output"].shape == shape, f"output of shape {tuple(found['output'].shape)} for x of shape {shape}"
        assert_finite_outcome(found, f"for x of shape {shape}")


@proves()
def lengths_may_change(case: Case) -> None:
    """One instance takes one length after another, and each as if it were the first."""
    module = case.build()
    usual = case.lengths()
    longer = tuple(size + 3 for size in usual)
    other = (*usual[:-1], usual[-1] + 1)
    given = {size: case.inputs(size[0], batch=size[1]) for size in product((usual, longer, other), (3, 2))}
    fresh = {size: case.run(case.build(), inputs) for size, inputs in given.items()}
    for lengths in (usual, longer, other, longer, usual):
        for batch in (3, 2):
            out = case.run(module, given[lengths, batch])
            assert_same(out, fresh[lengths, batch], f"length {lengths}, batch {batch} after other sizes")


@proves()
def memory_layout_is_irrelevant(case: Case) -> None:
    """Inputs and output gradients of any strides give what contiguous ones give."""
    module = case.build()
    inputs = case.inputs()
    plain = inputs.with_gradients()
    out = case.run(module, plain)
    for name, relaid in {"transposed": _transposed, "strided": _strided}.items():
        given = type(inputs)(*(relaid(tensor) for tensor in inputs.tensors()))
        assert_same(case.run(module, given), out, f"output for {name} inputs")
    expanded = type(inputs)(*(tensor[:1].expand_as(tensor) for tensor in inputs.tensors()))
    contiguous = type(inputs)(*(tensor.contiguous() for tensor in expanded.tensors()))
    assert_same(case.run(module, expanded), case.run(module, contiguous), "output for expanded inputs")
    # sum() sends back one number expanded over the whole output.
    ones = torch.autograd.grad(out, plain.tensors(), torch.ones_like(out), retain_graph=True)
    for gradient, expected in zip(torch.autograd.grad(out.sum(), plain.tensors()), ones, strict=True):
        assert_same(gradient, expected, "gradient for an expanded output gradient")


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _strided(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
