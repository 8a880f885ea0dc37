"""What a check is, and the decorator that makes one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from regard.testing.cases import Case, seed_cpu

_SEED = 20170612


@dataclass(frozen=True)
class Check:
    """One promise: called on a case it raises AssertionError, with the numbers, where the promise is broken.

    `applies` says whether the case's contract makes the promise at all. A call leaves torch's random state as it was.
    """

    name: str
    function: Callable[[Case], None]
    applies: Callable[[Case], bool]

    @property
    def claim(self) -> str:
        """What it proves, in a sentence."""
        return inspect.cleandoc(self.function.__doc__ or "").partition("\n")[0]

    def __call__(self, case: Case) -> None:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            seed_cpu(_SEED)
            self.function(case)

    def __str__(self) -> str:
        return self.name


def always(case: Case) -> bool:
    """Every case makes this promise."""
    return True


def proves(applies: Callable[[Case], bool] = always) -> Callable[[Callable[[Case], None]], Check]:
    """Decorator that makes a function of a case the check of the function's name."""

    def enter(function: Callable[[Case], None]) -> Check:
        return Check(function.__name__, function, applies)

    return enter


@contextmanager
def told_apart(what: str) -> Iterator[None]:
    """Say in an AssertionError under which circumstances it was raised."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error
