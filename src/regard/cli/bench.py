"""``regard bench``: measurements beyond a comparison of layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.cli.app import app, fail, open_console, print_rows
from regard.cli.compare import measure_mechanisms
from regard.cli.measuring import INTERRUPTED, Ended, items, numbers, progress

if TYPE_CHECKING:
    from regard.bench.kernels.results import KernelResults, KernelStore

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure kernels under every kind of mask, and mechanisms under every pattern of attention.",
)
app.add_typer(bench, name="bench")


@bench.callback()
def _bench() -> None:
    """Measure kernels under every kind of mask, and mechanisms under every pattern of attention."""


@bench.command()
def kernels(
    patterns: Annotated[str, typer.Option(help="Masks, with commas between; all of them if left out.")] = "",
    lengths: Annotated[str, typer.Option(help="Tokens of the sequences.")] = "1024,4096",
    engines: Annotated[str, typer.Option(help="Engines and other libraries' kernels; all that are installed.")] = "",
    heads: Annotated[int, typer.Option(help="Heads.")] = 2,
    dim: Annotated[int, typer.Option(help="Width of each head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or another device of torch.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path("bench-kernels"),
) -> None:
    """Time attention kernels over masks and lengths, forward and with the backward.

    Our engines, torch's attention with a dense mask, and natten, fla, xformers and flash_attn where they are installed.
    A kernel is timed only if its output and gradients are the reference's. Writes results.json and report.html. Ctrl-C
    loses only the case at work: run again to go on.
    """
    try:
        from regard.bench.kernels.patterns import PATTERNS
        from regard.bench.kernels.results import KernelSettings, KernelStore
        from regard.bench.kernels.run import check, installed
        from regard.bench.plan import this_machine
        from regard.bench.results import Refusal
        from regard.report.kernels import page
        from regard.report.page import FILE as REPORT
    except ModuleNotFoundError as error:
        fail(f"{error.name} is missing; install regard with the extra 'compare'")
    import torch

    try:
        settings = KernelSettings(
            patterns=items(patterns) or [*PATTERNS],
            lengths=numbers("--lengths", lengths),
            engines=installed(items(engines)),
            heads=heads,
            dim=dim,
            dtype=dtype,
            device=device,
            seed=seed,
        )
        check(settings)
        store = KernelStore(out)
        try:
            results = store.open(settings, this_machine(device, torch.get_num_threads()))
            ended = _measure(results, store)
            report = store.write_text(REPORT, page(results))
        finally:
            store.close()
    except Refusal as refusal:
        fail(str(refusal))
    except OSError as error:
        fail(f"{error.filename or out} cannot be written ({error.strerror}); what was measured before is kept")
    _print(results)
    typer.echo(f"\n{report}\n{store.path}")
    ended.leave()


@bench.command()
def patterns(
    mechanisms: Annotated[str, typer.Option(help="Mechanisms, with commas between; all that attend if left out.")] = "",
    task: Annotated[str, typer.Option(help="Tasks to train on, with commas between, or none.")] = "recall,text,digits",
    lengths: Annotated[str, typer.Option(help="Tokens of the sequences that are timed.")] = "512,2048",
    heads: Annotated[int, typer.Option(help="Heads of the layers that are timed.")] = 4,
    dim: Annotated[int, typer.Option(help="Width of the layers that are timed.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of the layers that are timed.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or another device of torch.")] = "cpu",
    budget: Annotated[float, typer.Option(help="Minutes; what is left then can follow.")] = 60.0,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path("bench-patterns"),
) -> None:
    """Time and train mechanisms under the four patterns: noncausal or causal, over oneself or over a context.

    Says from which length each is faster than exact attention, pattern by pattern, and how good it is over the tasks of
    a pattern (hull, delaunay and tour are those of noncausal cross). Writes the report of compare. Ctrl-C loses only
    what was being measured: run again to go on.
    """
    measure_mechanisms(
        patterns=True,
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


def _measure(results: KernelResults, store: KernelStore) -> Ended:
    from regard.bench.kernels.run import expected_seconds, run, waiting

    expected = {str(case): expected_seconds(case, results.settings) for case in waiting(results)}
    try:
        with progress(expected) as watch:
            run(results, store, watch)
    except KeyboardInterrupt:
        return Ended(INTERRUPTED, "interrupted")
    return Ended()


def _print(results: KernelResults) -> None:
    from regard.report.kernels import COLUMNS, auto, notes, rows_of

    console = open_console()
    rows = [[cell.text for cell in row] for place, case in results.cases.items() for row in rows_of(place, case)]
    if not console.is_terminal:
        rows.insert(0, [*COLUMNS])
    print_rows(console, "", "Kernels", COLUMNS, rows)
    for line in auto(results):
        console.print(f"• {line}", soft_wrap=not console.is_terminal)
    for line in notes(results):
        console.print(f"! {line}", soft_wrap=True)
