"""plotly, which only figures need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def plotly(owner: str) -> tuple[Any, Callable[..., Any]]:
    """``plotly.graph_objects`` and ``make_subplots``; ModuleNotFoundError names the extra that brings them."""
    try:
        import plotly.graph_objects as graph_objects
        from plotly.subplots import make_subplots
    except ModuleNotFoundError as error:
        problem = f"{owner}: {error.name} is missing; install it with regard's extra: pip install 'regard[inspect]'"
        raise ModuleNotFoundError(problem, name=error.name) from error
    return graph_objects, make_subplots
