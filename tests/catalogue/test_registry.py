"""Mechanisms are found by what they declare, and a wrong word gets the right one back."""

from __future__ import annotations

import pytest
import torch

import regard
from regard.catalogue import Contract, OptionSet, Paper, register
from regard.catalogue.registry import _cards

PAPER = Paper(key="test", title="A test", year=2026, arxiv=None)


def test_create_builds_by_key():
    layer = regard.create("gqa", 32, heads=4, kv_heads=2, causal=True)
    assert layer(torch.randn(1, 5, 32)).shape == (1, 5, 32)
    assert layer.card is regard.card("gqa")


def test_unknown_key_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'multi_head'"):
        regard.create("multihead", 32)


def test_unknown_argument_is_named_with_its_value():
    with pytest.raises(TypeError, match=r"(?s)'kv_head'.*did you mean 'kv_heads'.*kv_head=2"):
        regard.create("gqa", 32, kv_head=2)


def test_mechanisms_filters_by_what_is_declared():
    constant = regard.mechanisms(pattern="causal self", step=True, state="constant")
    assert {"lightning", "window"} <= set(constant)
    assert "multi_head" not in constant
    assert "eca" in regard.mechanisms(input="feature_map")
    for wrong, right in (
        ({"stat": "constant"}, "state"),
        ({"pattern": "causal"}, "causal self"),
        ({"input": "token"}, "tokens"),
    ):
        with pytest.raises(ValueError, match=f"did you mean '{right}'"):
            regard.mechanisms(**wrong)


def test_a_pattern_that_is_not_declared_is_refused():
    with pytest.raises(ValueError, match="noncausal self"):
        regard.card("lightning").build(32, pattern="noncausal self")


def test_a_key_is_taken_once():
    contract = Contract(input="tokens")

    @register("taken_twice", paper=PAPER, contract=contract)
    class First(torch.nn.Module):
        pass

    try:
        with pytest.raises(ValueError, match="already taken"):

            @register("taken_twice", paper=PAPER, contract=contract)
            class Second(torch.nn.Module):
                pass
    finally:
        del _cards["taken_twice"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": "token"}, "did you mean 'tokens'"),
        ({"input": "tokens", "patterns": ("causal",)}, "'causal'"),
        ({"input": "tokens", "step": True}, "state=None"),
        ({"input": "tokens", "step": True, "state": "constant"}, "causal self"),
        ({"input": "grid"}, "how many axes"),
        ({"input": "feature_map", "padding": True}, "tokens only"),
    ],
)
def test_a_contract_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Contract(**fields)


def test_an_option_set_changes_the_contract():
    contract = Contract(input="tokens", permutation="equivariant")
    changed = contract.under(OptionSet({"position": "rotary"}, {"permutation": None, "positions": True}))
    assert changed.permutation is None
    assert changed.positions
    with pytest.raises(ValueError, match="did you mean 'positions'"):
        contract.under(OptionSet({}, {"position": True}))


def test_costs_are_formulas():
    contract = Contract(input="tokens", time="n*min(n, window)*d", memory="n*log2(n)")
    assert contract.cost("time", n=100, m=100, d=8, h=2, window=10) == 100 * 10 * 8
    assert contract.cost("memory", n=8, m=8, d=8, h=2) == 24


def test_every_card_says_where_it_comes_from_and_what_it_computes():
    for key in regard.mechanisms():
        card = regard.card(key)
        assert all(source.year for source in card.papers)
        assert "Cost:" in card.description
        assert "Differences:" in card.description
        assert card.summary
