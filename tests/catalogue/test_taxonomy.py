"""Every mechanism has its place in the survey's taxonomy, and is found by it."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from typer.testing import CliRunner

import regard
from regard.catalogue import Contract, Facet, Taxonomy
from regard.cli import app


def cli(*arguments: str):
    return CliRunner().invoke(app, arguments, env={"FORCE_COLOR": "", "TTY_COMPATIBLE": ""})


@pytest.mark.parametrize("key", regard.mechanisms())
def test_every_mechanism_answers_all_four_questions(key):
    facets = regard.card(key).taxonomy.facets
    assert len(facets) == len(set(facets)) >= 4
    assert set(facets) <= set(get_args(Facet))


@pytest.mark.parametrize(
    ("key", "facets"),
    [
        ("multi_head", ("self", "distinctive", "single-level", "soft", "single-representation")),
        ("mla", ("self", "single-level", "soft", "single-representation")),
        ("dinat", ("self", "single-level", "local", "single-representation")),
        ("s2_attention", ("self", "single-level", "local", "single-representation")),
        ("moh", ("self", "distinctive", "single-level", "soft", "single-representation")),
        ("eca", ("self", "single-level", "soft", "multi-dimensional")),
        ("cbam", ("self", "single-level", "soft", "multi-dimensional")),
    ],
)
def test_mechanisms_stand_where_the_survey_would_put_them(key, facets):
    assert regard.card(key).taxonomy.facets == facets


def test_sequences_follow_from_the_patterns_unless_given():
    cross = Contract(input="tokens", patterns=("noncausal cross", "causal cross"))
    assert Taxonomy().under(cross).sequences == ("distinctive",)
    assert Taxonomy(sequences=("co-attention",)).under(cross).sequences == ("co-attention",)
    assert Taxonomy(positions="hard").under(Contract(input="feature_map")) == Taxonomy(("self",), positions="hard")


def test_mechanisms_are_found_by_facet():
    local = regard.mechanisms(facet="local")
    assert {"window", "dinat", "s2_attention"} <= set(local)
    assert "multi_head" not in local
    assert regard.mechanisms(facet="distinctive") == sorted(
        {*regard.mechanisms(pattern="noncausal cross"), *regard.mechanisms(pattern="causal cross")}
    )
    assert regard.mechanisms(facet="local", input="grid") == ["dinat"]


def test_the_command_line_finds_and_shows_the_same():
    listed = json.loads(cli("list", "--json", "--facet", "multi-dimensional").stdout)
    assert [entry["key"] for entry in listed["mechanisms"]] == regard.mechanisms(facet="multi-dimensional")
    assert all("multi-dimensional" in entry["taxonomy"] for entry in listed["mechanisms"])
    assert listed["papers"] == []
    assert "positions\tlocal\n" in cli("show", "window").stdout
    assert "--open" in cli("list", "--open", "--facet", "local").stderr


def test_a_word_that_is_none_gets_the_right_ones_back():
    for build, message in (
        (lambda: Taxonomy(positions="global"), "positions 'global' is not known.*'soft', 'local', 'hard'"),
        (lambda: Taxonomy(levels="multilevel"), "'single-level', 'multi-level'"),
        (lambda: Taxonomy(representations="none"), "representations 'none'.*'multi-dimensional'"),
        (lambda: Taxonomy(sequences=("coattention",)), "'self', 'distinctive', 'co-attention'"),
        (lambda: Taxonomy(sequences="self"), "sequences 'self'; give a tuple"),
        (lambda: regard.mechanisms(facet="global"), "'self', 'distinctive', 'co-attention'"),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    refused = cli("list", "--facet", "global")
    assert refused.exit_code == 2
    assert "'global' is not known; valid values: self, distinctive, co-attention" in refused.stderr
