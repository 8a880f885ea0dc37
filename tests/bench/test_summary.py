"""Intervals, ties, fronts and efficiency lengths are those of the numbers, whatever they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import quality, results

from regard.bench.quality import TRIALS
from regard.bench.results import Interval, QualityCell
from regard.bench.summary import (
    FEWEST_SEEDS,
    LUCK,
    TOLERANCE,
    efficiency_length,
    efficiency_lengths,
    equal_to_best,
    interval,
    pareto,
    state_growth,
    times_of,
)
from regard.bench.verdict import CLOSE

CAUSAL, NONCAUSAL = "causal self", "noncausal self"
DIGITS, RECALL, TEXT = TRIALS["digits"], TRIALS["recall"], TRIALS["text"]
T_OF_THREE = 0.95 / math.sqrt(2 * 0.975 * 0.025)
"""Student's 97.5% quantile, which for two degrees of freedom has a closed form."""
Z = NormalDist().inv_cdf(0.975)


def seeds(task: str, *samples: Sequence[float], first: int = 0) -> list[QualityCell]:
    """A training per sequence of samples."""
    return [quality(task, "made up", first + seed, found) for seed, found in enumerate(samples)]


def wilson(right: int, count: int) -> tuple[float, float]:
    """ "Probable Inference, the Law of Succession, and Statistical Inference", Wilson, 1927."""
    share, square = right / count, Z**2
    middle = share + square / (2 * count)
    reach = Z * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return (middle - reach) / (1 + square / count), (middle + reach) / (1 + square / count)


@pytest.mark.parametrize(("right", "count"), [(45, 450), (9, 10), (449, 450)])
def test_accuracy_of_one_seed_has_wilsons_interval(right: int, count: int):
    found = interval(DIGITS, seeds("digits", [1.0] * right + [0.0] * (count - right)))
    assert found.score == pytest.approx(right / count)
    assert (found.low, found.high) == pytest.approx(wilson(right, count))
    assert (found.over, found.seeds, found.samples) == ("test samples", 1, count)


@pytest.mark.parametrize(("right", "sure"), [(0, 0.0), (10, 1.0)])
def test_accuracy_of_all_or_nothing_is_not_sure(right: int, sure: float):
    found = interval(DIGITS, seeds("digits", [1.0] * right + [0.0] * (10 - right)))
    assert found.score == sure
    assert found.high - found.low == pytest.approx(wilson(right, 10)[1] - wilson(right, 10)[0])
    assert found.high - found.low > 0.2


def test_bits_of_one_seed_have_the_normal_interval():
    found = interval(TEXT, seeds("text", [1.0, 2.0, 3.0, 4.0]))
    reach = Z * math.sqrt(5 / 3) / 2
    assert (found.low, found.score, found.high) == pytest.approx((2.5 - reach, 2.5, 2.5 + reach))
    assert found.over == "test samples"


def test_two_seeds_average_each_sample():
    found = interval(TEXT, seeds("text", [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]))
    assert (found.low, found.score, found.high) == pytest.approx((2.5, 2.5, 2.5))
    assert (found.over, found.seeds, found.samples) == ("test samples", 2, 4)


@pytest.mark.parametrize("task", ["text", "recall"])
def test_three_seeds_have_students_interval(task: str):
    found = interval(TRIALS[task], seeds(task, [0.45, 0.55], [0.52, 0.52], [0.48, 0.48]))
    reach = T_OF_THREE * 0.02 / math.sqrt(3)
    assert (found.low, found.score, found.high) == pytest.approx((0.5 - reach, 0.5, 0.5 + reach))
    assert (found.over, found.seeds) == ("seeds", 3)


def test_five_seeds_have_a_narrower_interval_than_three():
    three = interval(TEXT, seeds("text", [1.0], [2.0], [3.0]))
    five = interval(TEXT, seeds("text", [1.0], [2.0], [3.0], [1.0], [3.0]))
    assert five.high - five.low < three.high - three.low


@pytest.mark.parametrize("scores", [(0.9, 1.0, 0.95), (0.0, 0.02, 0.1)])
def test_accuracies_stay_between_none_and_all(scores: Sequence[float]):
    found = interval(DIGITS, seeds("digits", *([score] for score in scores)))
    assert 0 <= found.low <= found.high <= 1


