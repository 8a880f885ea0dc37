"""Floor 2: one mechanism, one file. Importing this package registers them all and offers them by name."""

from __future__ import annotations

from importlib import import_module
from pkgutil import walk_packages

from regard.nn.mechanism import Mechanism

_classes = {
    value.__name__: value
    for module in walk_packages(__path__, f"{__name__}.")
    for value in vars(import_module(module.name)).values()
    if isinstance(value, type) and "card" in vars(value)
}
globals().update(_classes)

__all__ = ["Mechanism", *_classes]  # pyright: ignore[reportUnsupportedDunderAll] known when the files are read
