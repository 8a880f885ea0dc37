"""Seeing the torch functions that one module's forward calls, without touching anything but that module's instance."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from regard.sites.site import Site

Function = Callable[..., Any]

_innermost = threading.local()


class Inside(TorchFunctionMode):
    """Hands over to `take` what is called inside one run of a module, but not inside a routed module within it.

    While `take` runs, torch itself keeps the mode out of the way: what instruments compute is not seen again.
    """

    def take(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer in place of ``function(*args, **kwargs)``."""
        raise NotImplementedError

    def __torch_function__(self, func: Function, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(_innermost, "mode", None) is not self:
            return func(*args, **(kwargs or {}))
        return self.take(func, args, kwargs or {})


@contextmanager
def intercepted(module: nn.Module, method: str, inside: Callable[[], Inside]) -> Iterator[None]:
    """As long as the context lasts, every run of the module's method runs inside a mode of its own.

    A compiled model runs the method as it is, uncompiled: ``fullgraph=True`` cannot be had while it is watched.
    """
    own = getattr(module, method)

    @wraps(own)
    def watched(*args: Any, **kwargs: Any) -> Any:
        outer = getattr(_innermost, "mode", None)
        mode = _innermost.mode = inside()
        try:
            with mode:
                return own(*args, **kwargs)
        finally:
            _innermost.mode = outer

    with in_place_of(module, method, torch.compiler.disable(watched)):
        yield


@contextmanager
def in_place_of(module: nn.Module, method: str, function: Function) -> Iterator[None]:
    """As long as the context lasts, the instance has another function for a method."""
    replaced = vars(module).get(method)
    setattr(module, method, function)
    try:
        yield
    finally:
        if replaced is None:
            delattr(module, method)
        else:
            setattr(module, method, replaced)


def first_query(site: Site, queries: int, keys: int) -> int:
    """Where the first query stands: fewer queries than keys of the same sequence are its last."""
    return keys - queries if site.kind == "self" and queries < keys else 0
