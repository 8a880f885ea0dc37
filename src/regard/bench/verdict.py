"""The verdict in words. Each sentence follows from the numbers by one rule, and names the numbers it follows from.

A task's recommendation, at each length timed: of the mechanisms that learned the task and are not surely worse than the
best of them, the fastest in forward and backward; of those within 5% of its time, the one with the best score.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from regard.bench.quality import TRIALS, Trial
from regard.bench.results import Interval, Results, Sentence, Summary, TimingCell

EXACT = "multi_head"
CLOSE = 1.05
"""Times within this factor count as equal."""
MUCH_FASTER = 1.25
"""From this factor on a faster but worse mechanism is worth a word."""
UNSTEADY = 1.5
"""Quartiles of a quiet machine are closer than this: nine in ten were within 1.07, on a busy one beyond 2.9."""
SOLVED = 0.95
"""A capacity counts as held from this accuracy on."""


def verdict(results: Results, summary: Summary) -> list[Sentence]:
    """The sentences, most useful first."""
    sentences = [
        sentence for task in TRIALS if task in results.settings.tasks for sentence in _task(task, results, summary)
    ]
    return [
        *sentences,
        *_capacity(summary),
        *_efficiency(results, summary),
        *_decoding(results, summary),
        *_busy(results),
        *_caveats(summary),
    ]


def size(count: float) -> str:
    """Bytes as they are written everywhere."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} bytes"


def learned(trial: Trial, found: Interval) -> bool:
    """Whether a score is surely better than guessing."""
    return found.low > trial.guessing if trial.better == "higher" else found.high < trial.guessing


def _task(task: str, results: Results, summary: Summary) -> Iterable[Sentence]:
    trial, scores = TRIALS[task], summary.quality.get(task, {})
    subject = trial.subject
    source = f"/summary/quality/{task}"
    if not scores:
        yield Sentence(
            text=f"Nothing can be said about {subject}: no model has been trained on it yet.", sources=[source]
        )
        return
    sign = 1 if trial.better == "higher" else -1
    best = max(scores, key=lambda name: sign * scores[name].score)
    able = [name for name in scores if learned(trial, scores[name])]
    if not able:
        yield Sentence(
            text=f"No mechanism learned {subject}: the best, {best}, reaches {trial.score(scores[best].score)}, and "
            f"guessing {trial.score(trial.guessing)}. No advice follows.",
            sources=[source],
        )
        return
    if len(scores) == 1:
        yield Sentence(
            text=f"{best} reaches {trial.score(scores[best].score)} on {subject}; nothing was compared with it.",
            sources=[f"{source}/{best}"],
        )
        return
    equal = [name for name in summary.equal_to_best[task] if name in able]
    cells = timed(results, trial.timed_as)
    choices = [(cell, _fastest(equal, scores, cell, sign)) for cell in cells]
    choices = [(cell, name) for cell, name in choices if name is not None]
    sources = [f"/summary/equal_to_best/{task}", f"{source}/{best}"]
    if not choices:
        reason = f"It is best with {trial.score(scores[best].score)}{_as_good(equal)}. Speed was not measured."
        yield _advice(task, best, reason, sources)
        return
    timings = [f"/timing/{cell.pattern} {cell.length}" for cell, _ in choices]
    yield _advice(task, _ranges(choices), _why(trial, best, equal, scores, *choices[-1]), [*sources, *timings])
    cell, chosen = choices[-1]
    faster = _fastest(able, scores, cell, sign)
    if faster is not None and _seconds(cell, chosen) > MUCH_FASTER * _seconds(cell, faster):
        gain = _seconds(cell, chosen) / _seconds(cell, faster)
        yield Sentence(
            text=f"If quality may suffer: {faster} trains {gain:.1f}× as fast as {chosen} at {cell.length} tokens and "
            f"reaches {trial.score(scores[faster].score)} instead of {trial.score(scores[chosen].score)}.",
            sources=[f"/timing/{cell.pattern} {cell.length}", f"{source}/{faster}", f"{source}/{chosen}"],
        )


