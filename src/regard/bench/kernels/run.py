"""Checked settings, the cases they ask for, and measuring those that the results do not hold yet."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from regard.bench.kernels.adapters import KERNELS
from regard.bench.kernels.measure import make_problem, measure_case
from regard.bench.kernels.patterns import PATTERNS, SHORTEST
from regard.bench.kernels.results import KernelResults, KernelSettings, KernelStore, Phase
from regard.bench.plan import check_shape
from regard.bench.results import Refusal

PHASES: tuple[Phase, ...] = ("forward", "training")


@dataclass(frozen=True)
class Case:
    """One mask, one length, forward or forward and backward."""

    pattern: str
    length: int
    phase: Phase

    def __str__(self) -> str:
        return f"{self.pattern} {self.length} {self.phase}"


Watch = Callable[[Case, str], None]
"""Told of each case when it is "started", "done" or, if a kernel was wrong or failed, "failed"."""


def installed(names: Iterable[str] = ()) -> list[str]:
    """The kernels of these names, or all, that can be measured here. Raises Refusal for an unknown or absent one."""
    names = [*dict.fromkeys(names)]
    for name in names:
        _known("engine", name, KERNELS)
        if (reason := KERNELS[name].absent) is not None:
            raise Refusal(f"engine {name!r} cannot be measured: {reason}; install it or leave it out")
    return names or [name for name, kernel in KERNELS.items() if kernel.absent is None]


def absent() -> dict[str, str]:
    """The kernels that cannot be measured here, and why."""
    reasons = {name: kernel.absent for name, kernel in KERNELS.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def check(settings: KernelSettings) -> None:
    """Raise Refusal for settings that cannot be measured."""
    for pattern in settings.patterns:
        _known("pattern", pattern, PATTERNS)
    if not settings.patterns:
        raise Refusal(f"patterns is empty; valid values: {', '.join(PATTERNS)}")
    check_shape(settings.lengths, settings.dim, settings.heads, settings.dtype, settings.device)
    if min(settings.lengths) < SHORTEST:
        raise Refusal(f"length {min(settings.lengths)} is too short for the patterns; give at least {SHORTEST}")


def cases(settings: KernelSettings) -> list[Case]:
    """Short lengths first."""
    return [
        Case(pattern, length, phase)
        for length in sorted({*settings.lengths})
        for pattern in settings.patterns
        for phase in PHASES
    ]


def waiting(results: KernelResults) -> list[Case]:
    """What `results` do not hold yet."""
    return [case for case in cases(results.settings) if str(case) not in results.cases]


def expected_seconds(case: Case, settings: KernelSettings) -> float:
    """A rough guess, for the progress bar."""
    pairs = (case.length / 4096) ** 2 * settings.heads * settings.dim / 256
    return 1.0 + (3.0 if case.phase == "forward" else 10.0) * pairs


def run(results: KernelResults, store: KernelStore, watch: Watch) -> None:
    """Measure what is missing. Each case is on disk when it is done: an interruption loses only the one at work."""
    settings = results.settings
    kernels = [KERNELS[name] for name in settings.engines]
    results.absent = absent()
    store.write(results)
    for case in waiting(results):
        watch(case, "started")
        problem = make_problem(
            case.pattern,
            case.length,
            case.phase,
            heads=settings.heads,
            dim=settings.dim,
            dtype=getattr(torch, settings.dtype),
            device=torch.device(settings.device),
            seed=settings.seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what other libraries have to say is not about the measurement
            measured = measure_case(problem, case.pattern, kernels)
        results.cases[str(case)] = measured
        store.write(results)
        watch(case, "failed" if measured.wrong or measured.failed else "done")


def _known(kind: str, name: str, valid: Iterable[str]) -> None:
    if name not in valid:
        raise Refusal(f"{kind} {name!r} is not known; valid values: {', '.join(valid)}")
