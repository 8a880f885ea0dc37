"""The attention map is what forward uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.testing.arguments import forward_arguments
from regard.testing.cases import Case
from regard.testing.compare import assert_same, assert_zero, tolerance
from regard.testing.proof import proves, told_apart


def _has_map(case: Case) -> bool:
    return case.contract.attention_map


def _exact_map(case: Case) -> bool:
    return case.contract.attention_map and case.contract.exact


@proves(_has_map)
def map_times_value_is_output(case: Case) -> None:
    """``combine(weights @ value)`` is the output, without a mask and with every argument declared."""
    module: Any = case.build()
    inputs = case.inputs()
    batch, queries, keys = case.sizes(inputs)
    for name, arguments in forward_arguments(case, inputs).items():
        with told_apart(name):
            weights, value = module.attention_map(*inputs.tensors(), **arguments)
            shape = (batch, value.shape[1], queries, keys)
            assert weights.shape == shape, f"weights of shape {tuple(weights.shape)}, expected {shape}"
            assert value.shape[2:3] == (keys,), f"value of shape {tuple(value.shape)} for {keys} keys"
            combined = module.combine(weights @ value)
            assert_same(combined, case.run(module, inputs, **arguments), "combine(weights @ value) and the output")


@proves(_exact_map)
def map_is_a_distribution(case: Case) -> None:
    """Weights are at least 0 and sum to 1 over the keys, to 0 where there is no key (exact mechanisms)."""
    module: Any = case.build()
    inputs = case.inputs()
    for name, arguments in forward_arguments(case, inputs).items():
        weights, _ = module.attention_map(*inputs.tensors(), **arguments)
        lowest = float(weights.detach().min())
        assert lowest >= 0, f"{name}: a weight is {lowest:.3g}"
        total = weights.sum(-1)
        occupied = (weights != 0).any(-1)
        assert_same(total, occupied.to(total.dtype), f"{name}: sums of weights over the keys")


@proves(_has_map)
def map_obeys_masks(case: Case) -> None:
    """No weight on the future in causal patterns, beyond a length or where a mask forbids."""
    module: Any = case.build()
    inputs = case.inputs()
    for name, arguments in forward_arguments(case, inputs).items():
        weights, _ = module.attention_map(*inputs.tensors(), **arguments)
        forbidden = _forbidden(case, weights, arguments)
        assert_zero(weights * forbidden, f"{name}: weights (sample, head, query, key) on forbidden keys")
        row_sizes = weights.abs().sum(-1) * (~forbidden).any(-1)
        assert row_sizes.amax() > tolerance(weights.dtype), f"{name}: the map is empty"


def _forbidden(case: Case, weights: Tensor, arguments: dict[str, Any]) -> Tensor:
    batch, heads, queries, keys = weights.shape
    allowed = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    if "mask" in arguments:
        allowed = allowed & arguments["mask"].dense(queries, keys, batch=batch, heads=heads)
    if case.causal:
        allowed = allowed.tril(keys - queries)
    return ~allowed
