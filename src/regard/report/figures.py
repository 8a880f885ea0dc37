"""The figures of a report. Every point carries the JSON pointer of its number in ``results.json``.

Mechanisms differ in colour (Okabe and Ito's, which the colour-blind tell apart), in marker and in dash.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from regard.bench.quality import TRIALS
from regard.bench.results import Results
from regard.bench.verdict import timed

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("circle", "square", "diamond", "cross", "triangle-up", "star", "triangle-down", "x", "pentagon", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
PHASES = {
    "forward": "forward",
    "training": "forward and backward",
    "step": "one decode step",
}


@dataclass(frozen=True)
class Point:
    """A number of the report: the place it comes from, where it stands, and how it is written."""

    mechanism: str
    x: float
    y: float
    source: str
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Figure:
    """A chart, its caption, and its points as a table."""

    name: str
    title: str
    caption: str
    x: str
    points: tuple[Point, ...]
    chart: go.Figure

    @property
    def json(self) -> str:
        return self.chart.to_json()  # pyright: ignore[reportReturnType] it is a string


def figures(results: Results) -> list[Figure]:
    """What the results allow, in the order of the page."""
    made = [
        *(quality_and_speed(results, task) for task in TRIALS if results.summary.pareto.get(task)),
        *([recall(results)] if results.summary.quality.get("recall") else []),
    ]
    for pattern in dict.fromkeys(cell.pattern for cell in results.timing.values()):
        made += [time(results, pattern, phase) for phase in PHASES if _has(results, pattern, phase)]
        made += [memory(results, pattern)] if _points(results, pattern, "training_peak_bytes", 1e6) else []
    return made


def quality_and_speed(results: Results, task: str) -> Figure:
    """Score over training time, with the Pareto front."""
    trial, scores = TRIALS[task], results.summary.quality[task]
    cell = timed(results, trial.timed_as)[-1]
    points = [
        Point(
            name,
            cell.layers[name].training.median * 1e3,
            found.score,
            f"/summary/quality/{task}/{name}/score",
            trial.score(found.score),
            found.low,
            found.high,
        )
        for name, found in scores.items()
        if name in cell.layers
    ]
    front = [next(point for point in points if point.mechanism == name) for name in results.summary.pareto[task]]
    chart = go.Figure()
    chart.add_scatter(
        x=[point.x for point in front],
        y=[point.y for point in front],
        mode="lines",
        line={"color": "#888", "dash": "dot", "shape": "hv"},
        name="Pareto front",
        hoverinfo="skip",
    )
    for point, style in zip(points, _styles(results, points), strict=True):
        chart.add_scatter(
            x=[point.x],
            y=[point.y],
            error_y={
                "array": [(point.high or point.y) - point.y],
                "arrayminus": [point.y - (point.low or point.y)],
                "thickness": 1,
            },
            mode="markers",
            marker={"size": 12, **style.marker},
            **_named(point.mechanism, [point.source]),
        )
    better = "up" if trial.better == "higher" else "down"
    ticks = _ticks([point.x for point in points])
    chart.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    _axes(chart, f"ms to train, {cell.length} tokens (log)", f"{trial.metric} (better: {better})")
    seeds = min(found.seeds for found in scores.values())
    samples = next(iter(scores.values()))
    return Figure(
        f"quality-{task}",
        f"{trial.subject.capitalize()}: quality and speed",
        f"Quality: {trial.metric} of small models trained on {task}, {_count(seeds, 'seed')}, "
        f"{samples.samples} test samples; bars are 95% intervals over {samples.over}. Guessing gives "
        f"{trial.score(trial.guessing)}. Time: forward and backward, {_layer(results)}, {trial.timed_as}. "
        "Nothing is both better and faster than a mechanism on the dotted front.",
        "ms",
        tuple(points),
        chart,
    )


def recall(results: Results) -> Figure:
    """Accuracy over the number of pairs to be kept."""
    scores = results.summary.quality["recall"]
    points = [
        Point(name, float(pairs), value, f"/summary/quality/recall/{name}/by/{pairs}", f"{100 * value:.1f}%")
        for name, found in scores.items()
        for pairs, value in found.by.items()
    ]
    kept = {cell.mechanism: cell.state_bytes for cell in results.quality.values() if cell.task == "recall"}
    chart = _lines(results, points, {name: f"{name}, {_kilobytes(kept.get(name))}" for name in scores})
    _axes(chart, "key–value pairs (log)", "accuracy (better: up)")
    chart.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
    chart.update_xaxes(tickvals=sorted({point.x for point in points}))
    first = next(iter(scores.values()))
    trained = next(cell for cell in results.quality.values() if cell.task == "recall")
    return Figure(
        "recall",
        "Recall and capacity",
        "Multi-query associative recall: after so many key–value pairs, each key is asked for once. One model for all "
        f"numbers of pairs, {trained.steps} training steps, {_count(first.seeds, 'seed')}, "
        f"{first.samples // max(1, len(first.by))} test sequences per point. The legend says what the mechanisms of "
        "the trained model keep while decoding, after 256 tokens.",
        "pairs",
        tuple(points),
        chart,
    )


def time(results: Results, pattern: str, phase: str) -> Figure:
    """Milliseconds over length."""
    points = [
        Point(
            name,
            cell.length,
            seconds.median * 1e3,
            f"/timing/{pattern} {cell.length}/layers/{name}/{phase}/median",
            f"{seconds.median * 1e3:.3g} ms",
            seconds.low * 1e3,
            seconds.high * 1e3,
        )
        for cell in timed(results, pattern)
        for name, layer in cell.layers.items()
        if (seconds := getattr(layer, phase)) is not None
    ]
    chart = _lines(results, points)
    _length_axes(chart, points, f"ms, {PHASES[phase]} (log)")
    runs = [
        getattr(layer, phase).runs
        for cell in timed(results, pattern)
        for layer in cell.layers.values()
        if getattr(layer, phase)
    ]
    return Figure(
        f"time-{pattern}-{phase}".replace(" ", "-"),
        f"Time: {PHASES[phase]}, {pattern}",
        f"Median of {min(runs)} to {max(runs)} runs; {_layer(results)}, {results.machine.threads} threads. The "
        "mechanisms take turns." + (" The step follows so many tokens." if phase == "step" else ""),
        "tokens",
        tuple(points),
        chart,
    )


def memory(results: Results, pattern: str) -> Figure:
    """Megabytes over length."""
    points = _points(results, pattern, "training_peak_bytes", 1e6)
    chart = _lines(results, points)
    _length_axes(chart, points, "MB, peak of forward and backward (log)")
    return Figure(
        f"memory-{pattern}".replace(" ", "-"),
        f"Memory: training, {pattern}",
        "The most that torch holds during one forward and backward beyond input and parameters, by its allocator; "
        f"{_layer(results)}; 1 run, it does not vary.",
        "tokens",
        tuple(points),
        chart,
    )


def _points(results: Results, pattern: str, field: str, unit: float) -> list[Point]:
    return [
        Point(
            name,
            cell.length,
            value / unit,
            f"/timing/{pattern} {cell.length}/layers/{name}/{field}",
            f"{value / unit:.3g} MB",
        )
        for cell in timed(results, pattern)
        for name, layer in cell.layers.items()
        if (value := getattr(layer, field)) is not None
    ]


def _has(results: Results, pattern: str, phase: str) -> bool:
    return any(getattr(layer, phase) is not None for cell in timed(results, pattern) for layer in cell.layers.values())


@dataclass(frozen=True)
class Style:
    marker: dict[str, object]
    line: dict[str, object]


def _styles(results: Results, points: Iterable[Point]) -> Iterator[Style]:
    """The same look for a mechanism in every figure: by its place among all of the results."""
    names = [
        *dict.fromkeys(
            [*results.settings.mechanisms, *(name for cell in results.timing.values() for name in cell.layers)]
        )
    ]
    for point in points:
        place = names.index(point.mechanism)
        colour = COLOURS[place % len(COLOURS)]
        yield Style(
            {"color": colour, "symbol": MARKERS[place % len(MARKERS)]},
            {"color": colour, "dash": DASHES[place % len(DASHES)], "width": 2},
        )


def _lines(results: Results, points: Sequence[Point], names: dict[str, str] | None = None) -> go.Figure:
    chart = go.Figure()
    for name in dict.fromkeys(point.mechanism for point in points):
        own = [point for point in points if point.mechanism == name]
        style = next(_styles(results, own))
        chart.add_scatter(
            x=[point.x for point in own],
            y=[point.y for point in own],
            mode="lines+markers",
            marker={"size": 9, **style.marker},
            line=style.line,
            **_named((names or {}).get(name, name), [point.source for point in own]),
        )
    return chart


def _named(name: str, sources: list[str]) -> dict[str, object]:
    return {
        "name": name,
        "customdata": sources,
        "hovertemplate": "%{fullData.name}<br>%{x:.4g}: %{y:.4g}<br><i>%{customdata}</i><extra></extra>",
    }


def _axes(chart: go.Figure, x: str, y: str) -> None:
    chart.update_layout(
        template="simple_white",
        margin={"l": 60, "r": 12, "t": 12, "b": 48},
        legend={"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
        height=460,
        font={"family": "system-ui, sans-serif", "size": 13},
        hovermode="closest",
    )
    chart.update_xaxes(title=x, type="log", showgrid=True, automargin=True)
    chart.update_yaxes(title=y, showgrid=True, automargin=True)


def _length_axes(chart: go.Figure, points: Sequence[Point], y: str) -> None:
    """Both axes logarithmic, with the lengths measured as ticks."""
    _axes(chart, "tokens (log)", y)
    ticks = _ticks([point.y for point in points])
    chart.update_xaxes(tickvals=sorted({point.x for point in points}))
    chart.update_yaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def _ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times the powers of ten around the positive values."""
    exponents = [math.log10(value) for value in values if value > 0] or [0.0]
    powers = range(math.floor(min(exponents)), math.ceil(max(exponents)) + 1)
    return [digit * 10.0**power for power in powers for digit in (1, 2, 5)]


def _layer(results: Results) -> str:
    settings = results.settings
    return f"one layer of width {settings.dim}, {settings.heads} heads, batch 1, {settings.dtype}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _kilobytes(count: int | None) -> str:
    return "no state" if count is None else f"keeps {count / 1e3:.3g} kB"
