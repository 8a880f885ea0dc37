"""Fastmax is the authors' function, equals its n × n map in linear memory, and is softmax to its order."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from regard.nn import FastMaxAttention
from regard.nn.linear.fast_attention import SEGMENT, factors
from regard.ops import linear_attention
from regard.ops.masks import Padding
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "fast_attention.safetensors"


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", ["order1", "order1_causal", "order2", "order2_causal"])
def test_outputs_and_gradients_are_those_of_the_authors_function(case):
    kept = {name.partition(".")[2]: value for name, value in load_file(GOLDEN).items() if name.startswith(f"{case}.")}
    order = int(case[5])
    temperature = 4.0 if order == 1 else 1.0
    layer = FastMaxAttention(
        8, heads=2, order=order, temperature=temperature, causal="causal" in case, dtype=torch.float64
    )
    layer.load_state_dict({name: kept[f"weight.{name}"] for name, _ in layer.named_parameters()})
    x = kept["x"].requires_grad_()
    out = layer(x)
    assert_close(out, kept["out"], rtol=1e-11, atol=1e-11)
    names = [name for name, _ in layer.named_parameters()]
    found = torch.autograd.grad(out, [x, *layer.parameters()], kept["seed"])
    for name, gradient in zip(["x", *names], found, strict=True):
        assert_close(gradient, kept[f"grad.{name}"], rtol=1e-10, atol=1e-10)


def dense(layer: FastMaxAttention, x: Tensor, source: Tensor | None = None) -> Tensor:
    """The paper's formula for one sequence, head by head."""
    source = x if source is None else source

    def heads(tokens: Tensor, normalised: bool) -> list[Tensor]:
        parts = tokens.split(layer.head_dim, -1)
        if not normalised:
            return list(parts)
        return [(t - t.mean(-1, keepdim=True)) / (t.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() for t in parts]

    mixed = []
    for q, k, v in zip(
        heads(layer.query(x), True), heads(layer.key(source), True), heads(layer.value(source), False), strict=True
    ):
        score = q @ k.mT / layer.temperature
        f = 1 + score + (score**2 / 2 if layer.order == 2 else 0)
        f = f.tril() if layer.causal else f
        mixed.append(f / f.sum(-1, keepdim=True) @ v)
    return layer.output(torch.cat(mixed, dim=-1))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 9, 2 * SEGMENT + 5])