def test_capacities_are_averaged_over_seeds():
    cells = [
        quality("recall", "made up", seed, [0.5], by={"4": 1.0, "8": level}) for seed, level in enumerate((0.2, 0.4))
    ]
    assert interval(RECALL, cells).by == pytest.approx({"4": 1.0, "8": 0.3})


def moved(samples: Sequence[float], by: float) -> list[float]:
    return [value + by for value in samples]


WIDE = [1.0, 2.0, 3.0, 4.0]
WORSE = 2 * LUCK["bits per byte"]
WORSE_BY_SEED = 2 * TOLERANCE["bits per byte"]


def equal(task: str, **cells: list[QualityCell]) -> list[str]:
    return equal_to_best(TRIALS[task], cells)


def test_samples_are_paired():
    """The spread over samples is larger than the difference, but on each sample the difference is the same."""
    assert equal("text", a=seeds("text", WIDE), b=seeds("text", moved(WIDE, WORSE))) == ["a"]
    assert equal("text", a=seeds("text", WIDE), b=seeds("text", moved(WIDE[::-1], WORSE))) == ["a", "b"]


def test_seeds_are_paired():
    best = seeds("text", *([value] for value in WIDE))
    assert equal("text", a=best, b=seeds("text", *([value + WORSE_BY_SEED] for value in WIDE))) == ["a"]
    assert equal("text", a=best, b=seeds("text", *([value + WORSE_BY_SEED] for value in WIDE[::-1]))) == ["a", "b"]


def test_difference_that_a_lucky_training_explains_counts_for_nothing():
    """One training of each: however sure on the samples, another seed might turn it round."""
    less = 0.9 * LUCK["bits per byte"]
    assert equal("text", a=seeds("text", WIDE), b=seeds("text", moved(WIDE, less))) == ["a", "b"]


def test_difference_too_small_to_matter_counts_for_nothing_on_any_number_of_seeds():
    less = 0.9 * TOLERANCE["bits per byte"]
    best, other = seeds("text", *([WIDE] * 5)), seeds("text", *([moved(WIDE, less)] * 5))
    assert equal("text", a=best, b=other) == ["a", "b"]


def test_higher_is_better_for_accuracies():
    good, bad = [1.0] * 99 + [0.0], [0.0] * 99 + [1.0]
    assert equal("digits", bad=seeds("digits", bad), good=seeds("digits", good)) == ["good"]


def test_best_comes_first():
    near = [seeds("text", moved(WIDE, 0.001 * place)) for place in (2, 0, 1)]
    assert equal("text", third=near[0], first=near[1], second=near[2]) == ["first", "second", "third"]


def test_only_common_seeds_are_paired():
    """Of three seeds each one is common: that is too few, and the samples are paired instead."""
    best, other = seeds("text", *([WIDE] * 3)), seeds("text", *([moved(WIDE, WORSE)] * 3), first=2)
    assert equal("text", a=best, b=other) == ["a"]
    crossed = seeds("text", *([moved(WIDE[::-1], WORSE)] * 3), first=2)
    assert equal("text", a=best, b=crossed) == ["a", "b"]


def test_seeds_are_paired_by_number_whatever_their_order_and_how_many_there_are():
    best = seeds("text", [1.0], [2.0], [3.0], [2.0])
    other = seeds("text", *([value + WORSE_BY_SEED] for value in (1.0, 2.0, 3.0)))
    assert len(other) == FEWEST_SEEDS
    assert equal("text", a=best, b=[*reversed(other)]) == ["a"]


def scored(score: float) -> Interval:
    return Interval(score=score, low=score, high=score, over="seeds", seeds=3, samples=1)


def front(task: str, **points: tuple[float, float]) -> list[str]:
    """The front of mechanisms with a score and seconds each."""
    scores = {name: scored(score) for name, (score, _) in points.items()}
    return pareto(TRIALS[task], scores, {name: seconds for name, (_, seconds) in points.items()})


def test_front_is_what_nothing_beats_fastest_first():
    found = front("digits", slow=(0.9, 3.0), beaten=(0.4, 2.0), middle=(0.7, 1.5), quick=(0.5, 1.0))
    assert found == ["quick", "middle", "slow"]