def _advice(task: str, choice: str, reason: str, sources: list[str]) -> Sentence:
    text = f"For {TRIALS[task].subject} on this machine use {choice}. {reason}"
    return Sentence(kind="advice", text=text, sources=sources, task=task, choice=choice, reason=reason)


def timed(results: Results, pattern: str) -> list[TimingCell]:
    """The timings under a pattern, short lengths first."""
    cells = (cell for cell in results.timing.values() if cell.pattern == pattern)
    return sorted(cells, key=lambda cell: cell.length)


def _seconds(cell: TimingCell, name: str) -> float:
    return cell.layers[name].training.median


def _fastest(names: Iterable[str], scores: Mapping[str, Interval], cell: TimingCell, sign: int) -> str | None:
    there = [name for name in names if name in cell.layers]
    if not there:
        return None
    least = min(_seconds(cell, name) for name in there)
    close = [name for name in there if _seconds(cell, name) <= CLOSE * least]
    return max(close, key=lambda name: sign * scores[name].score)


def _ranges(choices: Sequence[tuple[TimingCell, str]]) -> str:
    """``a up to 1024 tokens, b from 2048``."""
    runs = [
        (name, [cell.length for cell, _ in group]) for name, group in groupby(choices, key=lambda choice: choice[1])
    ]
    if len(runs) == 1:
        name, lengths = runs[0]
        return (
            f"{name} at {lengths[0]} tokens"
            if len(lengths) == 1
            else f"{name} from {lengths[0]} to {lengths[-1]} tokens"
        )
    parts = [
        f"{name} up to {lengths[-1]} tokens" if index == 0 else f"{name} from {lengths[0]}"
        for index, (name, lengths) in enumerate(runs)
    ]
    return ", ".join(parts)


def _as_good(equal: Sequence[str]) -> str:
    others = equal[1:]
    return f", and {_list(others)} cannot be told from it" if others else ""


def _why(
    trial: Trial, best: str, equal: Sequence[str], scores: Mapping[str, Interval], cell: TimingCell, chosen: str
) -> str:
    own = trial.score(scores[chosen].score)
    if len(equal) == 1:
        quality = f"It is the best with {own}; every other is surely worse"
    elif chosen == best:
        quality = f"It has the best score, {own}{_as_good(equal)}"
    else:
        quality = f"With {own} it cannot be told from the best, {best} ({trial.score(scores[best].score)})"
    if chosen == EXACT or EXACT not in cell.layers:
        return f"{quality}; it is the fastest of these at {cell.length} tokens."
    ratio = _seconds(cell, EXACT) / _seconds(cell, chosen)
    speed = (
        f"{ratio:.1f}× as fast as"
        if ratio >= CLOSE
        else f"{1 / ratio:.1f}× slower than"
        if ratio <= 1 / CLOSE
        else "as fast as"
    )
    return f"{quality}; at {cell.length} tokens it trains {speed} exact attention."


def _capacity(summary: Summary) -> Iterable[Sentence]:
    scores = {name: found.by for name, found in summary.quality.get("recall", {}).items() if found.by}
    if not scores:
        return
    held = {name: _held(by) for name, by in scores.items()}
    most = max(int(level) for by in scores.values() for level in by)
    all_of_it = [name for name, pairs in held.items() if pairs == most]
    parts = (
        [f"{_list(all_of_it)} {'recalls' if len(all_of_it) == 1 else 'recall'} all {most} pairs"] if all_of_it else []
    )
    for name, pairs in sorted(held.items(), key=lambda item: -item[1]):
        if pairs < most:
            upto = f"holds up to {pairs} pairs" if pairs else "does not hold even the fewest pairs"
            parts.append(f"{name} {upto} ({100 * scores[name][str(most)]:.0f}% at {most})")
    yield Sentence(text="Capacity: " + "; ".join(parts) + ".", sources=["/summary/quality/recall"])


def _held(by: Mapping[str, float]) -> int:
    held = 0
    for pairs in sorted(map(int, by)):
        if by[str(pairs)] < SOLVED:
            break
        held = pairs
    return held


