"""Hyena is its authors' layer and its matrix of gates and filters, whose size does not depend on the length."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn import HyenaOperator
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "hyena.safetensors"
AUTHORS = {
    "input": "in_proj",
    "short": "short_filter",
    "output": "out_proj",
    "filter.layers.0": "filter_fn.implicit_filter.0",
    "filter.layers.1": "filter_fn.implicit_filter.2",
    "filter.layers.2": "filter_fn.implicit_filter.4",
    "filter.output": "filter_fn.implicit_filter.6",
}


def authors(name: str) -> str:
    """The authors' name of a parameter."""
    alone = {"skip": "filter_fn.bias", "filter.frequency": "filter_fn.implicit_filter.1.freq"}
    module, _, kind = name.rpartition(".")
    return alone.get(name) or f"{AUTHORS[module]}.{kind}"


def layer_of(dim: int = 6, **options) -> HyenaOperator:
    torch.manual_seed(0)
    return HyenaOperator(dim, dtype=torch.float64, **options)


def dense(layer: HyenaOperator, x: Tensor) -> Tensor:
    """The definition with every convolution as a Toeplitz matrix, channel by channel."""
    length, dim = x.shape[1], x.shape[2]
    past = torch.arange(length)[:, None] - torch.arange(length)
    toeplitz = layer.filter(0, length)[past.clamp(min=0)].masked_fill((past < 0).unsqueeze(-1), 0.0)
    kernels = (toeplitz + torch.eye(length, dtype=x.dtype).unsqueeze(-1) * layer.skip.flatten()).split(dim, dim=-1)
    short = [F.pad(layer.input(x), (0, 0, back, 0))[:, :length] for back in (2, 1, 0)]
    weights = layer.short.weight.squeeze(1).unbind(-1)
    projected = sum(one * weight for one, weight in zip(short, weights, strict=True)) + layer.short.bias
    *gates, value = projected.chunk(layer.order + 1, dim=-1)
    if layer.filter_value:
        value = torch.einsum("ijd,bjd->bid", kernels[0], value)
    for gate, kernel in zip(gates[:0:-1], kernels[layer.filter_value :], strict=True):
        value = torch.einsum("ijd,bjd->bid", kernel, gate * value)
    return layer.output(gates[0] * value)


def test_filters_output_and_gradients_are_those_of_the_authors_layer():
    golden = load_file(GOLDEN)
    layer = HyenaOperator(6, order=3, filter_length=20, filter_width=8, features=5, frequency=3.0, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    given = {name: golden[f"layer.weight.{authors(name)}"] for name in names}
    own = dict(layer.named_parameters())
    layer.load_state_dict({name: weight.view_as(own[name]) for name, weight in given.items()}, strict=False)
    assert_close(layer.filter(0, 13), golden["layer.filter"], rtol=1e-12, atol=1e-12)
    x = golden["layer.x"].requires_grad_()
    out = layer(x)
    assert_close(out, golden["layer.out"], rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out, [x, *layer.parameters()], golden["layer.seed"])
    for name, gradient in zip(["x", *map(authors, names)], found, strict=True):
        assert_close(gradient, golden[f"layer.grad.{name}"].view_as(gradient), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("options", [{}, {"order": 3}, {"order": 4, "filter_value": True, "features": 3}])
def test_the_layer_is_its_matrix(length, options):
    layer = layer_of(filter_length=24, **options)
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    found, wanted, leaves = layer(x), dense(layer, x), [x, *layer.parameters()]
    assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)), strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_second_order_is_gate_filter_gate():
    """HyenaDNA's D_{x²} T_h D_{x¹} v."""
    layer = layer_of()
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    seen = F.pad(layer.input(x).mT, (2, 0))
    second, first, value = layer.short(seen).chunk(3, dim=1)
    past = torch.arange(9)[:, None] - torch.arange(9)
    toeplitz = layer.filter(0, 9).mT[:, past.clamp(min=0)].tril() + torch.diag_embed(
        layer.skip[0, :, None].expand(6, 9)
    )
    matrix = torch.diag_embed(second) @ toeplitz @ torch.diag_embed(first)
    assert_close(layer(x), layer.output((matrix @ value.unsqueeze(-1)).squeeze(-1).mT), rtol=1e-11, atol=1e-11)