def test_output_and_gradient_equal_the_dense_formula(order, causal, length):
    temperature = 4.0 if order == 1 else 0.7
    layer = FastMaxAttention(8, heads=2, order=order, temperature=temperature, causal=causal, dtype=torch.float64)
    x = tokens(1, length, 8).requires_grad_()
    out, wanted = layer(x), dense(layer, x[0])[None]
    assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weights = [layer.query.weight, layer.value.weight]
    found, expected = (torch.autograd.grad(y.sin().sum(), [x, *weights]) for y in (out, wanted))
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_context_is_seen_whole_and_without_its_padding():
    layer = FastMaxAttention(8, heads=2, context_dim=6, dtype=torch.float64)
    x, context = tokens(2, 5, 8), tokens(2, SEGMENT + 30, 6, seed=1)
    out = layer(x, context, mask=Padding(torch.tensor([SEGMENT + 30, SEGMENT - 3])))
    assert_close(out[0], dense(layer, x[0], context[0]), rtol=1e-10, atol=1e-10)
    assert_close(out[1], dense(layer, x[1], context[1, : SEGMENT - 3]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [1, 2])
def test_factors_multiply_to_the_series(order):
    x, y = tokens(1, 1, 4, 5), tokens(1, 1, 6, 5, seed=1)
    product = x @ y.mT
    series = 1 + product + (product**2 / 2 if order == 2 else 0)
    assert_close(factors(x, order) @ factors(y, order).mT, series, rtol=1e-12, atol=1e-12)
    assert factors(x, order).shape[-1] == (6 if order == 1 else 21)


def test_it_is_softmax_but_for_the_terms_left_out():
    """Ten times the temperature: the first term left out becomes a hundred or a thousand times smaller."""
    x = tokens(1, 12, 8)

    def error(order: int, temperature: float) -> float:
        torch.manual_seed(0)
        layer = FastMaxAttention(8, heads=2, order=order, temperature=temperature, dtype=torch.float64)
        query, key, _ = layer.project(x, None, None, None)
        weights, _ = layer.attention_map(x)
        return float((weights - (query @ key.mT).softmax(-1)).detach().abs().max())

    for order in (1, 2):
        ratio = error(order, 100.0) / error(order, 1000.0)
        assert ratio == pytest.approx(10 ** (order + 1), rel=0.2)


def test_of_order_two_every_token_keeps_weight_and_of_order_one_with_a_temperature():
    x = 10 * tokens(1, 30, 8)
    torch.manual_seed(0)
    quadratic, linear, warm = (
        FastMaxAttention(8, heads=2, order=order, temperature=temperature, dtype=torch.float64)
        for order, temperature in ((2, 1.0), (1, 1.0), (1, 4.0))
    )
    assert quadratic.attention_map(x)[0].min() > 0
    assert warm.attention_map(x)[0].min() >= 0
    assert linear.attention_map(x)[0].min() < 0


def test_gradients_by_scores_vanish_with_the_length_and_those_of_softmax_do_not():
    """Keys that are unit vectors make the query the row of scores; the worst of these is √n − 1, of softmax's log n."""
    length = 256
    value = -torch.ones(1, 1, length, 1, dtype=torch.float64)
    value[..., 0, :] = 1

    def steepest(score: float, *, series: bool) -> float:
        scores = torch.zeros(1, 1, 1, length, dtype=torch.float64)
        scores[..., 0] = score
        scores.requires_grad_()
        if series:
            keys = torch.eye(length, dtype=torch.float64)[None, None]
            pair = factors(scores, 2), factors(keys, 2)
            out = linear_attention(*pair, value, causal=False, normalize=True)
        else:
            out = scores.softmax(-1) @ value
        (gradient,) = torch.autograd.grad(out.sum(), scores)
        return float(gradient.abs().max())

    bound = 2 / length**0.5
    assert all(steepest(score, series=True) <= bound for score in (-9.0, 0.0, 1.0, 5.0, 15.0, 40.0))
    assert steepest(length**0.5 - 1, series=True) > 0.4 * bound
    assert steepest(math.log(length - 1), series=False) == pytest.approx(0.5)


@pytest.mark.parametrize("order", [1, 2])
def test_dropout_falls_on_the_factors_of_the_highest_order(order):
    """So far up that only constant and linear terms count, dropout of order 2 changes nothing; that of order 1 does."""
    layer = FastMaxAttention(8, heads=2, order=order, temperature=1e4, dropout=0.5, dtype=torch.float64)
    x = tokens(1, 20, 8)
    quiet = layer.eval()(x)
    torch.manual_seed(0)
    change = (layer.train()(x) - quiet).abs().max()
    assert 0 < change < (1e-7 if order == 2 else 1e-2)
    assert order == 2 or change > 1e-5


def test_dropout_is_the_same_when_a_segment_is_computed_again():
    # Warm, so that no sum of weights comes near zero.
    layer = FastMaxAttention(4, heads=1, temperature=8.0, dropout=0.2, causal=True, dtype=torch.float64).train()
    x, step = tokens(1, SEGMENT + 9, 4).requires_grad_(), tokens(1, SEGMENT + 9, 4, seed=1)

    def loss(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return layer(x).sin().sum()

    (gradient,) = torch.autograd.grad(loss(x), x)
    with torch.no_grad():
        difference = (loss(x + 1e-6 * step) - loss(x - 1e-6 * step)) / 2e-6
    assert_close((gradient * step).sum(), difference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_features_of_all_tokens_never_exist_at_once(causal):
    length, width = 8 * SEGMENT, 32
    layer = FastMaxAttention(width, heads=1, causal=causal)
    x = tokens(1, length, width, dtype=torch.float32).requires_grad_()
    features = length * (1 + width + width * (width + 1) // 2) * x.element_size()
    peak = peak_bytes(lambda: layer(x).sum().backward())
    assert peak < 2 * features < length * length * x.element_size()


def test_the_state_holds_as_many_numbers_as_factors_times_values():
    state = FastMaxAttention(16, heads=2, causal=True).init_state(3)
    assert state.sums.shape == (3, 2, 1 + 8 + 36, 9)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FastMaxAttention(8, order=3), "order 3"),
        (lambda: FastMaxAttention(8, temperature=0.0), "temperature 0"),
        (lambda: FastMaxAttention(8, position="alibi"), "position 'alibi'"),
        (lambda: FastMaxAttention(8, causal=True)(tokens(1, 2, 8), tokens(1, 2, 8)), "context given with causal=True"),
    ],
)
def test_what_does_not_fit_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
