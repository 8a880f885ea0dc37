"""How an edit is written down: on one line for people, in JSON for files."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def path_of(function: Callable[..., Any]) -> str:
    """``module:name``, by which a function can be imported."""
    return f"{function.__module__}:{function.__qualname__}"


def resolved(path: str) -> Any:
    """What stands under ``module:name``, or None."""
    module, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for each in name.split("."):
            found = getattr(found, each)
    except (ImportError, AttributeError):
        return None
    return found


def shown(part: Any) -> str:
    """A selection in a few characters."""
    if isinstance(part, Tensor):
        return f"tensor{tuple(part.shape)}"
    if isinstance(part, slice):
        return ":".join("" if edge is None else str(edge) for edge in (part.start, part.stop))
    return repr(part)


def packed(part: Any) -> Any:
    """What JSON can hold, with a word for what it has no form for."""
    if isinstance(part, slice):
        return {"slice": [part.start, part.stop, part.step]}
    if isinstance(part, range):
        return {"range": [part.start, part.stop, part.step]}
    if isinstance(part, Tensor):
        return {"tensor": part.tolist(), "dtype": str(part.dtype).removeprefix("torch.")}
    if isinstance(part, Mapping):
        return {"by_layer": [[layer, list(heads)] for layer, heads in part.items()]}
    return list(part) if isinstance(part, tuple) else part


def unpacked(part: Any) -> Any:
    """What `packed` packed."""
    if not isinstance(part, dict):
        return part
    if "tensor" in part:
        return torch.tensor(part["tensor"], dtype=getattr(torch, part["dtype"]))
    if "by_layer" in part:
        return dict(part["by_layer"])
    return slice(*part["slice"]) if "slice" in part else range(*part["range"])
