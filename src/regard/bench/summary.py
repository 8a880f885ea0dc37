"""What follows from the measured cells: intervals, ties, fronts and efficiency lengths."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev

from scipy import stats

from regard.bench.patterns import compositional_index
from regard.bench.plan import BASELINE
from regard.bench.quality import TRIALS, Trial
from regard.bench.results import Interval, QualityCell, Results, Seconds, Summary, TimingCell
from regard.bench.verdict import CLOSE, verdict

TOLERANCE = {"accuracy": 0.005, "bits per byte": 0.01, "triangle coverage": 0.005, "relative length": 0.001}
"""Differences below these are too small to matter, however sure they are."""

LUCK = {"accuracy": 0.05, "bits per byte": 0.04, "triangle coverage": 0.15, "relative length": 0.002}
"""What two trainings of one model may differ by: twice the spread of a difference, as seen over five seeds of the
default mechanisms (the standard deviation over seeds was up to 0.02 on digits, and about 0.015 on text), and over four
or five of multi_head and pointer on the geometry (up to 0.015 on hulls, 0.06 on triangulations, 0.0006 on tours)."""

FEWEST_SEEDS = 3
"""From so many seeds on an interval is one over seeds."""


def summarize(results: Results) -> Summary:
    """Everything that `results` say beyond their cells."""
    cells: dict[str, dict[str, list[QualityCell]]] = defaultdict(lambda: defaultdict(list))
    for cell in results.quality.values():
        cells[cell.task][cell.mechanism].append(cell)
    quality = {
        task: {name: interval(TRIALS[task], found) for name, found in by_mechanism.items()}
        for task, by_mechanism in cells.items()
    }
    summary = Summary(
        quality=quality,
        equal_to_best={task: equal_to_best(TRIALS[task], by_mechanism) for task, by_mechanism in cells.items()},
        pareto={task: pareto(TRIALS[task], scores, times_of(results, task)) for task, scores in quality.items()},
        efficiency_length=efficiency_lengths(results.timing),
        state_growth=state_growth(results.timing),
        compositional_index=compositional_index(quality),
    )
    summary.verdict = verdict(results, summary)
    return summary


def interval(trial: Trial, cells: Sequence[QualityCell]) -> Interval:
    """The mean score and its 95% interval: Student's over three or more seeds, else over the test samples.

    Over samples it is Wilson's for an accuracy, the normal one otherwise.
    """
    scores, samples = [cell.score for cell in cells], _mean_samples(cells)
    score, count = fmean(scores), len(samples)
    if len(cells) >= FEWEST_SEEDS:
        low, high = _student(scores)
    elif trial.metric == "accuracy":
        low, high = stats.binomtest(round(score * count), count).proportion_ci(method="wilson")
    else:
        low, high = _normal(samples)
    levels, most = cells[0].by, 1.0 if trial.unit == "%" else math.inf
    return Interval(
        score=score,
        low=min(max(float(low), 0.0), score),
        high=max(min(float(high), most), score),
        over="seeds" if len(cells) >= FEWEST_SEEDS else "test samples",
        seeds=len(cells),
        samples=count,
        by={level: fmean(cell.by[level] for cell in cells) for level in levels},
    )


def equal_to_best(trial: Trial, cells: Mapping[str, Sequence[QualityCell]]) -> list[str]:
    """The best mechanism and those that are not surely worse than it, best first.

    Surely worse: the 95% interval of the difference, seed by seed, lies beyond the tolerance; with fewer than three
    seeds in common it is the interval sample by sample, and it lies beyond what the luck of a training explains.
    """
    sign = 1 if trial.better == "higher" else -1
    # A budget may end among the mechanisms of a seed: whoever missed a hard seed is not better for it.
    common = set.intersection(*({cell.seed for cell in found} for found in cells.values()))
    if common:
        cells = {name: [cell for cell in found if cell.seed in common] for name, found in cells.items()}
    ranked = sorted(cells, key=lambda name: -sign * fmean(cell.score for cell in cells[name]))
    best = cells[ranked[0]]
    equal = []
    for name in ranked:
        lost = [sign * difference for difference in _paired(best, cells[name])]
        by_seed = _common_seeds(best, cells[name]) >= FEWEST_SEEDS
        low, _ = _student(lost) if by_seed else _normal(lost)
        if low <= (TOLERANCE if by_seed else LUCK)[trial.metric]:
            equal.append(name)
    return equal


def pareto(trial: Trial, scores: Mapping[str, Interval], seconds: Mapping[str, float]) -> list[str]:
    """The mechanisms, fastest first, that no other one beats in quality without being slower."""
    sign = 1 if trial.better == "higher" else -1
    known = [name for name in scores if name in seconds]
    front: list[str] = []
    for name in sorted(known, key=lambda name: (seconds[name], -sign * scores[name].score)):
        if not front or sign * scores[name].score > sign * scores[front[-1]].score:
            front.append(name)
    return front


def times_of(results: Results, task: str) -> dict[str, float]:
    """Seconds of forward and backward at the longest length timed under the pattern it is timed as."""
    cells = [cell for cell in results.timing.values() if cell.pattern == TRIALS[task].timed_as]
    longest = max(cells, key=lambda cell: cell.length, default=None)
    return {name: layer.training.median for name, layer in longest.layers.items()} if longest else {}


def efficiency_lengths(timing: Mapping[str, TimingCell]) -> dict[str, dict[str, dict[str, float | None]]]:
    """By pattern, mechanism and phase, the length from which it is faster than exact attention.

    Interpolated between the lengths measured, on logarithmic axes.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = defaultdict(lambda: defaultdict(dict))
    for pattern in dict.fromkeys(cell.pattern for cell in timing.values()):
        cells = sorted((cell for cell in timing.values() if cell.pattern == pattern), key=lambda cell: cell.length)
        for name in dict.fromkeys(name for cell in cells for name in cell.layers if name != str(BASELINE)):
            for phase in ("forward", "training", "step"):
                gains = [(cell.length, gain) for cell in cells if (gain := _gain(cell, name, phase)) is not None]
                if gains:
                    found[pattern][name][phase] = efficiency_length(gains)
    return {pattern: dict(by_mechanism) for pattern, by_mechanism in found.items()}


