"""A mechanism with its options, as it is written on the command line: ``window:window=64:sinks=4``."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.catalogue import Card, Pattern, card
from regard.ops.checks import require


@dataclass(frozen=True)
class Variant:
    """A mechanism's key and the constructor arguments that differ from its defaults."""

    key: str
    options: tuple[tuple[str, object], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Variant:
        """``key`` or ``key:name=value:name=value``, values as Python literals or plain words.

        Raises ValueError for a key that is not registered, an argument the mechanism lacks, or text of another form.
        """
        key, *assignments = text.split(":")
        arguments, options = card(key).arguments, []
        for assignment in assignments:
            name, equals, value = assignment.partition("=")
            require(
                bool(equals),
                "mechanisms",
                f"{assignment!r} in {text!r} sets nothing",
                "write key:name=value, e.g. window:window=64:sinks=4",
            )
            require(name not in dict(options), key, f"argument {name!r} is given twice in {text!r}", "give it once")
            require(
                name in arguments, key, f"argument {name!r} is not known", f"it takes {', '.join(sorted(arguments))}"
            )
            options.append((name, _literal(value)))
        for name, value in options:
            default = inspect.signature(card(key).cls).parameters[name].default
            require(
                not isinstance(default, bool) or isinstance(value, bool), key, f"{name} {value!r}", "give True or False"
            )
            require(isinstance(value, Hashable), key, f"{name} {value!r}", "give a number, a word or a tuple")
        return cls(key, tuple(options))

    def __str__(self) -> str:
        return ":".join([self.key, *(f"{name}={value}" for name, value in self.options)])

    @property
    def card(self) -> Card:
        return card(self.key)

    def attends(self, pattern: Pattern) -> bool:
        """Whether it can be compared under `pattern`; a gate over feature maps is among the noncausal ones."""
        contract = self.card.contract
        return pattern in contract.patterns or (contract.input == "feature_map" and pattern == "noncausal self")

    def build(self, dim: int, heads: int, pattern: Pattern, *, dtype: torch.dtype, device: torch.device | str) -> Any:
        """One layer."""
        entry, arguments = self.card, dict(self.options)
        if "heads" in entry.arguments:
            arguments = {"heads": heads, **arguments}
        wanted = pattern if entry.contract.patterns else None
        return entry.build(dim, pattern=wanted, **arguments, dtype=dtype, device=device)

    def input(self, length: int, dim: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """One random sequence of `length` tokens, as a plane or cube as square as can be where it takes a grid."""
        sizes = self._sizes(length)
        shapes = {"tokens": (1, length, dim), "grid": (1, *sizes, dim), "feature_map": (1, dim, *sizes)}
        return torch.randn(shapes[self.card.contract.input], dtype=dtype, device=device)

    def narrowest(self, lengths: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """The input of one of `lengths` that is the hardest to run on: the shortest, or with the shortest axis."""
        tokens = self.card.contract.input == "tokens"
        shortest = min(lengths, key=lambda length: length if tokens else self._sizes(length)[0])
        return self.input(shortest, dim, dtype, device)

    def _sizes(self, length: int) -> tuple[int, ...]:
        """The axes of a grid of so many tokens: two of them, unless it takes only others."""
        axes = self.card.contract.grid_dims or (2,)
        return _box(length, 2 if 2 in axes else axes[0])


def _box(length: int, axes: int) -> tuple[int, ...]:
    """Sizes that multiply to `length`, as equal as can be, the smallest first."""
    if axes == 1:
        return (length,)
    widest = round(length ** (1 / axes))
    widest -= widest**axes > length
    size = next(size for size in range(widest, 0, -1) if length % size == 0)
    return size, *_box(length // size, axes - 1)


def _literal(text: str) -> object:
    """A Python value, or the text itself: positions, normalizations and the like are words."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
