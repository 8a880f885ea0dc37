"""A plan says no to what cannot be measured before anything is measured, and why."""

from __future__ import annotations

import os
import platform

import pytest
import torch
from made_up import MACHINE, quality, results

import regard
from regard.bench.plan import BASELINE, DEFAULT_MECHANISMS, DEFAULT_TASKS, Plan, TimingTask, make_plan, this_machine
from regard.bench.quality import TRIALS
from regard.bench.results import Refusal, Results, Settings, TimingCell
from regard.bench.variant import Variant
from regard.catalogue import card

CAUSAL, NONCAUSAL = "causal self", "noncausal self"


def settings(**changes: object) -> Settings:
    """Small ones, without tasks."""
    given = {
        "mechanisms": ["multi_head"],
        "tasks": [],
        "lengths": [16, 8],
        "dim": 16,
        "heads": 2,
        "dtype": "float32",
        "device": "cpu",
        "seed": 0,
    }
    return Settings(**{**given, **changes})


def default(**changes: object) -> Settings:
    given = {"mechanisms": [*DEFAULT_MECHANISMS], "tasks": [*DEFAULT_TASKS], "lengths": [512, 1024, 2048, 4096]}
    return settings(**{**given, "dim": 256, "heads": 4, **changes})


def plan(budget: float = 5.0, threads: int = 2, **changes: object) -> Plan:
    return make_plan(settings(**changes), budget, threads=threads)


def refusal(budget: float = 5.0, **changes: object) -> str:
    with pytest.raises(Refusal) as caught:
        plan(budget, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def default_plan() -> Plan:
    return make_plan(default(), 5.0, threads=2)


def test_unknown_mechanism_is_refused_with_the_nearest():
    said = refusal(mechanisms=["multi_head", "lightening"])
    assert said == "regard: mechanism 'lightening' is not known; did you mean 'lightning'?"


def test_unknown_argument_is_refused():
    assert "window: argument 'wndow' is not known; it takes" in refusal(mechanisms=["window:wndow=3"])


def test_text_of_another_form_is_refused():
    said = refusal(mechanisms=["window:window"])
    assert "'window' in 'window:window' sets nothing; write key:name=value" in said


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gqa:kv_heads=3", "kv_heads 3 does not divide heads 2; give a divisor"),
        ("multi_head:position=alibbi", "position 'alibbi' is not known; did you mean 'alibi'?"),
        ("multi_head:dropout=2", "dropout 2; give a probability in [0, 1)"),
        ("multi_head:head_dim=wide", "head_dim"),
        ("multi_head:dtype=float16", "dtype"),
        ("multi_head:dim=32", "dim"),
        ("dinat:kernel_size=[3,5]", "kernel_size"),
    ],
)
def test_bad_value_is_refused_before_anything_runs(text: str, why: str):
    said = refusal(mechanisms=[text], lengths=[64])
    assert text.partition(":")[0] in said
    assert why in said


@pytest.mark.parametrize("key", [key for key in regard.mechanisms(pattern=CAUSAL) if "causal" in card(key).arguments])
@pytest.mark.parametrize("value", [True, False])
def test_option_that_contradicts_the_pattern_is_refused(key: str, value: bool):
    assert "causal" in refusal(mechanisms=[f"{key}:causal={value}"], lengths=[1024])


def test_no_mechanisms_are_refused():
    assert refusal(mechanisms=[]) == "mechanisms is empty; name at least one, or leave it out"


def test_unknown_task_is_refused_with_those_there_are():
    known = "recall, text, digits, hull, delaunay, tour, or none"
    assert refusal(tasks=["texts"]) == f"task 'texts' is not known; valid values: {known}"


@pytest.mark.parametrize(
    ("task", "mechanisms", "needed"),
    [
        ("recall", ["efficient_attention", "eca"], CAUSAL),
        ("text", ["cbam"], CAUSAL),
        ("digits", ["lightning"], NONCAUSAL),
        ("hull", ["lightning", "eca"], "noncausal cross"),
    ],
)
def test_task_that_no_mechanism_can_do_is_refused(task: str, mechanisms: list[str], needed: str):
    said = refusal(tasks=[task], mechanisms=mechanisms)
    assert said == f"task {task} needs '{needed}', which {', '.join(mechanisms)} cannot do; add a mechanism that can"


