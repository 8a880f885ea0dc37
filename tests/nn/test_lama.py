"""LAMA is an independent port's, its formula's, and needs one context and rank-one affinities only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from regard.nn import LowRankGlobalAttention
from regard.ops.masks import Padding
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "lama.safetensors"


def layer_of(**options):
    torch.manual_seed(0)
    return LowRankGlobalAttention(12, rank=3, dtype=torch.float64, **options)


@pytest.mark.parametrize("case", ["plain", "padded"])
def test_embedding_output_and_gradients_are_those_of_an_independent_port(case):
    golden = load_file(GOLDEN)
    layer = LowRankGlobalAttention(6, rank=3, global_context="mean", transform=False, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    layer.load_state_dict({name: golden[f"weight.{name}"] for name in names})
    x = golden["x"].requires_grad_()
    mask = Padding(golden["lengths"]) if case == "padded" else None
    assert_close(layer.pool(x, mask), golden[f"{case}.pooled"], rtol=1e-12, atol=1e-12)
    out = layer(x, mask=mask)[:, 0]
    assert_close(out, golden[f"{case}.out"], rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out, [x, *layer.parameters()], golden["seed"])
    for name, gradient in zip(["x", *names], found, strict=True):
        assert_close(gradient, golden[f"{case}.grad.{name}"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [1, 7])
def test_the_embedding_is_the_papers_formula(length):
    layer = layer_of()
    tokens = torch.randn(length, 12, dtype=torch.float64)
    hidden = torch.tanh(tokens @ layer.transform[0].weight.T + layer.transform[0].bias)
    scores = torch.stack(
        [
            torch.tanh(layer.global_context @ torch.outer(left, right) @ hidden.T)
            for left, right in zip(layer.context_factor.weight, layer.token_factor.weight, strict=True)
        ]
    )
    weights = (scores / scores.square().sum(0).sqrt()).softmax(-1)
    assert_close(layer.pool(tokens[None])[0], weights @ tokens, rtol=1e-10, atol=1e-10)
    assert_close(layer(tokens[None])[0, -1], layer.output((weights @ tokens).flatten()), rtol=1e-10, atol=1e-10)


def test_another_distribution_costs_two_vectors_and_its_share_of_the_output():
    def scoring(rank):
        layer = LowRankGlobalAttention(12, rank=rank, device="meta")
        return sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("output"))

    assert scoring(9) - scoring(8) == 2 * 12


def test_every_token_gets_the_same_and_their_order_is_nothing():
    layer = layer_of()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    out = layer(x)
    assert_close(out, out[:, :1].expand_as(out), rtol=0, atol=0)
    assert_close(layer.pool(x.flip(1)), layer.pool(x))


def test_distributions_differ_and_the_mean_context_asks_by_sample():
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    for context in ("learned", "mean"):
        weights, _ = layer_of(global_context=context).attention_map(x)
        assert (weights[:, 0] - weights[:, 1]).abs().max() > 1e-2
    # Only what is asked for depends on the sample: with the same token everywhere else, the others' scores move.
    other = x.clone()
    other[:, -1] *= 3
    for context, moves in (("learned", False), ("mean", True)):
        layer = layer_of(global_context=context)
        ratios = [
            weights[..., 0] / weights[..., 1] for weights, _ in (layer.attention_map(x), layer.attention_map(other))
        ]
        assert torch.allclose(*ratios) is not moves


def test_memory_is_far_below_one_map():
    layer, x = LowRankGlobalAttention(16, rank=4), torch.randn(1, 4096, 16, requires_grad=True)
    peak = peak_bytes(lambda: layer(x, mask=Padding(torch.tensor([3000]))).sum().backward())
    assert peak < 4096 * 4096 * 4 / 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1}, "rank 1; give 2 or more"),
        ({"global_context": "sum"}, "global_context 'sum' is not known"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=f"LowRankGlobalAttention: {message}"):
        LowRankGlobalAttention(12, **options)
