"""How a broken mechanism says what must catch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from correct import declares
from torch import nn


@dataclass(frozen=True)
class Broken:
    """A class, and the checks each of which must fail on it."""

    cls: type[nn.Module]
    caught_by: tuple[str, ...]


BROKEN: list[Broken] = []


def caught_by(*checks: str, **changes: object) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter a broken class, with `changes` to the contract of the class it derives from."""

    def enter(cls: type[nn.Module]) -> type[nn.Module]:
        declares(replace(cls.card.contract, **changes))(cls)
        BROKEN.append(Broken(cls, checks))
        return cls

    return enter
