"""What a comparison consists of: checked settings, the cells to measure, and how many seeds a budget allows."""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from regard import __version__
from regard.bench.measure import processor
from regard.bench.quality import TRIALS
from regard.bench.results import Machine, Refusal, Results, Settings
from regard.bench.variant import Variant
from regard.catalogue import Pattern

DEFAULT_MECHANISMS = (
    "multi_head",
    "gqa:kv_heads=1",
    "window:window=64",
    "sigmoid_attention",
    "lightning",
    "efficient_attention",
    "dinat:kernel_size=3",
)
DEFAULT_TASKS = ("recall", "text", "digits")
DTYPES = ("float32", "bfloat16", "float16")
BASELINE = Variant("multi_head")
"""Exact softmax attention, which every timing is compared with."""

PATTERNS: tuple[Pattern, ...] = ("causal self", "noncausal self")
MOST_WORKERS = 8
SEEDS = (5, 3, 1)
TRAINING_SECONDS, TIMING_SECONDS = 18.0, 1.5
"""What training one small model, and timing one layer of width 256 at 4096 tokens, takes on a small machine."""


@dataclass(frozen=True)
class TimingTask:
    """All variants that attend so, at one length."""

    pattern: Pattern
    length: int

    def __str__(self) -> str:
        return f"{self.pattern} {self.length}"


@dataclass(frozen=True)
class QualityTask:
    """One model to train."""

    task: str
    variant: Variant
    seed: int

    def __str__(self) -> str:
        return f"{self.task} {self.variant} {self.seed}"


@dataclass(frozen=True)
class Plan:
    """A comparison: its settings, checked, and the order in which its cells are measured."""

    settings: Settings
    variants: tuple[Variant, ...]
    seeds: int
    workers: int
    patterns: tuple[Pattern, ...] = PATTERNS

    @property
    def timing(self) -> list[TimingTask]:
        """Short lengths first."""
        return [
            TimingTask(pattern, length)
            for length in sorted({*self.settings.lengths})
            for pattern in self.patterns
            if any(variant.attends(pattern) for variant in self.variants)
        ]

    @property
    def quality(self) -> list[QualityTask]:
        """Seed by seed, so that what a short budget leaves out is the last seeds and not the last mechanisms."""
        return [
            QualityTask(task, variant, self.settings.seed + seed)
            for seed in range(self.seeds)
            for task in dict.fromkeys(self.settings.tasks)
            for variant in self.variants
            if TRIALS[task].takes(variant)
        ]

    def timed(self, pattern: Pattern) -> list[Variant]:
        """The variants timed under a pattern, with exact attention among them whether asked for or not."""
        variants = [variant for variant in self.variants if variant.attends(pattern)]
        return variants if BASELINE in variants else [BASELINE, *variants]

    def waiting(self, results: Results) -> tuple[list[TimingTask], list[QualityTask]]:
        """What `results` do not hold yet."""
        return (
            [task for task in self.timing if str(task) not in results.timing],
            [task for task in self.quality if str(task) not in results.quality],
        )


def make_plan(settings: Settings, budget: float, *, threads: int) -> Plan:
    """Check the settings and choose the number of seeds that `budget` minutes allow. Raises Refusal."""
    variants = parse_variants(settings.mechanisms)
    for variant in variants:
        if not any(variant.attends(pattern) for pattern in PATTERNS):
            declared = ", ".join(variant.card.contract.patterns)
            raise Refusal(f"mechanism {variant} has only {declared}; compare takes self-attention and gates")
    _check_tasks(settings, variants)
    _check_shape(settings, variants)
    if not budget > 0:
        raise Refusal(f"budget {budget:g} minutes; give a positive number")
    plan = Plan(settings, variants, 1, min(threads, MOST_WORKERS) if settings.device == "cpu" else 1)
    _check_runs(plan)
    return replace(plan, seeds=affordable_seeds(plan, budget * 60))


