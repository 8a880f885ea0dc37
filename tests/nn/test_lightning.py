"""Lightning attention against its quadratic definition, and its decay schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from regard.nn import LightningAttention
from regard.ops import linear_attention

GOLDEN = Path(__file__).parents[1] / "golden" / "lightning.safetensors"


def by_definition(layer: LightningAttention, x: torch.Tensor) -> torch.Tensor:
    """The N×N form: ``((q kᵀ) ∘ M) v`` with ``M_ij = λ^(i − j)`` for j ≤ i."""

    def heads(tensor):
        return tensor.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    query, key = heads(F.silu(layer.query(x))), heads(F.silu(layer.key(x)))
    index = torch.arange(x.shape[1], dtype=x.dtype)
    distance = index[:, None] - index
    decay = (layer.log_decay[:, None, None] * distance).exp().tril()
    mixed = ((query @ key.mT) * decay @ heads(layer.value(x))).transpose(1, 2).flatten(2)
    normed = mixed / (mixed.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return layer.output(normed * layer.gate(x))


@pytest.mark.parametrize("length", [1, 63, 64, 200])
def test_the_layer_is_its_quadratic_definition(length):
    layer = LightningAttention(24, heads=4, bias=True, dtype=torch.float64)
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    found, wanted = layer(x), by_definition(layer, x)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    leaves = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_first_layer_decays_by_alibis_slopes_and_the_last_hardly_at_all():
    first, middle, last = (LightningAttention(16, heads=8, layer=layer, layers=3).log_decay for layer in range(3))
    slopes = torch.tensor([2.0**-power for power in range(1, 9)])
    torch.testing.assert_close(first, -slopes * (1 + 1e-5))
    torch.testing.assert_close(middle, -slopes * (0.5 + 1e-5))
    torch.testing.assert_close(last, -slopes * 1e-5)


def test_the_state_has_one_square_a_head_at_any_length():
    layer = LightningAttention(32, heads=4)
    with torch.no_grad():
        state = layer.init_state(1)
        for length in (1, 10, 1000):
            _, state = layer.step(torch.randn(1, length, 32), state)
            assert state.shape == (1, 4, 8, 8)


def test_a_layer_beyond_the_last_is_refused():
    with pytest.raises(ValueError, match="layer 3 of layers 3"):
        LightningAttention(16, layer=3, layers=3)


def test_the_operator_is_the_authors_reference():
    kept = load_file(GOLDEN)
    inputs = [kept[name].requires_grad_() for name in ("query", "key", "value")]
    out = linear_attention(*inputs, log_decay=-kept["slopes"])
    grads = torch.autograd.grad(out, inputs, kept["seed"])
    # The authors round the decayed scores to float32 whatever the inputs are.
    torch.testing.assert_close(out, kept["out"], rtol=1e-5, atol=1e-5)
    for name, grad in zip(("query", "key", "value"), grads, strict=True):
        torch.testing.assert_close(grad, kept[f"grad_{name}"], rtol=1e-5, atol=1e-5)
