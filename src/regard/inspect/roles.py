"""What a head does, in one word and in a sentence: the definitions behind `overview` and ``regard inspect``.

Of every query that can see two keys or more, the share of its attention on a target is taken, and averaged:

    previous, next   the token before or after; in an image the patch to the left or right, in the same row
    self             the token itself
    sink             the one position that gets most: of the keys that at least half of the queries can see, the one
                     with the largest mean weight from the other queries
    special          the tokens of kind ``"special"`` together: class tokens, separators, begin and end of the text
    local            positions at most `NEAR` away, the token itself included; in an image by the distance in the plane

A head has the first of these roles whose share reaches `LEAST` and is at least `LIFT` times what uniform attention over
the keys in sight would give; else it is *broad* if the entropy of its rows is on average at least `BROAD` of the
greatest, ln (keys in sight), *focused* if the largest weight of a row is on average at least `FOCUSED`, else *mixed*.
Attention to another sequence (cross) knows neither previous, next, self nor local.

The half is that of "What Does BERT Look At?" (2019, arXiv 1906.04341), the 0.3 of a sink that of "When Attention Sink
Emerges in Language Models" (2024, arXiv 2410.10781), there for the first token. The other thresholds are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Role = Literal["previous", "next", "self", "sink", "special", "local", "broad", "focused", "mixed"]
Target = Literal["previous", "next", "self", "sink", "special", "local"]

LEAST: dict[Target, float] = {
    "previous": 0.5,
    "next": 0.5,
    "self": 0.5,
    "sink": 0.3,
    "special": 0.5,
    "local": 0.5,
}
LIFT = 2.0
BROAD = 0.8
FOCUSED = 0.4
NEAR = {1: 4.0, 2: 2.0}
"""By the dimensions of the sequence: tokens, and patches."""

ROLES: dict[Role, str] = {
    "sink": "rests on one position",
    "special": "rests on special tokens",
    "previous": "looks at the previous token",
    "next": "looks at the next token",
    "self": "looks at the token itself",
    "local": "looks at the neighbourhood",
    "broad": "spreads over everything",
    "focused": "picks few tokens, other ones for each query",
    "mixed": "none of these",
}


@dataclass(frozen=True)
class Look:
    """How much of its attention a head gives a target.

    Attributes:
        share: mean over the queries that have the target in sight.
        most: the fraction of these queries whose largest weight lies there.
        chance: the share that uniform attention over the keys in sight would have.
    """

    share: float
    most: float
    chance: float


@dataclass(frozen=True)
class Head:
    """One head's numbers; means over the queries that see two keys or more.

    Attributes:
        entropy: in nats; ``exp(entropy)`` is the number of keys it looks at as if uniformly.
        breadth: the entropy over its greatest, ln (keys in sight): 1 is uniform.
        peak: the largest weight of a row.
        distance: how far away it looks, weighted by attention: in tokens, or patches; None across sequences.
        first: the share on the first token, from the other queries.
        sink_at: the position of the sink.
        looks: by target; one that no query has in sight is left out.
    """

    number: int
    entropy: float
    breadth: float
    peak: float
    distance: float | None
    first: float
    sink_at: int
    looks: Mapping[Target, Look]

    @property
    def role(self) -> Role:
        """The first role whose definition it meets; see the module."""
        for target, least in LEAST.items():
            look = self.looks.get(target)
            if look is not None and look.share >= least and look.share >= LIFT * look.chance:
                return target
        return "broad" if self.breadth >= BROAD else "focused" if self.peak >= FOCUSED else "mixed"

    @property
    def strength(self) -> float:
        """The share, breadth or largest weight that its role was given for."""
        role = self.role
        if role in ("broad", "focused", "mixed"):
            return self.breadth if role == "broad" else self.peak
        return self.looks[role].share

    def says(self, sink: str, dimensions: int) -> str:
        """What it does, as a sentence without a subject; `sink` is what the position `sink_at` is called."""
        role, token, tokens = self.role, *(("token", "tokens") if dimensions == 1 else ("patch", "patches"))
        if role == "broad":
            return (
                f"spreads over everything: {self.breadth:.0%} of the greatest entropy, "
                f"as if evenly over {math.exp(self.entropy):.0f} {tokens}"
            )
        if role in ("focused", "mixed"):
            picks = f"picks few {tokens}, other ones for each query" if role == "focused" else "has no single pattern"
            return f"{picks}: its largest weight is {self.peak:.0%} on average"
        look = self.looks[role]
        where = {
            "previous": f"looks at the previous {token}" if dimensions == 1 else "looks at the patch to the left",
            "next": f"looks at the next {token}" if dimensions == 1 else "looks at the patch to the right",
            "self": f"looks at the {token} itself",
            "sink": f"rests on {sink}",
            "special": "rests on special tokens",
            "local": f"looks at most {NEAR[dimensions]:.0f} {tokens} away",
        }[role]
        return f"{where} in {look.most:.0%} of cases, with {look.share:.0%} of all attention"
