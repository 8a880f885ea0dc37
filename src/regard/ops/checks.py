"""Errors that name the argument, its value, the rule it breaks and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_MOST_LISTED = 20


def require(condition: bool, owner: str, problem: str, way_out: str) -> None:
    """Raise ``ValueError("owner: problem; way_out")`` unless `condition` holds."""
    if not condition:
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
