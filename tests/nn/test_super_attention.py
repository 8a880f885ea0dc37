"""Optimised, efficient and super attention: an independent port, the formulas and the parameter counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from regard.nn import EfficientHeadAttention, MultiHeadAttention, OptimisedAttention, SuperAttention
from regard.ops.masks import Padding, Segments

GOLDEN = Path(__file__).parents[1] / "golden" / "super_attention.safetensors"
CLASSES = {"Optimised": OptimisedAttention, "Efficient": EfficientHeadAttention, "Super": SuperAttention}


def super_layer(**options):
    torch.manual_seed(0)
    return SuperAttention(12, max_length=9, bias=True, dtype=torch.float64, **options)


@pytest.mark.parametrize(
    ("kind", "heads"), [("Optimised", 2), ("Efficient", 1), ("Efficient", 2), ("Super", 1), ("Super", 2)]
)
def test_outputs_and_gradients_are_those_of_a_port_with_its_softmax_over_keys(kind, heads):
    case = f"{kind}{heads}."
    kept = {name.removeprefix(case): tensor for name, tensor in load_file(GOLDEN).items() if name.startswith(case)}
    options = {"max_length": 5} if kind == "Super" else {}
    layer = CLASSES[kind](8, heads=heads, bias=True, dtype=torch.float64, **options)
    names = [name for name, _ in layer.named_parameters()]
    layer.load_state_dict({name: kept[f"weight.{name}"] for name in names})
    x = kept["x"].requires_grad_()
    out = layer(x)
    assert_close(out, kept["out"], rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out, [x, *layer.parameters()], kept["seed"])
    for name, gradient in zip(["x", *names], found, strict=True):
        assert_close(gradient, kept[f"grad.{name}"], rtol=1e-10, atol=1e-12)


def test_parameters_are_three_quarters_and_half_of_standard_attention():
    def count(build, **options):
        return sum(parameter.numel() for parameter in build(16, device="meta", **options).parameters())

    standard = count(MultiHeadAttention)
    assert 4 * count(OptimisedAttention) == 3 * standard
    assert 2 * count(EfficientHeadAttention) == standard
    # As many tokens as features make the alignment a third square of weights.
    assert 4 * count(SuperAttention, max_length=16) == 3 * standard


def test_standard_attention_with_unit_values_is_optimised_and_with_unit_keys_efficient():
    standard = MultiHeadAttention(12, heads=3, causal=True, dtype=torch.float64)
    optimised = OptimisedAttention(12, heads=3, causal=True, dtype=torch.float64)
    efficient = EfficientHeadAttention(12, heads=3, causal=True, dtype=torch.float64)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        standard.value.weight.copy_(torch.eye(12))
    optimised.load_state_dict({name: value for name, value in standard.state_dict().items() if "value" not in name})
    assert_close(optimised(x), standard(x))
    with torch.no_grad():
        standard.key.weight.copy_(torch.eye(12))
    efficient.load_state_dict(
        {name: value for name, value in standard.state_dict().items() if name[:3] in ("que", "out")}
    )
    assert_close(efficient(x), standard(x))


def test_one_head_loses_nothing_without_its_key_and_value_projections():
    """What a head of full width does with W^Q, W^K, W^V, W^O, an efficient one does with two products of them."""
    standard = MultiHeadAttention(12, heads=1, dtype=torch.float64)
    efficient = EfficientHeadAttention(12, dtype=torch.float64)
    with torch.no_grad():
        efficient.query.weight.copy_(standard.key.weight.T @ standard.query.weight)
        efficient.output.weight.copy_(standard.output.weight @ standard.value.weight)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    assert_close(efficient(x), standard(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [9, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_super_attention_is_its_formula(causal, length):
    layer = super_layer(heads=2, causal=causal)
    x = torch.randn(length, 12, dtype=torch.float64)
    alignment = layer.alignment.weight[:length, :length]
    alignment = torch.tril(alignment) if causal else alignment
    values = alignment @ x + layer.alignment.bias[:length, None]
    mixed = []
    for head in (slice(0, 6), slice(6, 12)):
        scores = layer.query(x)[:, head] @ x[:, head].T / 6**0.5
        if causal:
            scores += torch.full((length, length), -torch.inf).triu(1)
        mixed.append(scores.softmax(-1) @ values[:, head])
    assert_close(layer(x[None])[0], layer.output(torch.cat(mixed, -1)), rtol=1e-10, atol=1e-10)


def test_the_unit_alignment_is_efficient_attention():
    layer = SuperAttention(12, heads=3, max_length=9, dtype=torch.float64)
    efficient = EfficientHeadAttention(12, heads=3, dtype=torch.float64)
    with torch.no_grad():
        layer.alignment.weight.copy_(torch.eye(9))
    efficient.load_state_dict({name: value for name, value in layer.state_dict().items() if "alignment" not in name})
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    assert_close(layer(x), efficient(x))


def test_the_alignment_moves_values_wherever_attention_looks():
    """A permutation as W^A: what a token takes from j is what stood elsewhere, while the scores stay."""
    layer = SuperAttention(12, max_length=9, dtype=torch.float64)
    order = torch.randperm(9)
    with torch.no_grad():
        layer.alignment.weight.copy_(torch.eye(9)[order])
    x = torch.randn(1, 9, 12, dtype=torch.float64)
    weights, values = layer.attention_map(x)
    assert_close(values[:, 0], x[:, order])
    assert_close(weights[:, 0], (layer.query(x) @ x.mT / 12**0.5).softmax(-1))


def test_padding_and_packing_give_what_each_sequence_gives_alone():
    layer = super_layer(heads=2)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    padded = layer(x, mask=Padding(torch.tensor([9, 4])))
    assert_close(padded[1:, :4], layer(x[1:, :4]))
    packed = layer(x, mask=Segments.from_lengths([4, 5]))
    assert_close(packed, torch.cat([layer(x[:, :4]), layer(x[:, 4:])], dim=1))
    # An id that comes back begins another sequence for the alignment, and is the same one for attention.
    again = layer(x, mask=Segments(torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 0])))
    assert (again[:, :3] - layer(x[:, :3])).abs().max() > 1e-3
    assert_close(again[:, 3:6], layer(x[:, 3:6]))


def test_longer_sequences_than_the_alignment_are_refused():
    layer = super_layer(causal=True)
    with pytest.raises(ValueError, match="SuperAttention: 10 tokens, built for max_length 9; give fewer"):
        layer(torch.randn(1, 10, 12, dtype=torch.float64))
    _, state = layer.step(torch.randn(1, 9, 12, dtype=torch.float64), layer.init_state(1))
    with pytest.raises(ValueError, match="10 tokens, built for max_length 9"):
        layer.step(torch.randn(1, 1, 12, dtype=torch.float64), state)
    with pytest.raises(ValueError, match="SuperAttention: max_length 0"):
        SuperAttention(12, max_length=0)
