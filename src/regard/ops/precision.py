"""In which type the operators compute: never less than float32, whatever the inputs or autocast say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores, their statistics and running states are at least float32."""
    # Not torch.promote_types, which would stand in exported graphs.
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast would round the float32 inside to half. Where it is off, nothing shows in an exported graph."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def exact(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a function whose first argument is a tensor: it runs without autocast."""

    @wraps(operator)
    def outside_autocast(first: Tensor, *arguments: Any) -> Any:
        with without_autocast(first.device):
            return operator(first, *arguments)

    return outside_autocast