def _efficiency(results: Results, summary: Summary) -> Iterable[Sentence]:
    for pattern, by_mechanism in summary.efficiency_length.items():
        longest = timed(results, pattern)[-1].length
        places = {name: phases["training"] for name, phases in by_mechanism.items() if "training" in phases}
        if not places:
            continue
        always = [name for name, length in places.items() if length == 0]
        never = [name for name, length in places.items() if length is None]
        parts = [f"{_list(always)} at every length measured"] if always else []
        between = sorted((length, name) for name, length in places.items() if length)
        parts += [f"{name} from about {_rounded(length)} tokens" for length, name in between]
        parts += [f"not {_list(never, 'nor')}, up to {longest} tokens"] if never else []
        yield Sentence(
            text=f"Faster to train than exact attention ({pattern}): {'; '.join(parts)}.",
            sources=[f"/summary/efficiency_length/{pattern}"],
        )


def _decoding(results: Results, summary: Summary) -> Iterable[Sentence]:
    cells = [cell for cell in timed(results, "causal self") if any(layer.step for layer in cell.layers.values())]
    if not cells or not summary.state_growth:
        return
    cell = cells[-1]
    steps = {name: layer.step.median for name, layer in cell.layers.items() if layer.step}
    constant = [name for name, growth in summary.state_growth.items() if growth == 0]
    growing = {name: growth for name, growth in summary.state_growth.items() if growth > 0}
    parts = []
    if constant:
        kept = ", ".join(f"{name} ({size(cell.layers[name].state_bytes or 0)})" for name in constant)
        parts.append(f"the memory of {kept} does not grow")
    if growing:
        parts.append(
            "that of " + ", ".join(f"{name} grows by {size(growth)} a token" for name, growth in growing.items())
        )
    quickest = min(steps, key=lambda name: steps[name])
    yield Sentence(
        text=f"Decoding with one layer: {'; '.join(parts)}. After {cell.length} tokens a step of {quickest} is the "
        f"quickest, {1e6 * steps[quickest]:.0f} µs.",
        sources=["/summary/state_growth", f"/timing/{cell.pattern} {cell.length}"],
    )


def _busy(results: Results) -> Iterable[Sentence]:
    layers = [layer for cell in results.timing.values() for layer in cell.layers.values()]
    times = [time for layer in layers for time in (layer.forward, layer.training, layer.step) if time is not None]
    unsteady = sum(time.high > UNSTEADY * time.low for time in times)
    if unsteady > len(times) / 10:
        yield Sentence(
            kind="caveat",
            text=f"The machine was busy: in {unsteady} of {len(times)} timings the upper quartile is more than "
            f"{UNSTEADY} times the lower. Do not trust the times; run again when it is quiet, with another "
            "--out.",
            sources=["/timing"],
        )


def _caveats(summary: Summary) -> Iterable[Sentence]:
    if not summary.quality:
        return
    fewest = min(found.seeds for scores in summary.quality.values() for found in scores.values())
    steps = [TRIALS[task].steps for task in summary.quality]
    trained = f"{min(steps)} to {max(steps)}" if len({*steps}) > 1 else f"{steps[0]}"
    models = "; ".join(dict.fromkeys(TRIALS[task].small for task in summary.quality))
    yield Sentence(
        kind="caveat",
        text=f"Quality is that of small models ({models}; {trained} steps), the same in every run: it says what a "
        "mechanism learns quickly, not what a large model reaches.",
        sources=["/summary/quality"],
    )
    if fewest < 3:
        yield Sentence(
            kind="caveat",
            text=f"Some of these scores rest on {fewest} {'seed' if fewest == 1 else 'seeds'}: their intervals cover "
            "the choice of test samples, not the luck of a training. A larger --budget trains three or five.",
            sources=["/summary/quality"],
        )


def _list(names: Sequence[str], last: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}"


def _rounded(length: float) -> int:
    return int(float(f"{length:.2g}"))
