"""``regard compare``: which attention should I use, on this machine?"""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regard.cli.app import app, fail, open_console, print_rows
from regard.cli.measuring import INTERRUPTED, Ended, items, numbers, progress

if TYPE_CHECKING:
    from regard.bench.plan import Plan
    from regard.bench.results import Results, Store


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
    measure_mechanisms(
        patterns=False,
        mechanisms=items(mechanisms),
        tasks=[] if task == "none" else items(task),
        lengths=numbers("--lengths", lengths),
        dim=dim,
        heads=heads,
        dtype=dtype,
        device=device,
        seed=seed,
        budget=budget,
        out=out,
    )


def measure_mechanisms(
    *, patterns: bool, mechanisms: list[str], budget: float, out: Path, device: str, **asked: Any
) -> None:
    """Measure what was asked for, under self-attention alone or all four patterns; write and print the results."""
    try:
        from regard.bench.patterns import default_mechanisms, make_patterns_plan
        from regard.bench.plan import DEFAULT_MECHANISMS, make_plan, this_machine
        from regard.bench.results import Refusal, Settings, Store
        from regard.report.page import FILE as REPORT
        from regard.report.page import page
    except ModuleNotFoundError as error:
        fail(f"{error.name} is missing; install regard with the extra 'compare'")
    import torch

    threads = torch.get_num_threads()
    default = default_mechanisms() if patterns else [*DEFAULT_MECHANISMS]
    try:
        settings = Settings(mechanisms=mechanisms or default, device=device, **asked)
        plan = (make_patterns_plan if patterns else make_plan)(settings, budget, threads=threads)
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
    _print(results, patterns)
    typer.echo(f"\n{report}\n{store.path}")
    ended.leave()


def _measure(plan: Plan, results: Results, store: Store, budget: float) -> Ended:
    from regard.bench.plan import expected_seconds
    from regard.bench.run import run

    waiting = [task for tasks in plan.waiting(results) for task in tasks]
    try:
        with progress({str(task): expected_seconds(task, plan.settings) for task in waiting}) as watch:
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


def _print(results: Results, patterns: bool) -> None:
    from regard.report.page import efficiency, index, overview

    console = open_console()
    for content in (efficiency(results), index(results)) if patterns else (overview(results),):
        rows = [[cell.text for cell in row] for row in content.rows]
        if rows and not console.is_terminal:
            rows.insert(0, [*content.columns])
        print_rows(console, "", content.title, content.columns, rows)
    for sentence in results.summary.verdict:
        console.print(f"• {sentence.text}", soft_wrap=not console.is_terminal)
    for what, why in results.failures.items():
        console.print(f"! {what}: {why}", soft_wrap=True)
