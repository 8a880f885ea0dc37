"""The program, and how all its commands speak: one line for an error, text as it stands."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from regard import __version__

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