def test_front_of_bits_goes_down():
    assert front("text", slow=(2.0, 3.0), beaten=(3.0, 2.0), quick=(2.5, 1.0)) == ["quick", "slow"]


def test_of_equal_times_the_better_score_is_on_the_front():
    assert front("digits", worse=(0.4, 1.0), better=(0.5, 1.0)) == ["better"]
    assert front("text", worse=(2.5, 1.0), better=(2.4, 1.0)) == ["better"]


def test_of_equal_scores_the_faster_is_on_the_front():
    assert front("digits", slower=(0.5, 2.0), faster=(0.5, 1.0)) == ["faster"]


def test_what_was_not_timed_is_not_on_the_front():
    assert pareto(DIGITS, {"a": scored(0.9), "b": scored(0.5)}, {"b": 1.0}) == ["b"]
    assert pareto(DIGITS, {"a": scored(0.9)}, {}) == []


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=8, unique_by=(lambda p: p[0], lambda p: p[1])),
    st.sampled_from(["digits", "text"]),
)
def test_front_is_the_set_of_those_that_no_other_dominates(points: list[tuple[int, int]], task: str):
    sign = 1 if TRIALS[task].better == "higher" else -1
    named = {str(place): (float(score), float(seconds)) for place, (score, seconds) in enumerate(points)}
    alone = {
        name
        for name, (score, seconds) in named.items()
        if not any(sign * (other - score) > 0 and taken < seconds for other, taken in named.values())
    }
    found = front(task, **named)
    assert set(found) == alone
    assert found == sorted(found, key=lambda name: named[name][1])


def test_times_are_those_of_training_at_the_longest_length_of_the_pattern():
    made = results(
        milliseconds={CAUSAL: {512: {"gqa": 1}, 4096: {"gqa": 8}, 1024: {"gqa": 2}}, NONCAUSAL: {8192: {"gqa": 99}}}
    )
    assert times_of(made, "text") == {"gqa": pytest.approx(0.008)}
    assert times_of(made, "digits") == {"gqa": pytest.approx(0.099)}
    assert times_of(results(), "text") == {}


def test_gain_that_crosses_one_is_interpolated_on_logarithmic_axes():
    """From half as fast to twice as fast: the middle of 1024 and 4096 on a logarithmic axis is 2048."""
    assert efficiency_length([(1024, 0.5), (4096, 2.0)]) == pytest.approx(2048)
    assert efficiency_length([(1000, 0.5), (8000, 4.0)]) == pytest.approx(2000)


def test_of_two_crossings_the_last_counts():
    gains = [(512, 0.5), (1024, 2.0), (2048, 0.5), (8192, 2.0)]
    assert efficiency_length(gains) == pytest.approx(4096)


def test_faster_at_every_length_is_from_zero():
    assert efficiency_length([(512, 1.2), (1024, 1.001), (2048, 1.3)]) == 0.0
    assert efficiency_length([(512, 1.2)]) == 0.0


@pytest.mark.parametrize(
    "gains",
    [
        pytest.param([(512, 0.5), (1024, 0.9)], id="slower throughout"),
        pytest.param([(512, 2.0), (1024, 1.5), (2048, 0.9)], id="no longer"),
        pytest.param([(512, 0.5), (1024, (1 + CLOSE) / 2)], id="within noise"),
        pytest.param([(512, 1.0)], id="equal"),
    ],
)
def test_not_clearly_faster_at_the_longest_is_never(gains: list[tuple[int, float]]):
    assert efficiency_length(gains) is None


def test_equal_speed_at_a_length_measured_is_that_length():
    assert efficiency_length([(512, 0.5), (1024, 1.0), (2048, 2.0)]) == pytest.approx(1024)


def test_clearly_faster_begins_at_the_noise():
    assert efficiency_length([(512, 0.5), (1024, CLOSE)]) is not None


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6))
def test_efficiency_length_lies_before_the_lengths_that_stay_faster(gains: list[float]):
    points = [(512 * 2**place, gain) for place, gain in enumerate(gains)]
    found = efficiency_length(points)
    if gains[-1] < CLOSE:
        assert found is None
    else:
        assert all(gain > 1 for length, gain in points if length > found * (1 + 1e-9))
        slow = [length for length, gain in points if gain <= 1]
        assert found >= slow[-1] * (1 - 1e-9) if slow else found == 0.0


