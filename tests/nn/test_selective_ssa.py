"""Selective self-attention: the released place of queries (golden), the paper's temperatures, and what they cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn import MultiHeadAttention
from regard.nn.scores.selective_ssa import SelectiveSelfAttention
from regard.ops.masks import Segments
from regard.ops.positions import rotary

GOLDEN = Path(__file__).parents[1] / "golden" / "selective_ssa.safetensors"


def test_output_and_gradients_are_those_of_the_released_layer():
    kept = load_file(GOLDEN)
    layer = SelectiveSelfAttention(
        12,
        heads=3,
        causal=True,
        query_temperature="position",
        value_temperature=None,
        bias=True,
        dtype=torch.float64,
    )
    slope = torch.exp(-torch.exp(kept["weight.beta"]))
    theirs = {}
    for part in ("weight", "bias"):
        for index, name in enumerate(("query", "key", "value")):
            theirs[f"{name}.{part}"] = ("c_attn." + part, slice(12 * index, 12 * index + 12))
        theirs[f"output.{part}"] = ("c_proj." + part, slice(None))
    loaded = {name: kept[f"weight.{source}"][rows] for name, (source, rows) in theirs.items()}
    layer.load_state_dict({**loaded, "query_temperature.place": slope.logit()})
    x = kept["x"].requires_grad_()
    out = layer(x)
    assert_close(out, kept["out"], rtol=1e-12, atol=1e-12)
    leaves = dict(layer.named_parameters())
    place = leaves["query_temperature.place"]
    found = torch.autograd.grad(out, [x, place, *(leaves[name] for name in theirs)], kept["seed"])
    assert_close(found[0], kept["grad.x"], rtol=1e-11, atol=1e-12)
    # dα by the slope against dβ by the slope.
    assert_close(found[1] / (slope * (1 - slope)), kept["grad.beta"] / (slope * slope.log()), rtol=1e-10, atol=1e-12)
    for (source, rows), gradient in zip(theirs.values(), found[2:], strict=True):
        assert_close(gradient, kept[f"grad.{source}"][rows], rtol=1e-11, atol=1e-12)


def randomised(**arguments) -> SelectiveSelfAttention:
    layer = SelectiveSelfAttention(12, heads=3, causal=True, dtype=torch.float64, **arguments)
    for name, parameter in layer.named_parameters():
        if "temperature" in name:
            torch.nn.init.normal_(parameter)
    return layer


def dense(layer: SelectiveSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """The paper's formula head by head, with temperatures as they are written there."""
    length = x.shape[1]
    mixed = []
    for head in range(layer.heads):
        rows = slice(4 * head, 4 * head + 4)
        scaled = []
        for name in ("query", "key", "value"):
            tensor = x @ getattr(layer, name).weight[rows].T
            tau, own = torch.ones(length, 1, dtype=x.dtype), getattr(layer, f"{name}_temperature")
            if own is not None and own.token is not None:
                features = tensor if own.features is None else (own.features(x)[..., rows])
                tau = tau + torch.tanh(F.gelu(features) @ own.token[head])[..., None]
            if own is not None and own.place is not None:
                tau = tau + torch.sigmoid(own.place) * torch.arange(1, length + 1, dtype=x.dtype)[:, None].log()
            if layer.position == "rotary" and name != "value":
                tensor = rotary(tensor[:, None], torch.arange(length))[:, 0]
            scaled.append(tau * tensor)
        query, key, value = scaled
        future = torch.ones(length, length).triu(1).bool()
        mixed.append((query @ key.mT / 2).masked_fill(future, -torch.inf).softmax(-1) @ value)
    return layer.output(torch.cat(mixed, dim=-1))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"position": "rotary"},
        {"key_temperature": "both", "value_temperature": "both", "position": "rotary"},
        {"share_weights": False, "key_temperature": "token"},
        {"query_temperature": "token", "value_temperature": "position"},
        {"query_temperature": None, "value_temperature": None},
    ],
)
def test_output_equals_the_papers_formula(arguments):
    layer, x = randomised(**arguments), torch.randn(2, 9, 12, dtype=torch.float64)
    assert_close(layer(x), dense(layer, x), rtol=1e-11, atol=1e-12)


def test_no_temperature_is_multi_head_attention():
    layer = SelectiveSelfAttention(12, heads=3, query_temperature=None, value_temperature=None)
    plain = MultiHeadAttention(12, heads=3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7, 12)
    assert_close(layer(x), plain(x), rtol=0, atol=0)


