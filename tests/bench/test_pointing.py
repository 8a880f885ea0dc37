"""Pointing tasks are scored as the paper scores them, told from guessing, and learnt by small networks."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from made_up import results
from torch import Tensor, nn

from regard.bench.pointing import PointingTrial
from regard.bench.quality import TRIALS, train
from regard.bench.variant import Variant
from regard.report.page import overview
from regard.tasks import geometry

CPU = torch.device("cpu")
POINTING = [task for task, trial in TRIALS.items() if isinstance(trial, PointingTrial)]
LEVELS = {"hull": ["5", "6", "8"], "delaunay": [""], "tour": ["5", "6", "7"]}


class Answers(nn.Module):
    """Answers by a rule over the points, which come with mean 0 and variance 1."""

    def __init__(self, rule) -> None:
        super().__init__()
        self.rule = rule

    def decode(self, points: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        return self.rule(points.double() / 12**0.5 + 0.5)[:, :longest], torch.zeros(len(points))


def score(task: str, rule) -> float:
    levels = TRIALS[task].samples(Answers(rule), CPU)
    assert [*levels] == LEVELS[task]
    return float(torch.cat([*levels.values()]).mean())


def test_the_tasks_are_the_papers_three():
    assert POINTING == ["hull", "delaunay", "tour"]


@pytest.mark.parametrize(("task", "best"), [("hull", 1.0), ("delaunay", 1.0), ("tour", 1.0)])
def test_right_answers_have_the_best_score(task: str, best: float):
    assert score(task, TRIALS[task].solve) == pytest.approx(best)


def test_a_hull_counts_wherever_it_begins_and_not_with_a_corner_missing():
    assert score("hull", lambda points: backwards(geometry.hulls(points))) == 1.0
    assert score("hull", lambda points: geometry.hulls(points)[:, 1:]) == 0.0


def backwards(answers: Tensor) -> Tensor:
    """The padding, which comes first now, is left out wherever it stands."""
    return answers.flip(1)


def test_a_triangle_found_of_many_counts_for_its_share():
    points = geometry.uniform_points(500, 6, torch.Generator().manual_seed(2**31 + 6))
    shares = [1 / len(geometry.delaunay(sample)) for sample in points]
    first = score("delaunay", lambda points: geometry.triangulations(points)[:, :3])
    assert first == pytest.approx(sum(shares) / len(shares))
    assert score("delaunay", lambda points: geometry.triangulations(points)[:, 1:3]) == 0.0


def test_guessing_hulls_is_a_fixed_polygon():
    """No polygon, the same for all sets, is right much more often than the best guess says."""
    trial = TRIALS["hull"]
    for polygon in ([0, 1, 2, 3], [0, 2, 1, 3], [4, 1, 0, 3, 2], [0, 1, 2]):
        assert score("hull", lambda points, polygon=polygon: torch.tensor(polygon).expand(len(points), -1)) < (
            trial.guessing + 4 * sqrt(trial.guessing / 600)
        )
    assert 0.005 < trial.guessing < 0.03


def test_guessing_triangles_is_as_many_as_there_may_be():
    most = [[0, 1, 2, 0, 1, 3, 0, 1, 4, 0, 1, 5, 2, 3, 4, 2, 3, 5, 3, 4, 5]]
    found = score("delaunay", lambda points: torch.tensor(most).expand(len(points), -1))
    assert found == pytest.approx(TRIALS["delaunay"].guessing, abs=4 * 0.2 / sqrt(500))


def test_guessing_tours_is_any_order():
    random = torch.Generator().manual_seed(0)
    found = score("tour", lambda points: torch.rand(points.shape[:2], generator=random).argsort(1))
    assert found == pytest.approx(TRIALS["tour"].guessing, abs=4 * 0.25 / sqrt(600))


@pytest.mark.parametrize("task", ["hull", "tour"])
def test_batches_cycle_through_the_numbers_of_points(task: str):
    trial, seen = TRIALS[task], []

    class Watch(nn.Module):
        def loss(self, points: Tensor, answers: Tensor) -> Tensor:
            seen.append(tuple(points.shape[:2]))
            assert abs(float(points.mean())) < 0.15
            assert abs(float(points.var()) - 1) < 0.15
            return torch.zeros(())

    for step in range(4):
        trial.loss(Watch(), step, torch.Generator().manual_seed(step), CPU)
    assert seen == [(64, size) for size in (*trial.sizes, trial.sizes[0])]


@pytest.mark.parametrize("task", POINTING)
def test_scores_are_written_with_their_unit(task: str):
    written = {"hull": "50.0%", "delaunay": "50.0%", "tour": "0.500 times the shortest"}
    assert TRIALS[task].score(0.5) == written[task]
    found = results({task: {"pointer": [[0.25, 0.75]], "multi_head": [[0.5, 0.5]]}}, tasks=[task])
    columns = {"hull": "hull, % right", "delaunay": "delaunay, % triangle coverage", "tour": "tour, relative length"}
    assert overview(found).columns[1] == columns[task]


def test_the_verdict_on_tours_names_length_time_and_model():
    """Times are those of self-attention, which a pointing layer has over as many points."""
    scores = {"pointer": [[1.01, 1.02, 1.03]], "multi_head": [[1.10, 1.11, 1.12]]}
    milliseconds = {"noncausal self": {512: {"pointer": 9.0, "multi_head": 3.0}}}
    said = [sentence.text for sentence in results({"tour": scores}, milliseconds, tasks=["tour"]).summary.verdict]
    assert said[0] == (
        "For tours on this machine use pointer at 512 tokens. It is the best with 1.020 times the shortest; every "
        "other is surely worse; at 512 tokens it trains 3.0× slower than exact attention."
    )
    assert any("pointer networks of width 64, 2 heads, at most 8 points; 2000 steps" in text for text in said)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["pointer", "multi_head"])
@pytest.mark.parametrize(("task", "enough"), [("hull", 0.6), ("delaunay", 0.42), ("tour", 1.05)])
def test_small_networks_learn_far_beyond_guessing(task: str, enough: float, key: str):
    try:
        found = train(task, Variant(key), 0, CPU).score
    finally:
        torch.use_deterministic_algorithms(False)
    sign = 1 if TRIALS[task].better == "higher" else -1
    assert sign * found > sign * enough > sign * TRIALS[task].guessing
