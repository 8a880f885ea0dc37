"""The register of mechanisms: classes enter by decorator, leave by key. It knows none of them by name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from importlib.metadata import entry_points
from typing import TypeVar, get_args

from torch import nn

from regard.catalogue.contract import Contract, Input, OptionSet, Pattern
from regard.catalogue.papers import Paper, paper
from regard.catalogue.taxonomy import Facet, Taxonomy, require_facet
from regard.ops.checks import one_of, require

ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])

_cards: dict[str, Card] = {}


@dataclass(frozen=True)
class Card:
    """One mechanism: its key, class, sources, contract and kind of attention."""

    key: str
    cls: type[nn.Module]
    papers: tuple[Paper, ...]
    contract: Contract
    kind: Taxonomy = field(default_factory=Taxonomy)

    @property
    def description(self) -> str:
        """The docstring of the mechanism's file: source, equation, cost, deviations."""
        return inspect.cleandoc(sys.modules[self.cls.__module__].__doc__ or "")

    @property
    def summary(self) -> str:
        """The first line of the class docstring."""
        return inspect.cleandoc(self.cls.__doc__ or "").partition("\n")[0]

    @property
    def taxonomy(self) -> Taxonomy:
        """Its `kind` with what follows from the contract."""
        return self.kind.under(self.contract)

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """Names of the constructor's arguments."""
        return tuple(inspect.signature(self.cls).parameters)

    def build(self, *args: object, pattern: Pattern | None = None, **arguments: object) -> nn.Module:
        """Construct the mechanism, for one of its declared `pattern` if given.

        Raises ValueError for a pattern that is not declared or contradicts ``causal``, and TypeError for an argument
        the constructor lacks.
        """
        if pattern is not None:
            one_of(self.key, "pattern", pattern, self.contract.patterns)
            if "causal" in self.arguments:
                causal = pattern.startswith("causal")
                given = arguments.get("causal", causal)
                require(
                    (any(given) if isinstance(given, tuple) else given) is causal,
                    self.key,
                    f"causal={given!r} with pattern {pattern!r}",
                    "give one of them",
                )
                arguments = {"causal": causal, **arguments}
        for name, value in arguments.items():
            if name not in self.arguments:
                try:
                    one_of(self.key, "argument", name, self.arguments)
                except ValueError as error:
                    raise TypeError(f"{error} (given {name}={value!r})") from None
        return self.cls(*args, **arguments)

    def option_sets(self) -> tuple[OptionSet, ...]:
        """The default option set and every declared one."""
        return (OptionSet(), *self.contract.options)


def register(
    key: str,
    *,
    paper: str | Paper | tuple[str | Paper, ...],
    contract: Contract,
    taxonomy: Taxonomy | None = None,
) -> Callable[[ModuleClass], ModuleClass]:
    """Class decorator that enters a mechanism under `key`.

    `paper` is the key of a row of the papers table, a `Paper` for a source outside it, or several of either.
    `taxonomy` says where a mechanism is not of the usual kind. The class gets the attribute ``card``.
    """
    sources = paper if isinstance(paper, tuple) else (paper,)

    def enter(cls: ModuleClass) -> ModuleClass:
        taken = _cards.get(key)
        require(
            taken is None or taken.cls.__qualname__ == cls.__qualname__,
            "register",
            f"key {key!r} is already taken by {taken.cls.__module__ if taken else ''}",
            "choose another key",
        )
        card = Card(key, cls, tuple(_source(source) for source in sources), contract, taxonomy or Taxonomy())
        cls.card = card  # pyright: ignore[reportAttributeAccessIssue] the decorator adds it
        _cards[key] = card
        return cls

    return enter


def _source(source: str | Paper) -> Paper:
    return source if isinstance(source, Paper) else paper(source)


@cache
def _discover() -> None:
    for provider in entry_points(group="regard.mechanisms"):
        provider.load()


def card(key: str) -> Card:
    """The card of a mechanism; an unknown key raises ValueError with the nearest known one."""
    _discover()
    one_of("regard", "mechanism", key, sorted(_cards))
    return _cards[key]


def create(key: str, *args: object, **arguments: object) -> nn.Module:
    """Build a mechanism by key: ``create("gqa", dim=256, heads=8, kv_heads=2, causal=True)``."""
    return card(key).build(*args, **arguments)  # pyright: ignore[reportArgumentType] build checks the names


def mechanisms(*, pattern: Pattern | None = None, facet: Facet | None = None, **declared: object) -> list[str]:
    """Keys of the mechanisms that have `pattern` and `facet` and whose contract fields equal `declared`.

    >>> mechanisms(pattern="causal self", input="tokens", step=True, state="constant")
    """
    _discover()
    known = [item.name for item in fields(Contract)]
    for name in declared:
        one_of("mechanisms", "filter", name, known)
    for name, value, valid in (("pattern", pattern, Pattern), ("input", declared.get("input"), Input)):
        if value is not None:
            one_of("mechanisms", name, value, get_args(valid))
    if facet is not None:
        require_facet("mechanisms", "facet", facet)
    return sorted(
        key
        for key, entry in _cards.items()
        if (pattern is None or pattern in entry.contract.patterns)
        and (facet is None or facet in entry.taxonomy.facets)
        and all(getattr(entry.contract, name) == value for name, value in declared.items())
    )
