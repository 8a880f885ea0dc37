"""The taxonomy of "An Attentive Survey of Attention Models", Chaudhari et al., 2019, arXiv 1904.02874."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from regard.catalogue.contract import Contract
from regard.ops.checks import require

Sequences = Literal["self", "distinctive", "co-attention"]
Levels = Literal["single-level", "multi-level"]
Positions = Literal["soft", "local", "hard"]
Representations = Literal["single-representation", "multi-representational", "multi-dimensional"]
Facet = Literal[Sequences, Levels, Positions, Representations]

_VALID = {"sequences": Sequences, "levels": Levels, "positions": Positions, "representations": Representations}


@dataclass(frozen=True)
class Taxonomy:
    """A mechanism's answers to the survey's four questions.

    Fields:
        sequences: of which sequences are queries and keys? ``self``: of one; ``distinctive``: of two, one asking the
            other; ``co-attention``: of several that ask each other. More than one where a mechanism can do several;
            left out, it follows from the contract.
        levels: ``multi-level`` attends to what attention made of smaller pieces, such as sentences to words.
        positions: ``soft`` may weigh every position, ``local`` a window or another fixed part of them, ``hard`` draws
            one.
        representations: ``multi-representational`` weighs several representations of its input,
            ``multi-dimensional`` every feature by itself.
    """

    sequences: tuple[Sequences, ...] = ()
    levels: Levels = "single-level"
    positions: Positions = "soft"
    representations: Representations = "single-representation"

    def __post_init__(self) -> None:
        require(isinstance(self.sequences, tuple), "Taxonomy", f"sequences {self.sequences!r}", "give a tuple")
        for item in fields(self):
            answer = getattr(self, item.name)
            for value in answer if isinstance(answer, tuple) else (answer,):
                require_facet("Taxonomy", item.name, value, get_args(_VALID[item.name]))

    @property
    def facets(self) -> tuple[Facet, ...]:
        """All answers."""
        return (*self.sequences, self.levels, self.positions, self.representations)

    def under(self, contract: Contract) -> Taxonomy:
        """The same with the sequences that follow from `contract`, where none is given."""
        if self.sequences:
            return self
        kinds: dict[str, Sequences] = {"self": "self", "cross": "distinctive"}
        found = [kinds[pattern.rpartition(" ")[2]] for pattern in contract.patterns]
        # A gate over feature maps has no pattern: what it weighs is its own input.
        return replace(self, sequences=tuple(dict.fromkeys(found)) or ("self",))


def require_facet(owner: str, name: str, value: object, valid: Iterable[object] = get_args(Facet)) -> None:
    """Raise ValueError with all `valid` words unless `value` is one: the nearest to "global" would be "local"."""
    listed = tuple(valid)
    require(value in listed, owner, f"{name} {value!r} is not known", f"valid values: {', '.join(map(repr, listed))}")