def parse_variants(mechanisms: Sequence[str]) -> tuple[Variant, ...]:
    """The mechanisms of a command line, each once. Raises Refusal."""
    try:
        variants = tuple(dict.fromkeys(map(Variant.parse, mechanisms)))
    except (ValueError, TypeError) as error:
        raise Refusal(str(error)) from None
    if not variants:
        raise Refusal("mechanisms is empty; name at least one, or leave it out")
    return variants


def _check_tasks(settings: Settings, variants: tuple[Variant, ...]) -> None:
    for task in settings.tasks:
        if task not in TRIALS:
            raise Refusal(f"task {task!r} is not known; valid values: {', '.join(TRIALS)}, or none")
        if not any(map(TRIALS[task].takes, variants)):
            given, needed = ", ".join(map(str, variants)), TRIALS[task].pattern
            also = TRIALS[task].also if any(variant.attends(needed) for variant in variants) else ""
            raise Refusal(f"task {task} needs {needed!r}{also}, which {given} cannot do; add a mechanism that can")


def _check_shape(settings: Settings, variants: tuple[Variant, ...]) -> None:
    check_shape(settings.lengths, settings.dim, settings.heads, settings.dtype, settings.device)
    shortest = min(settings.lengths)
    for variant in variants:
        parameter = inspect.signature(variant.card.cls).parameters.get("window")
        window = dict(variant.options).get("window", parameter.default if parameter else 0)
        if isinstance(window, int) and shortest <= window:
            raise Refusal(
                f"length {shortest} is too short for window {window} of {variant}, which would see everything; "
                "give longer lengths or a shorter window"
            )


def check_shape(lengths: Sequence[int], dim: int, heads: int, dtype: str, device: str) -> None:
    """Raise Refusal for sizes that are not positive, an unknown dtype, or a device that is not there."""
    for name, values in (("lengths", lengths), ("dim", [dim]), ("heads", [heads])):
        if not values or min(values) < 1:
            raise Refusal(f"{name} {','.join(map(str, values)) or 'is empty'}; give positive numbers")
    if dtype not in DTYPES:
        raise Refusal(f"dtype {dtype!r} is not known; valid values: {', '.join(DTYPES)}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Refusal(f"device {device!r} cannot be used: {_first_line(error)}") from None


def _check_runs(plan: Plan) -> None:
    """Build and run everything once where it is smallest, so that nothing fails after minutes of work."""
    settings = plan.settings
    dtype, device = getattr(torch, settings.dtype), torch.device(settings.device)
    for variant in plan.variants:
        try:
            for pattern in filter(variant.attends, PATTERNS):
                layer = variant.build(settings.dim, settings.heads, pattern, dtype=dtype, device=device)
                layer.requires_grad_(False)(variant.narrowest(settings.lengths, settings.dim, dtype, device))
            for task in settings.tasks:
                if TRIALS[task].takes(variant):
                    TRIALS[task].samples(TRIALS[task].model(variant), torch.device("cpu"), 1)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise Refusal(f"mechanism {variant} cannot run as asked: {_first_line(error)}") from None
        except ModuleNotFoundError as error:
            raise Refusal(f"{error.name} is missing; install regard with the extra 'compare'") from None


def affordable_seeds(plan: Plan, seconds: float) -> int:
    """How many seeds of all its models can be trained in so many seconds."""
    timing = sum(expected_seconds(task, plan.settings) for task in plan.timing)
    training = sum(expected_seconds(task, plan.settings) for task in plan.quality) / plan.workers
    return next((seeds for seeds in SEEDS if timing + seeds * training <= 0.9 * seconds), 1)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def expected_seconds(task: TimingTask | QualityTask, settings: Settings) -> float:
    """A rough guess, for the progress bar and the number of seeds."""
    if isinstance(task, QualityTask):
        return TRAINING_SECONDS
    pairs = (task.length / 4096) ** 2 * settings.dim / 256
    return 3.0 + 7 * TIMING_SECONDS * max(pairs, task.length / 4096 * settings.dim**2 / 256**2)


def this_machine(device: str, threads: int) -> Machine:
    """Where this process runs."""
    chosen = torch.device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else device
    return Machine(
        processor=processor(),
        cores=os.cpu_count() or 1,
        threads=threads,
        device=name,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        regard=__version__,
    )
