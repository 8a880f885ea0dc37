"""Errors that name the argument, its value, the rule it breaks and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from math import prod

_MOST_LISTED = 20


Text = str | Callable[[], str]
"""A message, or a function that makes it: formatting a size under torch.compile would pin that size."""


def require(condition: bool, owner: str, problem: Text, way_out: Text) -> None:
    """Raise ``ValueError("owner: problem; way_out")`` unless `condition` holds."""
    if not condition:
        problem, way_out = (text if isinstance(text, str) else text() for text in (problem, way_out))
        raise ValueError(f"{owner}: {problem}; {way_out}")


def one_of(owner: str, name: str, value: object, valid: Iterable[str]) -> None:
    """Raise ``ValueError`` unless `value` is one of `valid`, suggesting the nearest."""
    choices = list(valid)
    if value in choices:
        return
    near = get_close_matches(str(value), choices, n=1)
    listed = ", ".join(map(repr, choices[:_MOST_LISTED])) + (", …" if len(choices) > _MOST_LISTED else "")
    hint = f"did you mean {near[0]!r}?" if near else f"valid values: {listed}"
    raise ValueError(f"{owner}: {name} {value!r} is not known; {hint}")


def require_grid(owner: str, grid: tuple[int, ...], queries: int, keys: int) -> None:
    """Raise ``ValueError`` unless a call goes from a flattened grid to itself."""
    positions = prod(grid)
    require(
        queries == keys == positions,
        owner,
        lambda: f"grid {grid} has {positions} positions, the call {queries} queries and {keys} keys",
        "flatten the grid it was made for",
    )
