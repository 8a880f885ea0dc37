"""Every mechanism under the four ways to attend: noncausal or causal, over oneself or over a context.

The questions of "CAB: Comprehensive Attention Benchmarking on Long Sequence Modeling", Zhang et al., 2022, arXiv
2210.07661: from which length is a mechanism faster than exact attention, and how good is it over several tasks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import get_args

from regard.bench.plan import BASELINE, MOST_WORKERS, Plan, affordable_seeds, check_shape, parse_variants
from regard.bench.quality import TRIALS
from regard.bench.results import Interval, Refusal, Settings
from regard.bench.variant import Variant
from regard.catalogue import Pattern, mechanisms

PATTERNS: tuple[Pattern, ...] = get_args(Pattern)


@dataclass(frozen=True)
class PatternsPlan(Plan):
    """A comparison under all four patterns. What a mechanism cannot do is told by it, and the others are measured."""

    patterns: tuple[Pattern, ...] = PATTERNS


def default_mechanisms() -> list[str]:
    """All that attend, exact attention first."""
    return [str(BASELINE), *(key for key in mechanisms() if key != str(BASELINE) and _attends(Variant(key)))]


def make_patterns_plan(settings: Settings, budget: float, *, threads: int) -> PatternsPlan:
    """Check the settings and choose the number of seeds that `budget` minutes allow. Raises Refusal."""
    variants = parse_variants(settings.mechanisms)
    for variant in variants:
        if not _attends(variant):
            raise Refusal(f"mechanism {variant} is a gate, which attends in none of the patterns {', '.join(PATTERNS)}")
    for task in settings.tasks:
        if task not in TRIALS:
            raise Refusal(f"task {task!r} is not known; valid values: {', '.join(TRIALS)}, or none")
    check_shape(settings.lengths, settings.dim, settings.heads, settings.dtype, settings.device)
    if settings.dim % settings.heads:
        raise Refusal(f"heads {settings.heads} does not divide dim {settings.dim}; give a divisor of it")
    if not budget > 0:
        raise Refusal(f"budget {budget:g} minutes; give a positive number")
    plan = PatternsPlan(settings, variants, 1, min(threads, MOST_WORKERS) if settings.device == "cpu" else 1)
    return replace(plan, seeds=affordable_seeds(plan, budget * 60))


def compositional_index(quality: Mapping[str, Mapping[str, Interval]]) -> dict[str, dict[str, float]]:
    """By pattern and mechanism, the mean over tasks of how many standard deviations it is better than the average.

    CAB's index: a score less the mean over the mechanisms of the task, over their standard deviation, its sign turned
    where lower is better. Its constants are those of its own mechanisms; here they are of those measured. A mechanism
    that lacks one of the tasks that others under its pattern have has no index, which would be of easier tasks.
    """
    standard: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for task, scores in quality.items():
        means = {name: found.score for name, found in scores.items()}
        spread = pstdev(means.values())
        if spread > 0:
            middle, sign = fmean(means.values()), 1 if TRIALS[task].better == "higher" else -1
            standard[TRIALS[task].pattern][task] = {
                name: sign * (score - middle) / spread for name, score in means.items()
            }
    return {pattern: _averaged(by_task) for pattern, by_task in standard.items()}


def _averaged(by_task: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Best first."""
    complete = set.intersection(*(set(scores) for scores in by_task.values()))
    index = {name: fmean(scores[name] for scores in by_task.values()) for name in complete}
    return dict(sorted(index.items(), key=lambda item: (-item[1], item[0])))


def _attends(variant: Variant) -> bool:
    return bool(variant.card.contract.patterns)