@pytest.mark.parametrize("dim", [128, 768])
def test_default_temperatures_add_less_than_half_a_percent(dim):
    plain, layer = (
        sum(parameter.numel() for parameter in made.parameters())
        for made in (MultiHeadAttention(dim), SelectiveSelfAttention(dim))
    )
    assert layer - plain == 2 * dim + 1
    assert layer / plain < 1.005


def test_a_query_temperature_sharpens_a_row_and_keeps_its_order():
    """Sparsity apart from meaning: the same query looks at the same keys in the same order, only more sharply."""
    layer = SelectiveSelfAttention(8, heads=1, query_temperature="token", value_temperature=None, dtype=torch.float64)
    layer.query.weight.data.copy_(torch.eye(8))
    higher = torch.arange(10) % 2 == 0
    x = torch.randn(1, 10, 8, dtype=torch.float64).abs() * torch.where(higher, 1.0, -1.0)[:, None]
    flat, _ = layer.attention_map(x)
    layer.query_temperature.token.data.fill_(50.0)
    sharpened, _ = layer.attention_map(x)
    peaks = sharpened.amax(-1)[0, 0] > flat.amax(-1)[0, 0]
    assert torch.equal(peaks, higher)
    assert torch.equal(flat[0, 0, higher].argsort(-1), sharpened[0, 0, higher].argsort(-1))


def test_a_place_temperature_keeps_attention_from_thinning_out():
    """With slope 1 the weight of a key whose score is 1 above all others does not fall as the context grows."""
    peaks = {}
    for place in (-50.0, 50.0):
        layer = SelectiveSelfAttention(1, heads=1, causal=True, query_temperature="position", value_temperature=None)
        for projection in (layer.query, layer.key):
            projection.weight.data.fill_(1.0)
        layer.query_temperature.place.data.fill_(place)
        x = torch.zeros(1, 4000, 1)
        x[:, 0] = 1.0
        x[:, [9, 3999]] = 1.0  # what asks, and is as like the first as itself
        weights, _ = layer.attention_map(x)
        peaks[place] = weights[0, 0, 9, 0].item(), weights[0, 0, 3999, 0].item()
    assert peaks[-50.0][1] < peaks[-50.0][0] / 100
    assert peaks[50.0][1] > 0.25


def test_a_value_temperature_silences_a_token_that_everybody_looks_at():
    layer = SelectiveSelfAttention(4, heads=1, query_temperature=None, dtype=torch.float64)
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    noise = layer.value(x)[0, 2]
    direction = F.gelu(noise)
    layer.value_temperature.token.data.copy_(-1e3 * direction / direction.square().sum())
    _, value = layer.attention_map(x)
    assert value[0, 0, 2].abs().max() < 1e-12


@pytest.mark.parametrize("position", [None, "rotary", "relative", "alibi"])
def test_a_trained_layer_is_taken_over(position):
    trained = MultiHeadAttention(16, heads=2, position=position, bias=True, causal=True, dtype=torch.float64)
    layer = SelectiveSelfAttention.from_multi_head(trained)
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    assert_close(layer(x), trained(x), rtol=0, atol=0.05)
    layer.query_temperature.place.data.fill_(-torch.inf)
    assert_close(layer(x), trained(x), rtol=1e-12, atol=1e-12)


def test_a_layer_of_other_widths_is_not_taken_over():
    with pytest.raises(ValueError, match="SelectiveSelfAttention: a layer with head_dim=3; convert one with"):
        SelectiveSelfAttention.from_multi_head(MultiHeadAttention(16, heads=2, head_dim=3))


def test_places_count_within_a_packed_sequence():
    layer, x = randomised(value_temperature="both"), torch.randn(1, 9, 12, dtype=torch.float64)
    packed = layer(x, mask=Segments.from_lengths([4, 5]))
    assert_close(packed, torch.cat([layer(x[:, :4]), layer(x[:, 4:])], dim=1), rtol=1e-11, atol=1e-12)


def test_an_unknown_temperature_is_refused():
    with pytest.raises(ValueError, match=r"SelectiveSelfAttention: value_temperature 'tokens' .*did you mean 'token'"):
        SelectiveSelfAttention(8, value_temperature="tokens")
