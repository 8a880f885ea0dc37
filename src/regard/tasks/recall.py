"""Multi-query associative recall. "Zoology: Measuring and Improving Recall in Efficient Language Models", Arora et al.,
2023, arXiv 2312.04927.

    k1 v1 k2 v2 … kP vP  · · k2 · · · k7 · k1 · …        after each queried key the model must give its value

Every pair stands once at the start and its key is asked for once later, at a place drawn without replacement from the
power law p(g) ∝ g^(a − 1), where g counts steps of two tokens from the end of the pairs. Keys and values are different
tokens, each at most once in a sequence.

Differences: fillers are drawn from the values and never are keys, so that the task can be solved exactly in a small
vocabulary; the authors' generator draws them from the whole of one with 8192 tokens, and leaves key 0 out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from regard.ops.checks import require

IGNORED = -100
"""The label of positions where nothing is asked (the ignore index of torch's cross-entropy)."""


@dataclass(frozen=True)
class Recall:
    """Sequences of `length` tokens from a vocabulary whose lower half are keys, the upper half values.

    Raises ValueError where `pairs` do not fit: they take two tokens each, and as many again for the queries.
    """

    length: int
    vocabulary: int
    power: float = 0.01

    def batch(
        self, count: int, pairs: int, random: torch.Generator
    ) -> tuple[Int[Tensor, "count length"], Int[Tensor, "count length"]]:
        """`count` sequences with `pairs` pairs, and their labels: the value at a queried key, else `IGNORED`."""
        keys = self.vocabulary // 2
        require(
            0 < pairs <= min(keys, self.length // 4),
            "Recall",
            f"pairs {pairs} for length {self.length} and vocabulary {self.vocabulary}",
            "pairs must be positive and at most a quarter of the length and half of the vocabulary",
        )
        key = _distinct(count, keys, pairs, random)
        value = keys + _distinct(count, self.vocabulary - keys, pairs, random)
        places = (self.length - 2 * pairs) // 2
        near = torch.arange(1, places + 1).float() ** (self.power - 1)
        gap = torch.multinomial(near.expand(count, -1), pairs, generator=random)
        asked = 2 * pairs + 2 * gap

        tokens = torch.randint(keys, self.vocabulary, (count, self.length), generator=random)
        tokens[:, : 2 * pairs] = torch.stack([key, value], dim=-1).flatten(1)
        tokens.scatter_(1, asked, key)
        labels = torch.full_like(tokens, IGNORED).scatter_(1, asked, value)
        return tokens, labels


def _distinct(count: int, choices: int, number: int, random: torch.Generator) -> Tensor:
    return torch.rand(count, choices, generator=random).argsort(-1)[:, :number]
