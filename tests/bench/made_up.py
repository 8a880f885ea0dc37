"""Results that nobody measured, for the rules that follow from numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from regard.bench.results import LayerTiming, Machine, QualityCell, Results, Seconds, Settings, TimingCell
from regard.bench.summary import summarize

MACHINE = Machine(
    processor="made up", cores=2, threads=2, device="cpu", system="none", python="3", torch="2", regard="0"
)
PATTERNS = {"text": "causal self", "recall": "causal self", "digits": "noncausal self"}


def seconds(median: float) -> Seconds:
    return Seconds(median=median, low=0.9 * median, high=1.1 * median, runs=5)


def layer(training: float, *, step: float | None = None, state_bytes: int | None = None) -> LayerTiming:
    return LayerTiming(
        forward=seconds(training / 3),
        training=seconds(training),
        step=seconds(step) if step else None,
        forward_flops=1e6,
        training_flops=3e6,
        forward_share=0.5,
        training_share=0.5,
        forward_peak_bytes=10**6,
        training_peak_bytes=3 * 10**6,
        state_bytes=state_bytes,
    )


def quality(task: str, mechanism: str, seed: int, samples: Sequence[float], **more: object) -> QualityCell:
    return QualityCell(
        task=task,
        mechanism=mechanism,
        seed=seed,
        score=sum(samples) / len(samples),
        samples=list(samples),
        steps=10,
        parameters=1000,
        train_seconds=1.0,
        **more,
    )


def results(
    scores: Mapping[str, Mapping[str, Sequence[Sequence[float]]]] | None = None,
    milliseconds: Mapping[str, Mapping[int, Mapping[str, float]]] | None = None,
    *,
    tasks: Sequence[str] = ("recall", "text", "digits"),
    by: Mapping[str, Mapping[str, float]] | None = None,
    state_bytes: Mapping[str, Mapping[int, int]] | None = None,
) -> Results:
    """Results with `scores` by task and mechanism (samples of each seed) and times by pattern, length and mechanism."""
    scores, milliseconds, by, state_bytes = scores or {}, milliseconds or {}, by or {}, state_bytes or {}
    names = dict.fromkeys(name for found in scores.values() for name in found)
    made = Results(
        settings=Settings(
            mechanisms=list(names) or ["multi_head"],
            tasks=list(tasks),
            lengths=[512],
            dim=64,
            heads=2,
            dtype="float32",
            device="cpu",
            seed=0,
        ),
        machine=MACHINE,
    )
    for task, found in scores.items():
        for name, seeds in found.items():
            for seed, samples in enumerate(seeds):
                cell = quality(task, name, seed, samples, by=dict(by.get(name, {})) if task == "recall" else {})
                made.quality[f"{task} {name} {seed}"] = cell
    for pattern, lengths in milliseconds.items():
        for length, found in lengths.items():
            layers = {}
            for name, value in found.items():
                kept = state_bytes.get(name, {}).get(length)
                layers[name] = layer(value / 1e3, step=value / 1e5 if kept is not None else None, state_bytes=kept)
            cell = TimingCell(pattern=pattern, length=length, gemm_flops=1e11, copy_bytes=1e10, layers=layers)
            made.timing[f"{pattern} {length}"] = cell
    made.summary = summarize(made)
    return made