def test_efficiency_is_told_by_pattern_mechanism_and_phase():
    made = results(
        milliseconds={
            CAUSAL: {
                4096: {"multi_head": 20.0, "lightning": 10.0},
                1024: {"multi_head": 1.0, "lightning": 2.0},
            },
            NONCAUSAL: {1024: {"multi_head": 1.0, "gqa": 0.5}},
        },
        state_bytes={"multi_head": {1024: 1, 4096: 4}, "lightning": {1024: 1, 4096: 1}},
    )
    found = efficiency_lengths(made.timing)
    crossing = pytest.approx(2048)
    assert found == {
        CAUSAL: {"lightning": {"forward": crossing, "training": crossing, "step": crossing}},
        NONCAUSAL: {"gqa": {"forward": 0.0, "training": 0.0}},
    }
    assert made.summary.efficiency_length == found


def test_lengths_at_which_one_failed_are_passed_over():
    timing = {CAUSAL: {512: {"multi_head": 1, "gqa": 2}, 1024: {"multi_head": 1}, 2048: {"multi_head": 4, "gqa": 2}}}
    assert efficiency_lengths(results(milliseconds=timing).timing)[CAUSAL]["gqa"]["training"] == pytest.approx(1024)


def test_without_exact_attention_there_is_no_efficiency():
    assert efficiency_lengths(results(milliseconds={CAUSAL: {512: {"gqa": 1}}}).timing) == {}


def test_state_grows_by_the_bytes_of_a_further_token():
    kept = {"multi_head": {512: 0, 1024: 4000, 2048: 8096}, "lightning": {512: 64, 1024: 64, 2048: 64}}
    milliseconds = {CAUSAL: {length: dict.fromkeys(kept, 1) for length in (2048, 512, 1024)}}
    assert state_growth(results(milliseconds=milliseconds, state_bytes=kept).timing) == {
        "multi_head": 4.0,
        "lightning": 0.0,
    }


def test_state_that_was_measured_once_has_no_growth():
    kept = {"multi_head": {1024: 4000}, "gqa": {2048: 4000}}
    milliseconds = {CAUSAL: {1024: {"multi_head": 1}, 2048: {"gqa": 1, "multi_head": 1}}}
    assert state_growth(results(milliseconds=milliseconds, state_bytes=kept).timing) == {}
    assert state_growth(results(milliseconds={CAUSAL: {1024: {"multi_head": 1}}}, state_bytes=kept).timing) == {}


def test_state_of_noncausal_layers_does_not_count():
    kept = {"multi_head": {1024: 1, 2048: 2}}
    milliseconds = {NONCAUSAL: {1024: {"multi_head": 1}, 2048: {"multi_head": 1}}}
    assert state_growth(results(milliseconds=milliseconds, state_bytes=kept).timing) == {}


def test_summary_has_every_task_and_mechanism_that_was_trained():
    made = results(
        {"text": {"multi_head": [WIDE], "gqa": [WIDE, WIDE]}, "digits": {"multi_head": [[1.0, 0.0]]}},
        {CAUSAL: {512: {"multi_head": 3, "gqa": 1}}},
    )
    assert {task: {*found} for task, found in made.summary.quality.items()} == {
        "text": {"multi_head", "gqa"},
        "digits": {"multi_head"},
    }
    assert made.summary.quality["text"]["gqa"].seeds == 2
    assert made.summary.equal_to_best == {"text": ["multi_head", "gqa"], "digits": ["multi_head"]}
    assert made.summary.pareto == {"text": ["gqa"], "digits": []}
    assert made.summary.verdict


def test_best_is_not_who_missed_a_hard_seed():
    easy_and_hard = seeds("digits", [0.95] * 9, [0.5] * 9)
    only_easy = seeds("digits", [0.9] * 9)
    assert equal_to_best(DIGITS, {"all": easy_and_hard, "some": only_easy})[0] == "all"
