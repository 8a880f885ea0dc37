"""The program, and how all its commands speak: one line for an error, text as it stands."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from regard import __version__

NARROWEST_TABLE = 100
"""Columns of a terminal below which a table is printed as one block per row; a wide table needs more."""
NARROWEST_COLUMN = 11

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command line; characters the output cannot encode are replaced."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue] both are text streams
    app(prog_name="regard")


@app.callback(invoke_without_command=True)
def regard(
    context: typer.Context, show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Every attention mechanism in one PyTorch library: what is implemented, what is open, what each promises."""
    if show_version:
        typer.echo(f"regard {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def fail(problem: str, code: int = 2) -> NoReturn:
    """Say what is wrong in one line and leave."""
    typer.echo(f"regard: {problem.removeprefix('regard: ')}", err=True)
    raise typer.Exit(code)


def open_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it stands: papers write [brackets] and :colons: of their own."""
    return Console(markup=False, highlight=False, emoji=False, stderr=stderr)


def print_rows(console: Console, kind: str, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on a terminal, a block per row if it is wide and the terminal is not, tab-separated lines elsewhere."""
    rows = [*rows]
    if not console.is_terminal:
        for row in rows:
            typer.echo("\t".join((kind, *row)) if kind else "\t".join(row))
    elif rows and len(columns) > 3 and console.width < max(NARROWEST_TABLE, NARROWEST_COLUMN * len(columns)):
        console.print(title, style="bold")
        for key, *rest in rows:
            console.print(f"\n{key}")
            for name, field in zip(columns[1:], rest, strict=True):
                console.print(f"  {name}: {field}")
        console.print()
    elif rows:
        table = Table(*columns, title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        table.columns[0].min_width = max(len(key) for key, *_ in rows)
        for row in rows:
            table.add_row(*row)
        console.print(table)
