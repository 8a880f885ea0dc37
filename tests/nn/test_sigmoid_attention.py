"""Sigmoid attention against the authors' layer (golden), the formula, and its own claims."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from regard.nn import SigmoidAttention
from regard.ops import attention
from regard.ops.masks import Causal

GOLDEN = Path(__file__).parents[1] / "golden" / "sigmoid_attention.safetensors"


@pytest.mark.parametrize("case", ["plain", "normed"])
def test_outputs_and_gradients_are_those_of_the_authors_layer(case):
    kept = {name.removeprefix(f"{case}."): tensor for name, tensor in load_file(GOLDEN).items() if case in name}
    x = kept["x"].requires_grad_()
    layer = SigmoidAttention(
        16, heads=4, fixed_bias=-math.log(7), bias=True, qk_norm=case == "normed", dtype=torch.float64
    )
    names = {name: name for name, _ in layer.named_parameters()}
    layer.load_state_dict({name: kept[f"weight.{name}"] for name in names}, strict=True)
    out = layer(x)
    torch.testing.assert_close(out, kept["out"], rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(out, [x, *layer.parameters()], kept["seed"])
    for name, grad in zip(["x", *names], grads, strict=True):
        torch.testing.assert_close(grad, kept[f"grad.{name}"], rtol=1e-11, atol=1e-12)


def test_an_untrained_row_weighs_about_one():
    query, key = (torch.randn(1, 4, 500, 32) * 0.3 for _ in range(2))
    mass = attention(query, key, torch.ones(1, 4, 500, 1), normalizer="sigmoid")
    assert (mass - 1).abs().max() < 0.2


def test_keys_do_not_compete():
    """Raising one key's score leaves what the others contribute as it was; softmax would take it from them."""
    query, key, value = torch.randn(3, 1, 1, 6, 4, dtype=torch.float64).unbind()
    value[..., 0, :] = 0
    raised = key.clone()
    raised[..., 0, :] *= 5
    for normalizer, changes in (("sigmoid", False), ("softmax", True)):
        a, b = (attention(query, keys, value, normalizer=normalizer) for keys in (key, raised))
        assert torch.allclose(a, b) is not changes


def test_the_tiled_backward_needs_no_statistic_of_the_row():
    tensors = [torch.randn(1, 2, 300, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours = attention(*tensors, mask=Causal(), normalizer="sigmoid", backend="tiled")
    query, key, value = tensors
    scores = query @ key.mT * 8**-0.5 - torch.arange(1, 301, dtype=torch.float64).log()[:, None]
    dense = torch.sigmoid(scores).tril() @ value
    torch.testing.assert_close(ours, dense)
    found, wanted = (torch.autograd.grad(out.sin().sum(), tensors) for out in (ours, dense))
    torch.testing.assert_close(found, wanted)


def test_layer_scale_starts_the_layer_near_zero():
    x = torch.randn(2, 9, 16)
    layer = SigmoidAttention(16, heads=4, layer_scale=1e-4)
    assert layer(x).abs().max() < 1e-3
