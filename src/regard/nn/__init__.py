"""Floor 2: one mechanism, one file. Importing this package registers them all and offers them by name."""

from __future__ import annotations

from importlib import import_module
from pkgutil import walk_packages

from regard.nn.mechanism import Mechanism

for _module in walk_packages(__path__, f"{__name__}."):
    for _value in vars(import_module(_module.name)).values():
        if isinstance(_value, type) and "card" in vars(_value):
            globals()[_value.__name__] = _value

__all__ = [
    "Mechanism",
    *(name for name, value in globals().items() if isinstance(value, type) and "card" in vars(value)),
]
