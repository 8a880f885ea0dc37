"""``report.html``: one file that holds everything it shows, the results and the drawing library included."""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from regard.bench.plan import PATTERNS
from regard.bench.quality import TRIALS
from regard.bench.results import Interval, Results, TimingCell
from regard.bench.verdict import EXACT, size, timed
from regard.report.figures import figures

FILE = "report.html"


@dataclass(frozen=True)
class Cell:
    """One entry of a table and the JSON pointer of its number, if it has one."""

    text: str
    source: str = ""


NOTHING = Cell("–")


@dataclass(frozen=True)
class Table:
    """Columns, and rows whose first entry names the mechanism."""

    name: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def page(results: Results) -> str:
    """The whole report."""
    environment = Environment(
        loader=PackageLoader("regard.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    drawn = figures(results)
    scripts = {"results": results.model_dump_json(indent=1), **{figure.name: figure.json for figure in drawn}}
    return environment.get_template("page.html.jinja").render(
        results=results,
        subjects={task: trial.subject for task, trial in TRIALS.items()},
        figures=drawn,
        overview=overview(results),
        details=[efficiency(results), index(results), *shares(results)],
        # A tag inside a string of JSON would end the script it stands in.
        scripts={name: Markup(text.replace("<", "\\u003c")) for name, text in scripts.items()},
        plotly=Markup(get_plotlyjs()),
    )


def overview(results: Results) -> Table:
    """Quality, time, memory and state of each mechanism, at the longest length."""
    quality, tasks = results.summary.quality, [task for task in TRIALS if task in results.summary.quality]
    cells = [cell for pattern in PATTERNS for cell in timed(results, pattern)[-1:]]
    columns = ["mechanism", *(f"{task}, {_unit(task)}" for task in tasks)]
    for cell in cells:
        columns += [f"{cell.pattern}: {what}" for what in ("ms to train", "speed against exact", "MB to train")]
        columns += ["µs a decode step", "decoding state"] if cell.pattern == "causal self" else []
    rows = [
        (
            Cell(name),
            *(_score(task, name, quality[task].get(name)) for task in tasks),
            *(entry for cell in cells for entry in _layer(cell, name)),
        )
        for name in _names(results)
    ]
    longest = max((cell.length for cell in cells), default=0)
    return Table(
        "overview",
        "All in one table",
        "Quality with 95% intervals, of small models; time, memory and decoding state of one layer at "
        f"{longest} tokens. Exact is multi_head, softmax attention. – means that the mechanism does not do it, or that "
        "it was not measured.",
        tuple(columns),
        tuple(rows),
    )


def _unit(task: str) -> str:
    trial = TRIALS[task]
    return "% right" if trial.metric == "accuracy" else f"% {trial.metric}" if trial.unit == "%" else trial.metric


def _score(task: str, name: str, found: Interval | None) -> Cell:
    if found is None:
        return NOTHING
    middle, low, high = map(TRIALS[task].number, (found.score, found.low, found.high))
    return Cell(f"{middle} [{low}, {high}]", f"/summary/quality/{task}/{name}/score")


def _layer(cell: TimingCell, name: str) -> list[Cell]:
    layer, exact = cell.layers.get(name), cell.layers.get(EXACT)
    decodes = cell.pattern == "causal self"
    if layer is None:
        return [NOTHING] * (5 if decodes else 3)
    place, peak = f"/timing/{cell.pattern} {cell.length}/layers/{name}", layer.training_peak_bytes
    entries = [
        Cell(f"{layer.training.median * 1e3:.3g}", f"{place}/training/median"),
        Cell(f"{exact.training.median / layer.training.median:.2f}×") if exact else NOTHING,
        NOTHING if peak is None else Cell(f"{peak / 1e6:.3g}", f"{place}/training_peak_bytes"),
    ]
    if decodes:
        step, kept = layer.step, layer.state_bytes
        entries.append(Cell(f"{step.median * 1e6:.0f}", f"{place}/step/median") if step else NOTHING)
        entries.append(NOTHING if kept is None else Cell(size(kept), f"{place}/state_bytes"))
    return entries


def efficiency(results: Results) -> Table:
    """Where each mechanism becomes faster than exact attention."""
    found = results.summary.efficiency_length
    columns = [
        (pattern, phase)
        for pattern in found
        for phase in ("forward", "training", "step")
        if any(phase in phases for phases in found[pattern].values())
    ]
    names = [name for name in _names(results) if any(name in by_mechanism for by_mechanism in found.values())]
    rows = []
    for name in names:
        row = [Cell(name)]
        for pattern, phase in columns:
            phases = found[pattern].get(name, {})
            source = f"/summary/efficiency_length/{pattern}/{name}/{phase}"
            row.append(Cell(_from(phases[phase]), source) if phase in phases else NOTHING)
        rows.append(tuple(row))
    return Table(
        "efficiency",
        "Efficiency length",
        "The length in tokens from which a mechanism is faster than exact attention and stays so, interpolated between "
        "the lengths measured.",
        ("mechanism", *(f"{pattern}: {phase}" for pattern, phase in columns)),
        tuple(rows),
    )


def index(results: Results) -> Table:
    """How good each mechanism is over the tasks of a pattern."""
    found = results.summary.compositional_index
    rows = [
        (
            Cell(name),
            *(
                Cell(f"{by_name[name]:+.2f}", f"/summary/compositional_index/{pattern}/{name}")
                if name in by_name
                else NOTHING
                for pattern, by_name in found.items()
            ),
        )
        for name in dict.fromkeys(name for by_name in found.values() for name in by_name)
    ]
    tasks = {
        pattern: ", ".join(task for task in results.summary.quality if TRIALS[task].pattern == pattern)
        for pattern in found
    }
    return Table(
        "index",
        "Compositional index",
        "The mean over the tasks of a pattern of how many standard deviations a mechanism’s score is better than that "
        "of the mechanisms here on average, as in CAB (arXiv 2210.07661): it depends on who is compared.",
        ("mechanism", *(f"{pattern} ({tasks[pattern]})" for pattern in found)),
        tuple(rows),
    )


def shares(results: Results) -> list[Table]:
    """How much of the machine's limit each layer reaches in training."""
    tables = []
    for pattern in dict.fromkeys(cell.pattern for cell in results.timing.values()):
        cells = timed(results, pattern)
        rows = [
            (
                Cell(name),
                *(
                    Cell(
                        f"{100 * cell.layers[name].training_share:.0f}%",
                        f"/timing/{pattern} {cell.length}/layers/{name}/training_share",
                    )
                    if name in cell.layers
                    else NOTHING
                    for cell in cells
                ),
            )
            for name in _names(results)
            if any(name in cell.layers for cell in cells)
        ]
        limits = (
            Cell("matrix product, GFLOP/s"),
            *(Cell(f"{cell.gemm_flops / 1e9:.0f}", f"/timing/{pattern} {cell.length}/gemm_flops") for cell in cells),
        )
        copies = (
            Cell("copy, GB/s"),
            *(Cell(f"{cell.copy_bytes / 1e9:.1f}", f"/timing/{pattern} {cell.length}/copy_bytes") for cell in cells),
        )
        tables.append(
            Table(
                f"share-{pattern}".replace(" ", "-"),
                f"Share of the machine’s limit, training, {pattern}",
                "The least time the layer’s matrix products, or its input and output, could take at the speed of a "
                "large product or a large copy measured in the same turns, over the time it took. A large "
                "share leaves little to gain by better code; a small one says nothing about the mechanism.",
                ("mechanism", *(f"{cell.length} tokens" for cell in cells)),
                (*rows, limits, copies),
            )
        )
    return tables


def _names(results: Results) -> list[str]:
    timed_names = (name for cell in results.timing.values() for name in cell.layers)
    return [*dict.fromkeys([*results.settings.mechanisms, *timed_names])]


def _from(length: float | None) -> str:
    if length is None:
        return "never here"
    return (
        "always here"
        if length == 0
        else f"{length:.2g}"
        if length < 100
        else f"{round(length, -1 if length < 1000 else -2):.0f}"
    )
