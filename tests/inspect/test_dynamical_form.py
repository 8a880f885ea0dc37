"""Every class of models in its state form, against the operation, the token-by-token recurrence and the layer."""

from __future__ import annotations

import sys
from math import factorial

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from regard.catalogue import create
from regard.inspect.dynamical_form import (
    DynamicalForm,
    dynamical_form,
    gated_form,
    linear_form,
    powers,
    selective_form,
    softmax_form,
)
from regard.ops.attention import attention
from regard.ops.biases import Alibi
from regard.ops.linear import linear_attention
from regard.ops.masks import Causal, Window

EXACT = 1e-13
"""Relative difference of float64 computations in another order."""


def heads(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def step_by_step(form: DynamicalForm) -> Tensor:
    """The definition: one token after the other."""
    state = torch.zeros(*form.entry.shape[:2], form.expansion, form.inputs.shape[-1], dtype=torch.float64)
    outputs = []
    for i in range(form.inputs.shape[2]):
        state = form.transition[:, :, i, :, None] * state
        state = state + form.entry[:, :, i, :, None] * form.inputs[:, :, i, None, :]
        outputs.append((form.readout[:, :, i, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, 2)


def test_two_tokens_of_softmax_by_hand():
    query, key = torch.ones(1, 1, 2, 1), torch.tensor([0.0, 2.0]).log1p().view(1, 1, 2, 1)
    form = softmax_form(query, key, torch.tensor([5.0, 9.0]).view(1, 1, 2, 1), scale=1.0)
    # exp(q k) = 1 and 3, over the largest of the head; η = 1/3 and 4/3.
    torch.testing.assert_close(form.transition[0, 0], torch.tensor([[1.0, 1.0], [0.25, 0.25]]).double())
    torch.testing.assert_close(form.mixing[0, 0], torch.tensor([[1.0, 0.0], [0.25, 0.75]]).double())
    torch.testing.assert_close(form.respond(form.inputs).flatten(), torch.tensor([5.0, 8.0]).double())
    assert (form.expansion, form.state_size, form.needed) == (2, 2, [1])
    torch.testing.assert_close(form.eigenvalues, torch.full((1, 3), 0.25).double())


def test_softmax_form_equals_attention_with_groups_masks_and_biases():
    query, key, value = heads((2, 4, 9, 3), (2, 2, 9, 3), (2, 2, 9, 5))
    bias = Alibi.for_heads(4)
    form = softmax_form(query, key, value, mask=Window(3), bias=bias, scale=0.7)
    expected = attention(query, key, value, mask=Causal() & Window(3), bias=bias, scale=0.7)
    torch.testing.assert_close(form.direct, expected, rtol=1e-6, atol=1e-6)
    assert form.difference < EXACT
    torch.testing.assert_close(step_by_step(form), form.direct)
    torch.testing.assert_close(form.mixing.sum(-1), torch.ones(2, 4, 9).double())


def test_products_of_powers_are_the_series_of_the_exponential():
    left, right = heads((4, 3), (5, 3))
    product = left @ right.mT
    for order in range(5):
        expected = sum(product**m / factorial(m) for m in range(order + 1))
        found = powers(left, order) @ powers(right, order).mT
        torch.testing.assert_close(found, expected)
        assert powers(left, order).shape[-1] == sum(3**m for m in range(order + 1))


def test_softmax_is_the_limit_of_its_series():
    query, key, value = heads((1, 2, 8, 2), (1, 1, 8, 2), (1, 1, 8, 4))
    forms = [softmax_form(query, key, value, order=order) for order in (0, 2, 4, 8, 12)]
    errors = [form.difference for form in forms]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    for form in forms:
        torch.testing.assert_close(form.respond(form.inputs), form.mixing @ form.inputs)


def test_weights_of_a_series_differ_by_no_more_than_its_remainder():
    query, key, value = heads((1, 1, 6, 2), (1, 1, 6, 2), (1, 1, 6, 1))
    scores = (query @ key.mT / 2**0.5)[0, 0]
    order = 4
    kernel = powers(query / 2**0.5, order) @ powers(key, order).mT
    remainder = scores.abs() ** (order + 1) / factorial(order + 1) * scores.clamp(min=0).exp()
    assert ((kernel[0, 0] - scores.exp()).abs() <= remainder * (1 + 1e-9) + 1e-14).all()
    assert softmax_form(query, key, value, order=order).expansion == 31


@pytest.mark.parametrize("decay", ["none", "head", "token"])
@pytest.mark.parametrize("normalize", [False, True])
def test_linear_form_equals_linear_attention(decay: str, normalize: bool):
    query, key, value, gates = heads((2, 4, 10, 3), (2, 2, 10, 3), (2, 2, 10, 5), (2, 2, 10))
    query, key = query.abs(), key.abs()
    log_decay = {"none": None, "head": -gates[0, :, 0].abs(), "token": -gates.abs()}[decay]
    form = linear_form(query, key, value, log_decay=log_decay, normalize=normalize)
    expected = linear_attention(query, key, value, log_decay=log_decay, normalize=normalize)
    torch.testing.assert_close(form.direct, expected, rtol=0, atol=0)
    assert form.difference < EXACT
    torch.testing.assert_close(step_by_step(form), expected)
    if decay == "none" and not normalize:
        assert (form.transition == 1).all()


def test_linear_form_that_forgets_everything_before_a_token():
    query, key, value = heads((1, 1, 6, 2), (1, 1, 6, 2), (1, 1, 6, 3))
    log_decay = torch.zeros(1, 1, 6).masked_fill(torch.arange(6) == 3, -torch.inf)
    form = linear_form(query, key, value, log_decay=log_decay)
    assert form.difference < EXACT
    assert (form.mixing[0, 0, 3:, :3] == 0).all()


def test_larger_state_holds_a_smaller_one():
    query, key, value, extra = heads((1, 2, 8, 3), (1, 2, 8, 3), (1, 2, 8, 4), (1, 2, 8, 2))
    wide = linear_form(torch.cat([query, 0 * extra], -1), torch.cat([key, extra], -1), value)
    narrow = linear_form(query, key, value)
    torch.testing.assert_close(wide.mixing, narrow.mixing)
    assert (wide.expansion, narrow.expansion) == (5, 3)
    assert wide.needed == narrow.needed == [3, 3]


def test_softmax_needs_half_the_tokens_where_keys_are_wide():
    query, key, value = heads((1, 1, 8, 8), (1, 1, 8, 8), (1, 1, 8, 1))
    assert softmax_form(query, key, value).needed == [4]
    assert linear_form(query[..., :2], key[..., :2], value).needed == [2]


def test_ssd_equals_linear_attention_that_decays():
    inputs, step, rate, entry, readout = heads((2, 3, 9, 4), (2, 3, 9), (3, 1), (2, 1, 9, 5), (2, 1, 9, 5))
    step, rate = F.softplus(step), rate.abs()
    form = selective_form(inputs, step, rate, entry, readout)
    keys = step[..., None] * entry
    expected = linear_attention(readout.expand(2, 3, 9, 5), keys, inputs, log_decay=-step * rate[:, 0, None])
    torch.testing.assert_close(form.direct, expected)
    assert form.difference < EXACT
    linear = linear_form(readout.expand(2, 3, 9, 5), keys, inputs, log_decay=-step * rate[:, 0, None])
    torch.testing.assert_close(form.mixing, linear.mixing)


def test_s6_equals_its_recurrence():
    tokens, step, rate, entry, readout, skip = heads((2, 9, 4), (2, 9, 4), (4, 3), (2, 9, 3), (2, 9, 3), (4,))
    step, rate = F.softplus(step), rate.exp()
    form = selective_form(tokens.mT[..., None], step.mT, rate, entry[:, None], readout[:, None], skip=skip)
    state, outputs = torch.zeros(2, 4, 3).double(), []
    for i in range(9):
        state = torch.exp(-step[:, i, :, None] * rate) * state
        state = state + step[:, i, :, None] * entry[:, i, None] * tokens[:, i, :, None]
        outputs.append((state * readout[:, i, None]).sum(-1) + skip * tokens[:, i])
    torch.testing.assert_close(form.direct.squeeze(-1).mT, torch.stack(outputs, 1))
    assert form.difference < EXACT
    assert form.state_size == 12


def test_qlstm_and_rg_lru_equal_their_recurrences():
    tokens, forget, entry, readout = heads((2, 9, 4), (2, 9, 4), (2, 9, 4), (2, 9, 4))
    f, i, o = forget.sigmoid(), entry.sigmoid(), readout.sigmoid()
    for gates in ((f, i, o), (f, (1 - f**2).sqrt() * i, torch.ones_like(o))):
        form = gated_form(*(part.mT[..., None] for part in (tokens, *gates)))
        state, outputs = torch.zeros(2, 4).double(), []
        for t in range(9):
            state = gates[0][:, t] * state + gates[1][:, t] * tokens[:, t]
            outputs.append(gates[2][:, t] * state)
        torch.testing.assert_close(form.direct.squeeze(-1).mT, torch.stack(outputs, 1))
        assert form.difference < EXACT
        assert (form.expansion, form.state_size) == (1, 4)


def test_forget_gate_of_zero_forgets():
    inputs, gate = heads((1, 1, 5, 1), (1, 1, 5, 1))
    forget = gate.sigmoid().masked_fill(torch.arange(5).view(1, 1, 5, 1) == 2, 0.0)
    form = gated_form(inputs, forget, torch.ones_like(gate), torch.ones_like(gate))
    assert form.difference < EXACT
    assert (form.mixing[0, 0, 2:, :2] == 0).all()


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_decay_of_an_ssm_is_a_reversed_sigmoid_gate(rate: float):
    inputs, gate, entry, readout = heads((1, 2, 7, 1), (1, 2, 7), (1, 1, 7, 1), (1, 1, 7, 1))
    ssm = selective_form(inputs, F.softplus(gate), torch.full((2, 1), rate), entry, readout)
    torch.testing.assert_close(ssm.transition.squeeze(-1), (-gate).sigmoid() ** rate)


def test_ssd_is_attention_with_a_normaliser_where_its_steps_shrink_by_their_own_decay():
    query, key, value = heads((1, 1, 8, 3), (1, 1, 8, 3), (1, 1, 8, 2))
    rate, steps = 0.5, [1.0]
    for _ in range(7):
        low, high = 0.0, steps[-1]
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if middle * torch.tensor(rate * middle).exp() < steps[-1] else (low, middle)
        steps.append(middle)
    step = torch.tensor(steps, dtype=torch.float64).view(1, 1, 8)
    ssd = selective_form(value, step, torch.full((1, 1), rate), key, query)
    normalised = linear_form(query, key, value, normalize=1 / step)
    torch.testing.assert_close(ssd.mixing, normalised.mixing, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ssd.transition[:, :, 1:], normalised.transition[:, :, 1:], rtol=1e-6, atol=1e-7)
    constant = selective_form(value, torch.ones_like(step), torch.full((1, 1), rate), key, query)
    assert not torch.allclose(constant.mixing, linear_form(query, key, value).mixing)


LAYERS = [
    ("multi_head", {"causal": True, "position": "rotary"}),
    ("multi_head", {"causal": True, "position": "relative"}),
    ("gqa", {"causal": True, "kv_heads": 2}),
    ("lightning", {"layer": 1, "layers": 3}),
    ("transnormer", {}),
    ("transnormer", {"lrpe": False}),
    ("fast_attention", {"causal": True}),
    ("hedgehog", {"causal": True, "kv_heads": 2}),
]


@pytest.mark.parametrize(("name", "options"), LAYERS)
def test_form_of_a_layer_gives_its_output(name: str, options: dict):
    torch.manual_seed(0)
    layer = create(name, dim=24, heads=4, dtype=torch.float64, **options).eval()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    form = dynamical_form(layer, x)
    assert form.difference < EXACT
    mixed = form.respond(form.inputs)
    found = layer.combine(mixed) if hasattr(layer, "combine") else layer._read_out(x, mixed)
    torch.testing.assert_close(found, layer(x), rtol=1e-7, atol=1e-8)


def test_lightning_decays_as_its_buffer_says():
    layer = create("lightning", dim=24, heads=4)
    values = dynamical_form(layer, torch.randn(1, 6, 24)).eigenvalues
    torch.testing.assert_close(values, layer.log_decay.double().exp()[:, None].expand(4, 3))


def test_table_and_figure():
    form = dynamical_form(create("multi_head", dim=8, heads=2, causal=True), torch.randn(1, 5, 8))
    console = Console(width=120)
    with console.capture() as capture:
        console.print(form.table())
    assert "softmax: a state of 40 numbers" in capture.get()
    assert len(form.figure(head=1).data) == 2


def test_figure_without_plotly_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    form = linear_form(*heads((1, 1, 3, 2), (1, 1, 3, 2), (1, 1, 3, 2)))
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ModuleNotFoundError, match=r"regard\[inspect\]"):
        form.figure()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("multi_head", {}, "MultiHeadAttention with causal=False is no recurrence; build with causal=True"),
        ("hedgehog", {}, "HedgehogAttention with causal=False"),
        ("sigmoid_attention", {"causal": True}, r"SigmoidAttention has the normalizer Sigmoid\(bias=None\)"),
        ("aaren", {}, "no form of Aaren is known; give softmax attention, FastMaxAttention"),
    ],
)
def test_layers_without_a_form_are_refused(name: str, options: dict, message: str):
    with pytest.raises(ValueError, match=f"dynamical_form: {message}"):
        dynamical_form(create(name, dim=8, heads=2, **options), torch.randn(1, 4, 8))


