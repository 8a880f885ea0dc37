"""What was found in a model: attention sites by name, and attention that cannot be reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

from rich.table import Table

from regard.ops.checks import require
from regard.sites.tokens import Tokens

Kind = Literal["self", "cross", "joint"]


@dataclass(frozen=True)
class Site:
    """One place where a model attends.

    Attributes:
        name: the module's name in the model.
        tower: the stack it belongs to: its name up to the first number (``"model.layers"``).
        layer: its number among the sites of its tower and kind, from 0.
        depth: how many sites its tower has of this kind.
        kind: ``"self"``, ``"cross"`` (queries and keys of different sequences) or ``"joint"`` (two sequences in one).
        heads, key_heads, head_dim: the query heads, the key and value heads, and the width of a query.
        causal: whether the module itself keeps a query from looking ahead (a mask may do so beside it).
        host: how it is reached.
    """

    name: str
    tower: str
    layer: int
    depth: int
    kind: Kind
    heads: int
    key_heads: int
    head_dim: int
    causal: bool
    host: str


@dataclass(frozen=True)
class Unreached:
    """An attention module that the door does not reach, and why."""

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class Sites(Sequence[Site]):
    """The sites of a model in the order of its modules, what was not reached, and which token of an input is which."""

    sites: tuple[Site, ...]
    unreached: tuple[Unreached, ...] = ()
    tokens: Tokens | None = None

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Site, ...]: ...
    def __getitem__(self, index: int | slice) -> Site | tuple[Site, ...]:
        return self.sites[index]

    def __len__(self) -> int:
        return len(self.sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def named(self, name: str) -> Site:
        """The site of this name; ValueError if there is none."""
        found = [site for site in self.sites if site.name == name]
        require(
            bool(found),
            "sites",
            f"no site is named {name!r}",
            "sites.find(model) lists them",
        )
        return found[0]

    def table(self) -> Table:
        """Sites and what was not reached, to print with Rich."""
        said = [f"{kind} {start}–{stop - 1}" for kind, start, stop in self.tokens.spans()] if self.tokens else []
        caption = f"tokens: {', '.join(said)}" if said else None
        table = Table("name", "layer", "kind", "heads", "head_dim", "causal", "reached by", caption=caption)
        for site in self.sites:
            heads = f"{site.heads}" if site.heads == site.key_heads else f"{site.heads} over {site.key_heads}"
            causal = "yes" if site.causal else ""
            table.add_row(site.name, f"{site.layer}", site.kind, heads, f"{site.head_dim}", causal, site.host)
        for missed in self.unreached:
            table.add_row(missed.name, "", "", "", "", "", f"NOT REACHED: {missed.reason} ({missed.type})")
        return table