@pytest.mark.parametrize("task", ["hull", "delaunay", "tour"])
def test_cross_attention_whose_weights_are_no_distribution_cannot_point(task: str):
    said = refusal(tasks=[task], mechanisms=["sigmoid_attention"])
    assert said == (
        f"task {task} needs 'noncausal cross' over tokens, with exact weights and any mask, which sigmoid_attention "
        "cannot do; add a mechanism that can"
    )


@pytest.mark.parametrize("key", regard.mechanisms(pattern=CAUSAL, input="grid"))
def test_causal_grids_cannot_do_text_and_are_not_said_to_lack_causality(key: str):
    said = refusal(tasks=["text"], mechanisms=[key], lengths=[1024])
    assert "text" in said
    assert key in said
    assert f"needs '{CAUSAL}', which" not in said


def test_length_within_the_window_is_refused():
    said = refusal(mechanisms=["multi_head", "window:window=64"], lengths=[128, 64])
    assert "length 64 is too short for window 64 of window:window=64, which would see everything" in said
    assert said.endswith("give longer lengths or a shorter window")


def test_default_window_is_heeded_too():
    assert "length 256 is too short for window 256 of window," in refusal(mechanisms=["window"], lengths=[256])


def test_length_just_beyond_the_window_is_taken():
    assert len(plan(mechanisms=["window:window=64"], lengths=[65]).timing) == 2


@pytest.mark.parametrize("lengths", [[16], [4096, 62]])
def test_plane_smaller_than_the_neighbourhood_is_refused(lengths: list[int]):
    said = refusal(mechanisms=["dinat:kernel_size=5"], lengths=lengths)
    assert "mechanism dinat:kernel_size=5 cannot run as asked: " in said
    assert "5" in said.partition("asked: ")[2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lengths": [8, 0]}, "lengths 8,0; give positive numbers"),
        ({"lengths": [-4]}, "lengths -4; give positive numbers"),
        ({"lengths": []}, "lengths is empty; give positive numbers"),
        ({"dim": 0}, "dim 0; give positive numbers"),
        ({"heads": -1}, "heads -1; give positive numbers"),
    ],
)
def test_sizes_that_are_not_positive_are_refused(changes: dict[str, object], said: str):
    assert refusal(**changes) == said


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_budget_that_is_not_positive_is_refused(budget: float):
    assert refusal(budget) == f"budget {budget:g} minutes; give a positive number"


def test_unknown_dtype_is_refused_with_those_there_are():
    assert refusal(dtype="float8") == "dtype 'float8' is not known; valid values: float32, bfloat16, float16"


