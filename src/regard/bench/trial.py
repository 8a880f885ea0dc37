"""What a task that models are trained on has to say about itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from regard.bench.variant import Variant
from regard.catalogue import Pattern

DIM, HEADS, LAYERS = 64, 2, 2
TEST_SEED = 2**31
"""The test samples that are drawn, rather than held out, come from a generator of this seed."""


class Trial(ABC):
    """How a task is trained and scored."""

    pattern: Pattern
    timed_as: Pattern
    """The pattern whose times stand beside its scores."""
    also: str = " over tokens"
    """What else than its pattern a mechanism needs."""
    subject: str
    """What the verdict calls it."""
    metric: str
    unit: str = "%"
    """What stands behind a score."""
    decimals: int = 1
    """Decimal places of a score."""
    better: Literal["higher", "lower"]
    guessing: float
    """The score of answers that ignore the input."""
    small: str = f"width {DIM}, {HEADS} heads, {LAYERS} layers, at most 256 tokens"
    """The model that is trained, and its longest input."""
    steps: int
    learning_rate: float

    def takes(self, variant: Variant) -> bool:
        """Whether a mechanism can do the task."""
        return variant.attends(self.pattern)

    def number(self, value: float) -> str:
        """A score, without its unit."""
        return f"{100 * value if self.unit == '%' else value:.{self.decimals}f}"

    def score(self, value: float) -> str:
        """A score as it is written everywhere."""
        return f"{self.number(value)}{'' if self.unit == '%' else ' '}{self.unit}"

    @abstractmethod
    def model(self, variant: Variant) -> nn.Module:
        """A model of the task around a mechanism."""

    @abstractmethod
    def loss(self, model: nn.Module, step: int, random: torch.Generator, device: torch.device) -> Tensor:
        """The loss on a fresh batch."""

    @abstractmethod
    def samples(self, model: nn.Module, device: torch.device, count: int | None = None) -> dict[str, Tensor]:
        """A score per test sample, by difficulty (one entry, "", for a task without); the first `count` if given."""
