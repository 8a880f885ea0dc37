"""A variant is a mechanism as written on the command line."""

from __future__ import annotations

from contextlib import suppress
from math import prod

import pytest
import torch

import regard
from regard.bench.plan import PATTERNS
from regard.bench.variant import Variant
from regard.catalogue import Pattern

CPU = torch.device("cpu")
SOLID = [key for key in regard.mechanisms(input="grid") if Variant(key).card.contract.grid_dims == (3,)]


@pytest.mark.parametrize("key", regard.mechanisms())
def test_key_alone_is_the_mechanism_with_its_defaults(key: str):
    assert Variant.parse(key) == Variant(key)
    assert Variant.parse(key).card.key == key


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("window:window=64:sinks=4", {"window": 64, "sinks": 4}),
        ("gqa:dropout=0.5:bias=True", {"dropout": 0.5, "bias": True}),
        ("multi_head:position=alibi", {"position": "alibi"}),
        ("multi_head:position='alibi'", {"position": "alibi"}),
        ("sigmoid_attention:fixed_bias=-3.0", {"fixed_bias": -3.0}),
        ("gqa:kv_heads=None", {"kv_heads": None}),
    ],
)
def test_values_are_literals_or_words(text: str, options: dict[str, object]):
    found = dict(Variant.parse(text).options)
    assert found == options
    assert [type(value) for value in found.values()] == [type(value) for value in options.values()]


@pytest.mark.parametrize("text", ["multi_head", "window:window=64:sinks=4", "multi_head:position=alibi"])
def test_a_variant_is_written_as_it_is_read(text: str):
    assert str(Variant.parse(text)) == text
    assert Variant.parse(str(Variant.parse(text))) == Variant.parse(text)


def test_unknown_mechanism_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"mechanism 'multihead' is not known; did you mean 'multi_head'\?"):
        Variant.parse("multihead")


def test_unknown_argument_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"window: argument 'wndow' is not known; it takes .*sinks, window"):
        Variant.parse("window:wndow=3")


@pytest.mark.parametrize("text", ["window:window", "window:", "window:window=3:", "window::window=3"])
def test_text_of_another_form_is_refused_with_an_example(text: str):
    with pytest.raises(ValueError, match=rf"in '{text}' sets nothing; write key:name=value, e\.g\. window:window=64"):
        Variant.parse(text)


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="mechanism '' is not known; valid values"):
        Variant.parse("")


def test_argument_set_twice_is_refused():
    with pytest.raises(ValueError, match="window"):
        Variant.parse("window:window=64:window=32")


@pytest.mark.parametrize("word", ["false", "no"])
def test_word_that_is_no_bool_does_not_turn_a_switch_on(word: str):
    with suppress(ValueError, TypeError):
        layer = Variant.parse(f"multi_head:bias={word}").build(8, 2, "causal self", dtype=torch.float32, device=CPU)
        assert layer.query.bias is None


@pytest.mark.parametrize("key", regard.mechanisms())
def test_gates_over_feature_maps_are_among_the_noncausal(key: str):
    variant, contract = Variant(key), Variant(key).card.contract
    assert variant.attends("causal self") == ("causal self" in contract.patterns)
    gate = contract.input == "feature_map"
    assert variant.attends("noncausal self") == (gate or "noncausal self" in contract.patterns)


@pytest.mark.parametrize(
    ("key", "pattern"), [(key, way) for key in regard.mechanisms() for way in PATTERNS if Variant(key).attends(way)]
)
def test_layer_runs_on_its_input(key: str, pattern: Pattern):
    variant = Variant(key)
    x = variant.input(64, 32, torch.float32, CPU)
    assert variant.build(32, 2, pattern, dtype=torch.float32, device=CPU)(x).shape == x.shape


@pytest.mark.parametrize("key", regard.mechanisms(pattern="causal self", input="tokens"))
def test_layer_has_the_pattern_asked_for(key: str):
    torch.manual_seed(0)
    layer = Variant(key).build(16, 2, "causal self", dtype=torch.float64, device=CPU)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    later = x.clone()
    later[:, 5:] += 1
    torch.testing.assert_close(layer(later)[:, :5], layer(x)[:, :5])


def test_layer_has_the_type_asked_for():
    layer = Variant("multi_head").build(8, 2, "causal self", dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}


def test_heads_are_given_where_they_are_taken_and_options_go_before():
    assert Variant("multi_head").build(24, 4, "causal self", dtype=torch.float32, device=CPU).heads == 4
    assert Variant.parse("multi_head:heads=3").build(24, 4, "causal self", dtype=torch.float32, device=CPU).heads == 3


@pytest.mark.parametrize("key", [key for key in regard.mechanisms() if "causal" in Variant(key).card.arguments])
@pytest.mark.parametrize("value", ["False", "0", "None"])
def test_pattern_cannot_be_undone_by_an_option(key: str, value: str):
    with pytest.raises((ValueError, TypeError), match="causal"):
        Variant.parse(f"{key}:causal={value}").build(32, 2, "causal self", dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("length", "plane"), [(64, (8, 8)), (512, (16, 32)), (60, (6, 10)), (13, (1, 13)), (1, (1, 1)), (2, (1, 2))]
)
@pytest.mark.parametrize("key", [key for key in regard.mechanisms() if key not in SOLID])
def test_input_is_a_sequence_or_a_plane_as_square_as_can_be(key: str, length: int, plane: tuple[int, int]):
    shape = tuple(Variant(key).input(length, 24, torch.float32, CPU).shape)
    assert prod(shape) == length * 24
    expected = {"tokens": (1, length, 24), "grid": (1, *plane, 24), "feature_map": (1, 24, *plane)}
    assert shape == expected[Variant(key).card.contract.input]


@pytest.mark.parametrize(("length", "box"), [(64, (4, 4, 4)), (512, (8, 8, 8)), (2048, (8, 16, 16)), (13, (1, 1, 13))])
@pytest.mark.parametrize("key", SOLID)
def test_input_of_who_takes_no_plane_is_a_box(key: str, length: int, box: tuple[int, int, int]):
    assert Variant(key).input(length, 24, torch.float32, CPU).shape == (1, *box, 24)


def test_narrowest_input_of_tokens_is_the_shortest():
    assert Variant("multi_head").narrowest([100, 13, 64], 8, torch.float32, CPU).shape == (1, 13, 8)


@pytest.mark.parametrize("key", [key for key in regard.mechanisms(input="grid") if key not in SOLID])
def test_narrowest_plane_has_the_shortest_axis_though_it_is_not_the_smallest(key: str):
    assert Variant(key).narrowest([100, 202, 64], 8, torch.float32, CPU).shape == (1, 2, 101, 8)