def test_filters_are_values_of_one_function_wherever_they_are_asked():
    layer = layer_of(filter_length=32)
    parts = [layer.filter(0, 7), layer.filter(7, 8), layer.filter(8, 50)]
    assert_close(torch.cat(parts), layer.filter(0, 50), rtol=1e-12, atol=1e-12)


def test_windows_fall_to_a_hundredth_within_the_shares_of_the_authors():
    """Channels forget between 0.3 and 1.5 of the filters' length; what is left is the shift."""
    layer = layer_of(filter_length=1001, shift=0.0)
    with torch.no_grad():
        # A constant function under the window: the last hidden layer at sin(π/2).
        for linear in layer.filter.layers:
            linear.weight.zero_()
            linear.bias.fill_(torch.pi / 2)
        layer.filter.frequency.fill_(1.0)
        layer.filter.output.weight.fill_(1 / 64)
    slow, fast = layer.filter(0, 1502)[:, 0], layer.filter(0, 1502)[:, -1]
    assert_close(torch.stack([slow[0], fast[0]]), torch.ones(2, dtype=torch.float64))
    assert slow[1500].item() == pytest.approx(0.01)
    assert fast[300].item() == pytest.approx(0.01)


def test_parameters_do_not_depend_on_the_length_of_the_filters():
    """The claim: context is free of parameters, and all of it is in reach of one layer."""
    count = {length: sum(p.numel() for p in layer_of(filter_length=length).parameters()) for length in (64, 10**6)}
    assert len(set(count.values())) == 1
    x = torch.randn(1, 2000, 6, dtype=torch.float64, requires_grad=True)
    (reach,) = torch.autograd.grad(layer_of(filter_length=2000)(x)[0, -1].sum(), x)
    assert (reach[0].abs().amax(-1) > 1e-8).all()


def test_weights_start_as_those_of_the_authors():
    layer = HyenaOperator(256)
    assert (layer.filter.frequency == 10).all()
    assert layer.skip.std().item() == pytest.approx(1, abs=0.15)
    assert layer.short.weight.abs().max().item() == pytest.approx(3**-0.5, abs=0.01)
    assert layer.input.weight.abs().max().item() == pytest.approx(256**-0.5, abs=0.001)


def test_half_types_tell_late_positions_apart():
    layer = HyenaOperator(8, filter_length=4096, dtype=torch.bfloat16)
    filters = layer.filter(4000, 4002)
    assert filters.dtype == torch.float32
    assert not torch.equal(filters[0], filters[1])


def test_steps_beyond_the_length_of_the_filters_go_on():
    layer = layer_of(filter_length=8, order=3)
    x = torch.randn(2, 21, 6, dtype=torch.float64)
    state, outputs = layer.init_state(2), []
    with torch.no_grad():
        for piece in x.split([6, 1, 9, 1, 4], dim=1):
            out, state = layer.step(piece, state)
            outputs.append(out)
    assert_close(torch.cat(outputs, 1), layer(x), rtol=1e-11, atol=1e-11)


def test_peak_memory_is_far_below_one_map():
    layer, x = HyenaOperator(16), torch.randn(1, 4096, 16)
    assert peak_bytes(lambda: layer(x).sum().backward()) < 4096**2 * 4 / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 1}, "order 1; give at least 2"),
        ({"filter_length": 1}, "filter_length 1; give at least 2"),
        ({"features": 4}, "features 4; give an odd number"),
        ({"dropout": 1.0}, "dropout 1.0; give a probability"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=f"HyenaOperator: {message}"):
        HyenaOperator(8, **options)