def test_unfit_tensors_are_refused():
    query, key, value, step = heads((1, 1, 4, 2), (1, 1, 4, 2), (1, 1, 4, 2), (1, 1, 4))
    with pytest.raises(ValueError, match="order 3; give an even one"):
        softmax_form(query, key, value, order=3)
    with pytest.raises(ValueError, match="order with a mask or bias"):
        softmax_form(query, key, value, order=2, mask=Window(1))
    with pytest.raises(ValueError, match="keep scores within 700"):
        softmax_form(torch.ones(1, 1, 2, 1), torch.tensor([-800.0, 800.0]).view(1, 1, 2, 1), torch.ones(1, 1, 2, 1))
    with pytest.raises(ValueError, match="a normaliser of 0"):
        linear_form(query, torch.zeros_like(key), value, normalize=True)
    with pytest.raises(ValueError, match="a negative step or rate"):
        selective_form(value, -step.abs(), torch.ones(1, 1), key, query)
    with pytest.raises(ValueError, match=r"a forget gate outside \[0, 1\]"):
        gated_form(value, key + 3, key, key)
    with pytest.raises(ValueError, match=r"inputs and gates of shapes \(1, 1, 4, 2\), \(1, 1, 3, 2\)"):
        gated_form(value, key[:, :, 1:], key, key)
    with pytest.raises(ValueError, match="the eigenvalues of one token"):
        _ = linear_form(query[:, :, :1], key[:, :, :1], value[:, :, :1]).eigenvalues