def efficiency_length(gains: Sequence[tuple[int, float]]) -> float | None:
    """The length from which the gain stays above 1: 0 if it always is.

    None if it is not clearly above 1 at the longest, where a difference that may be noise counts as none.
    """
    if gains[-1][1] < CLOSE:
        return None
    for (before, slower), (after, faster) in reversed([*pairwise(gains)]):
        if slower <= 1:
            part = -math.log(slower) / (math.log(faster) - math.log(slower))
            return before * (after / before) ** part
    return 0.0


def state_growth(timing: Mapping[str, TimingCell]) -> dict[str, float]:
    """Bytes that a further token adds to what one layer keeps, between the two longest lengths."""
    cells = sorted((cell for cell in timing.values() if cell.pattern == "causal self"), key=lambda cell: cell.length)
    if len(cells) < 2:
        return {}
    shorter, longer = cells[-2:]
    kept = {name: (shorter.layers.get(name), layer) for name, layer in longer.layers.items()}
    return {
        name: (after.state_bytes - before.state_bytes) / (longer.length - shorter.length)
        for name, (before, after) in kept.items()
        if before is not None and before.state_bytes is not None and after.state_bytes is not None
    }


def _gain(cell: TimingCell, name: str, phase: str) -> float | None:
    times: list[Seconds | None] = [
        getattr(cell.layers[layer], phase) if layer in cell.layers else None for layer in (str(BASELINE), name)
    ]
    exact, own = times
    return exact.median / own.median if exact is not None and own is not None else None


def _mean_samples(cells: Sequence[QualityCell]) -> list[float]:
    """The score of each test sample, averaged over seeds."""
    return [fmean(values) for values in zip(*(cell.samples for cell in cells), strict=True)]


def _common_seeds(one: Sequence[QualityCell], other: Sequence[QualityCell]) -> int:
    return len({cell.seed for cell in one} & {cell.seed for cell in other})


def _paired(one: Sequence[QualityCell], other: Sequence[QualityCell]) -> list[float]:
    """Differences on the same test: of each seed where there are enough common ones, else of each sample."""
    if _common_seeds(one, other) >= FEWEST_SEEDS:
        by_seed = {cell.seed: cell.score for cell in other}
        return [cell.score - by_seed[cell.seed] for cell in one if cell.seed in by_seed]
    return [mine - theirs for mine, theirs in zip(_mean_samples(one), _mean_samples(other), strict=True)]


def _student(values: Sequence[float]) -> tuple[float, float]:
    return _around(values, float(stats.t.ppf(0.975, len(values) - 1)))


def _normal(values: Sequence[float]) -> tuple[float, float]:
    return _around(values, float(stats.norm.ppf(0.975)))


def _around(values: Sequence[float], quantile: float) -> tuple[float, float]:
    middle = fmean(values)
    reach = quantile * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return middle - reach, middle + reach
