"""What commands that measure have in common: lists as arguments, a progress bar, how they end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from regard.cli.app import fail, open_console

INTERRUPTED = 130
"""The exit code of a program ended by Ctrl-C."""


@dataclass(frozen=True)
class Ended:
    """How measuring ended: an exit code, and what kept it from being complete."""

    code: int = 0
    problem: str = ""

    def leave(self) -> None:
        """Say so and end the program, unless all went well."""
        if self.problem:
            fail(f"{self.problem}; what was measured is kept: run the same command again to go on", self.code)


@contextmanager
def progress(expected: Mapping[str, float]) -> Iterator[Callable[[object, str], None]]:
    """A bar on a terminal, a line for each finished task elsewhere; both on stderr.

    `expected` are seconds by task. What is yielded wants to be told of each task when it is "started", and "done" or
    "failed".
    """
    console, done = open_console(stderr=True), 0

    def say(task: object, event: str) -> None:
        nonlocal done
        done += event != "started"
        if not console.is_terminal:
            if event != "started":
                typer.echo(f"{done}/{len(expected)} {event}: {task}", err=True)
            return
        advance = 0.0 if event == "started" else expected[str(task)]
        bar.update(whole, advance=advance, description=f"{done}/{len(expected)} {task}")

    columns = (BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        whole = bar.add_task("starting", total=sum(expected.values()))
        yield say


def items(text: str) -> list[str]:
    """What stands between commas, those of a tuple aside."""
    return [item.strip() for item in re.split(r",(?![^()]*\))", text) if item.strip()]


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers between commas, in order."""
    try:
        return sorted(set(map(int, items(text))))
    except ValueError:
        fail(f"{option} {text!r}: give whole numbers with commas between, e.g. 512,1024")