@pytest.mark.parametrize(
    "device",
    ["gpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="it is one here"))],
)
def test_device_that_is_not_there_is_refused(device: str):
    assert f"device '{device}' cannot be used: " in refusal(device=device)


def test_dim_that_heads_do_not_divide_is_refused():
    assert "heads 3 does not divide dim 16; change either" in refusal(heads=3)


def test_mechanism_too_wide_for_dim_is_refused():
    assert "mechanism cbam cannot run as asked: " in refusal(mechanisms=["cbam"], dim=8)


def test_options_that_the_small_models_cannot_take_are_refused():
    """The models that are trained have two heads, whatever is timed."""
    said = refusal(mechanisms=["gqa:kv_heads=4"], heads=4, tasks=["text"])
    assert "kv_heads 4 does not divide heads 2" in said


def test_defaults_are_valid(default_plan: Plan):
    assert [str(variant) for variant in default_plan.variants] == [*DEFAULT_MECHANISMS]
    assert default_plan.seeds == 1
    assert default_plan.workers == 2


def test_default_plan_times_every_length_both_ways_from_the_shortest(default_plan: Plan):
    expected = [TimingTask(way, length) for length in (512, 1024, 2048, 4096) for way in (CAUSAL, NONCAUSAL)]
    assert default_plan.timing == expected


def test_short_lengths_are_timed_first_in_whatever_order_they_are_given():
    assert [task.length for task in plan(mechanisms=["lightning"], lengths=[32, 8, 16]).timing] == [8, 16, 32]


def test_default_plan_trains_each_mechanism_on_all_it_can_do(default_plan: Plan):
    found = {(task.task, str(task.variant)) for task in default_plan.quality}
    assert found == {
        (task, name)
        for task in DEFAULT_TASKS
        for name in DEFAULT_MECHANISMS
        if TRIALS[task].pattern in Variant.parse(name).card.contract.patterns
        and (task == "digits" or Variant.parse(name).card.contract.input == "tokens")
    }
    assert len(found) == len(default_plan.quality)


def test_exact_attention_is_timed_whether_asked_for_or_not():
    made = plan(mechanisms=["gqa:kv_heads=1", "lightning"])
    assert made.timed(CAUSAL) == [BASELINE, *made.variants]
    assert made.timed(NONCAUSAL) == [BASELINE, Variant.parse("gqa:kv_heads=1")]


def test_exact_attention_is_timed_once():
    made = plan(mechanisms=["gqa:kv_heads=1", "multi_head"])
    assert made.timed(CAUSAL) == [*made.variants]


def test_pattern_that_nothing_has_is_not_timed():
    assert {task.pattern for task in plan(mechanisms=["lightning"]).timing} == {CAUSAL}
    assert {task.pattern for task in plan(mechanisms=["eca"], lengths=[16]).timing} == {NONCAUSAL}


def test_mechanism_named_twice_is_one():
    assert plan(mechanisms=["gqa:kv_heads=1", "gqa:kv_heads=1"]).variants == (Variant.parse("gqa:kv_heads=1"),)


def test_task_and_length_named_twice_are_one():
    made = plan(tasks=["text", "text"], lengths=[8, 8])
    assert len(made.quality) == len({*made.quality})
    assert len(made.timing) == len({*made.timing})


def test_seeds_grow_with_the_budget():
    seeds = [make_plan(default(), budget, threads=2).seeds for budget in (0.1, 1, 5, 12, 20, 60, 1e6)]
    assert seeds == sorted(seeds)
    assert (seeds[0], seeds[2], seeds[-1]) == (1, 1, 5)
    assert 3 in seeds


def test_documented_budget_is_enough_for_three_seeds():
    assert make_plan(default(), 12, threads=2).seeds == 3


def test_more_workers_allow_more_seeds():
    one, eight = (make_plan(default(), 12, threads=threads) for threads in (1, 8))
    assert (one.workers, eight.workers) == (1, 8)
    assert one.seeds < eight.seeds


def test_workers_are_bounded():
    assert plan(threads=64).workers == 8


def test_quality_comes_seed_by_seed():
    made = make_plan(default(seed=7), 1e6, threads=2)
    assert [task.seed for task in made.quality] == sorted(task.seed for task in made.quality)
    by_seed = [[(task.task, task.variant) for task in made.quality if task.seed == 7 + seed] for seed in range(5)]
    assert all(found == by_seed[0] for found in by_seed)
    assert 5 * len(by_seed[0]) == len(made.quality)


def held(made: Plan, timing: int, quality_cells: int) -> Results:
    """Results with the first so many cells of a plan."""
    found = results()
    for task in made.timing[:timing]:
        found.timing[str(task)] = TimingCell(
            pattern=task.pattern, length=task.length, gemm_flops=1.0, copy_bytes=1.0, layers={}
        )
    for task in made.quality[:quality_cells]:
        found.quality[str(task)] = quality(task.task, str(task.variant), task.seed, [0.5])
    return found


@pytest.mark.parametrize(("timing", "trained"), [(0, 0), (1, 0), (4, 1), (4, 2)])
def test_what_results_hold_is_not_planned_again(timing: int, trained: int):
    made = plan(0.01, tasks=["text"], mechanisms=["multi_head", "lightning"])
    assert (len(made.timing), len(made.quality)) == (4, 2)
    waiting = made.waiting(held(made, timing, trained))
    assert waiting == (made.timing[timing:], made.quality[trained:])


def test_machine_says_where_it_is():
    machine = this_machine("cpu", 3)
    assert (machine.threads, machine.cores, machine.device) == (3, os.cpu_count(), "cpu")
    assert (machine.torch, machine.python, machine.regard) == (
        torch.__version__,
        platform.python_version(),
        regard.__version__,
    )
    assert machine.processor
    assert machine != MACHINE
