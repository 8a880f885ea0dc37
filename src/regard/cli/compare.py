"""``regard compare``: which attention should I use, on this machine?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from regard.cli.app import app, fail, open_console, print_rows

if TYPE_CHECKING:
    from regard.bench.plan import Plan
    from regard.bench.results import Results, Store
    from regard.bench.run import Task, Watch

INTERRUPTED = 130
"""The exit code of a program ended by Ctrl-C."""


@app.command()
def compare(
    mechanisms: Annotated[
        str, typer.Option(help="Mechanisms, with commas between; options as in window:window=64:sinks=4.")
    ] = "",
    task: Annotated[str, typer.Option(help="Tasks to train on, with commas between, or none.")] = "recall,text,digits",
    lengths: Annotated[str, typer.Option(help="Tokens of the sequences that are timed.")] = "512,1024,2048,4096",
    heads: Annotated[int, typer.Option(help="Heads of the layers that are timed.")] = 4,
    dim: Annotated[int, typer.Option(help="Width of the layers that are timed.")] = 256,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of the layers that are timed.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or another device of torch.")] = "cpu",
    budget: Annotated[float, typer.Option(help="Minutes; more of them train more seeds (three from about 12).")] = 5.0,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path("compare"),
) -> None:
    """Train and time mechanisms on this machine, and say which to use.

    Small models with each mechanism are trained on recall (key-value pairs to be remembered), text (the standard
    library's source) and digits (images), and, where named by --task, on hull, delaunay and tour (networks that point
    at some of their inputs: convex hulls, triangulations, shortest tours); layers of the width asked for are timed over
    lengths. Writes results.json and report.html, which opens in any browser. Ctrl-C loses only what was being measured:
    run again to go on.
    """
    try:
        from regard.bench.plan import DEFAULT_MECHANISMS, make_plan, this_machine
        from regard.bench.results import Refusal, Settings, Store
        from regard.report.page import FILE as REPORT
        from regard.report.page import page
    except ModuleNotFoundError as error:
        fail(f"{error.name} is missing; install regard with the extra 'compare'")
    import torch

    threads = torch.get_num_threads()
    try:
        settings = Settings(
            mechanisms=_items(mechanisms) or [*DEFAULT_MECHANISMS],
            tasks=[] if task == "none" else _items(task),
            lengths=_numbers("--lengths", lengths),
            dim=dim,
            heads=heads,
            dtype=dtype,
            device=device,
            seed=seed,
        )
        plan = make_plan(settings, budget, threads=threads)
        store = Store(out)
        try:
            results = store.open(settings, this_machine(device, threads))
            ended = _measure(plan, results, store, budget)
            report = store.write_text(REPORT, page(results))
        finally:
            store.close()
    except Refusal as refusal:
        fail(str(refusal))
    except OSError as error:
        fail(f"{error.filename or out} cannot be written ({error.strerror}); what was measured before is kept")
    _print(results)
    typer.echo(f"\n{report}\n{store.path}")
    if ended.problem:
        fail(f"{ended.problem}; what was measured is kept: run the same command again to go on", ended.code)


@dataclass(frozen=True)
class Ended:
    """How measuring ended: an exit code, and what kept it from being complete."""

    code: int = 0
    problem: str = ""


def _measure(plan: Plan, results: Results, store: Store, budget: float) -> Ended:
    from regard.bench.run import run

    waiting = [task for tasks in plan.waiting(results) for task in tasks]
    try:
        with _progress(plan, waiting) as watch:
            left = run(plan, results, store, budget=budget, watch=watch)
    except KeyboardInterrupt:
        return Ended(INTERRUPTED, "interrupted")
    except BrokenProcessPool:
        return Ended(1, "a process at work was killed, perhaps for want of memory")
    return (
        Ended(0, f"the budget of {budget:g} minutes is spent with {left} of {len(waiting)} cells left")
        if left
        else Ended()
    )


@contextmanager
def _progress(plan: Plan, waiting: Sequence[Task]) -> Iterator[Watch]:
    """A bar on a terminal, a line for each finished cell elsewhere; both on stderr."""
    from regard.bench.plan import expected_seconds

    console, done = open_console(stderr=True), 0

    def say(task: Task, event: str) -> None:
        nonlocal done
        done += event != "started"
        if not console.is_terminal:
            if event != "started":
                typer.echo(f"{done}/{len(waiting)} {event}: {task}", err=True)
            return
        advance = 0.0 if event == "started" else expected_seconds(task, plan.settings)
        bar.update(whole, advance=advance, description=f"{done}/{len(waiting)} {task}")

    columns = (BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        whole = bar.add_task("starting", total=sum(expected_seconds(task, plan.settings) for task in waiting))
        yield say


def _print(results: Results) -> None:
    from regard.report.page import overview

    console, content = open_console(), overview(results)
    rows = [[cell.text for cell in row] for row in content.rows]
    if not console.is_terminal:
        rows.insert(0, [*content.columns])
    print_rows(console, "", content.title, content.columns, rows)
    for sentence in results.summary.verdict:
        console.print(f"• {sentence.text}", soft_wrap=not console.is_terminal)
    for what, why in results.failures.items():
        console.print(f"! {what}: {why}", soft_wrap=True)


def _items(text: str) -> list[str]:
    """What stands between commas, those of a tuple aside."""
    return [item.strip() for item in re.split(r",(?![^()]*\))", text) if item.strip()]


def _numbers(option: str, text: str) -> list[int]:
    try:
        return sorted(set(map(int, _items(text))))
    except ValueError:
        fail(f"{option} {text!r}: give whole numbers with commas between, e.g. 512,1024")
