"""``regard bench patterns``: all four ways to attend, and one number over several tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from made_up import results
from typer.testing import CliRunner

import regard
from regard.bench.patterns import PATTERNS, compositional_index, default_mechanisms, make_patterns_plan
from regard.bench.results import Interval, Settings
from regard.bench.timing import Layer, time_layers
from regard.bench.variant import Variant
from regard.catalogue import card
from regard.cli import app
from regard.report.page import index, page


def settings(*mechanisms: str, **changes: object) -> Settings:
    plain = {"mechanisms": [*mechanisms], "tasks": [], "lengths": [64], "dim": 16, "heads": 2}
    return Settings(**{**plain, "dtype": "float32", "device": "cpu", "seed": 0, **changes})


def scores(**means: float) -> dict[str, Interval]:
    return {
        name: Interval(score=mean, low=mean, high=mean, over="seeds", seeds=3, samples=10)
        for name, mean in means.items()
    }


def test_every_mechanism_that_attends_is_measured_under_every_pattern_it_declares():
    plan = make_patterns_plan(settings(*default_mechanisms()), 1.0, threads=2)
    assert [task.pattern for task in plan.timing] == [*PATTERNS]
    for pattern in PATTERNS:
        declared = {key for key in regard.mechanisms() if pattern in card(key).contract.patterns}
        assert {variant.key for variant in plan.timed(pattern)} == declared


@pytest.mark.parametrize("pattern", ["noncausal cross", "causal cross"])
def test_every_mechanism_that_looks_at_a_context_is_timed_with_one(pattern: str, monkeypatch: pytest.MonkeyPatch):
    variants = [variant for variant in map(Variant, default_mechanisms()) if variant.attends(pattern)]
    monkeypatch.setattr("regard.bench.timing.times", lambda calls, device: [[call(), 1.0, 1.0][1:] for call in calls])
    cell, failures = time_layers(
        variants, pattern, 64, dim=32, heads=2, dtype=torch.float32, device=torch.device("cpu"), seed=0
    )
    assert not failures
    assert [*cell.layers] == [*map(str, variants)]


def test_the_context_is_looked_at_and_its_gradient_asked_for():
    module, seen = Variant("multi_head").build(16, 2, "noncausal cross", dtype=torch.float32, device="cpu"), []
    layer = Layer(module, torch.randn(1, 8, 16), torch.randn(1, 8, 16), context=torch.randn(1, 8, 16))
    assert torch.equal(layer.forward(), module(layer.x, layer.context))
    assert not torch.equal(layer.forward(), module(layer.x))
    layer.context.requires_grad_().register_hook(seen.append)
    layer.train()
    assert len(seen) == 1
    assert layer.context.grad is None


def test_index_is_the_mean_of_standard_scores_with_the_better_above():
    found = compositional_index(
        {
            "recall": scores(one=0.2, two=0.4, three=0.6),
            "text": scores(one=3.0, two=2.0, three=4.0),
            "digits": scores(one=0.9, two=0.8),
        }
    )
    step = 1.5**0.5  # in standard deviations, where three scores stand a step apart
    assert found["causal self"] == pytest.approx({"two": step / 2, "one": -step / 2, "three": 0.0})
    assert [*found["causal self"]] == ["two", "three", "one"]
    assert found["noncausal self"] == pytest.approx({"one": 1.0, "two": -1.0})


def test_who_lacks_a_task_has_no_index_there():
    found = compositional_index({"recall": scores(one=0.2, two=0.4, three=0.3), "text": scores(one=3.0, two=2.0)})
    assert found["causal self"].keys() == {"one", "two"}


def test_index_of_equals_or_of_one_is_not_told():
    assert compositional_index({"recall": scores(one=0.5, two=0.5), "text": scores(one=3.0)}) == {}


def test_index_stands_in_results_and_report_with_its_place():
    samples = {"one": [[0.0, 1.0, 1.0, 1.0]], "two": [[0.0, 0.0, 0.0, 1.0]]}
    made = results({"digits": samples})
    assert made.summary.compositional_index == {"noncausal self": {"one": 1.0, "two": -1.0}}
    (first, cell), _ = index(made).rows
    assert (first.text, cell.text) == ("one", "+1.00")
    assert cell.source == "/summary/compositional_index/noncausal self/one"
    assert "Compositional index" in page(made)


def test_the_command_measures_all_four_patterns_and_resumes(tmp_path: Path):
    arguments = ["bench", "patterns", "--mechanisms", "gqa:kv_heads=1", "--task", "none", "--lengths", "32,64"]
    arguments += ["--dim", "16", "--heads", "2", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [*kept["timing"]] == [f"{pattern} {length}" for length in (32, 64) for pattern in PATTERNS]
    assert kept["summary"]["efficiency_length"].keys() == {*PATTERNS}
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0
    assert "done" not in again.stderr
    assert json.loads((tmp_path / "results.json").read_text())["timing"] == kept["timing"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mechanisms", "eca"), "mechanism eca is a gate, which attends in none of the patterns noncausal self"),
        (("--mechanisms", "windw"), "mechanism 'windw' is not known; did you mean 'window'?"),
        (("--task", "chess"), "task 'chess' is not known; valid values: recall, text, digits, hull, delaunay, tour"),
        (("--lengths", "many"), "--lengths 'many': give whole numbers"),
        (("--lengths", "0"), "lengths 0; give positive numbers"),
        (("--dim", "10", "--heads", "4"), "heads 4 does not divide dim 10"),
        (("--dtype", "int8"), "dtype 'int8' is not known; valid values: float32, bfloat16, float16"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
        (("--budget", "0"), "budget 0 minutes; give a positive number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], words: str, tmp_path: Path):
    result = CliRunner().invoke(app, ["bench", "patterns", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
