"""Geometry for pointer networks: hulls, triangulations and tours of points drawn anew for every batch.

The network is that of "Pointer Networks" (Vinyals et al., 2015, arXiv 1506.03134), small, with the mechanism to be
compared where the paper points. Coordinates are given with mean 0 and variance 1: from 0 to 1, as they are drawn, they
take several times as many steps to learn. Answers are decoded greedily.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache
from math import comb, factorial

import torch
from torch import Tensor, nn

from regard.bench.trial import DIM, HEADS, TEST_SEED, Trial
from regard.bench.variant import Variant
from regard.models.pointer import IGNORED, Choose, PointerNetwork, can_point
from regard.tasks import geometry

DRAWN = 4096
"""Sets of points that guessing is measured on."""


class PointingTrial(Trial):
    """A task whose answers are indices of its points; one model for all numbers of points."""

    pattern, timed_as = "noncausal cross", "noncausal self"
    also = " over tokens, with exact weights and any mask"
    small = f"pointer networks of width {DIM}, {HEADS} heads, at most 8 points"
    sizes: tuple[int, ...]
    choose: Choose
    batch, tested = 64, 200

    def takes(self, variant: Variant) -> bool:
        return can_point(variant.card)

    def model(self, variant: Variant) -> PointerNetwork:
        options = dict(variant.options)
        return PointerNetwork(2, variant.key, dim=DIM, heads=HEADS, choose=self.choose, options=options)

    def loss(self, model: nn.Module, step: int, random: torch.Generator, device: torch.device) -> Tensor:
        points = geometry.uniform_points(self.batch, self.sizes[step % len(self.sizes)], random)
        return model.loss(_standard(points, device), self.solve(points).to(device))  # pyright: ignore[reportCallIssue]

    def samples(self, model: nn.Module, device: torch.device, count: int | None = None) -> dict[str, Tensor]:
        scores = {}
        for size in self.sizes:
            points = _sets(count or self.tested, size, TEST_SEED)
            answers, _ = model.decode(_standard(points, device), longest=self.longest(size))  # pyright: ignore[reportCallIssue]
            found = [[index for index in answer if index != IGNORED] for answer in answers.tolist()]
            graded = [self.grade(*pair) for pair in zip(points, found, strict=True)]
            scores[str(size)] = torch.tensor(graded, dtype=torch.float64)
        return scores if len(scores) > 1 else {"": scores[str(self.sizes[0])]}

    @abstractmethod
    def solve(self, points: Tensor) -> Tensor:
        """The right answers to sets of points."""

    @abstractmethod
    def longest(self, size: int) -> int:
        """How many indices, and an end, an answer may have."""

    @abstractmethod
    def grade(self, points: Tensor, answer: list[int]) -> float:
        """The score of an answer."""


class HullTrial(PointingTrial):
    """Whether the polygon is the hull, wherever and in whichever direction it begins."""

    subject = "convex hulls"
    metric, better, sizes, choose = "accuracy", "higher", (5, 6, 8), "once"
    steps, learning_rate = 2500, 1e-2

    @property
    def guessing(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride] measured
        """Naming one of the equally frequent polygons with the best number of corners."""
        return sum(map(self._guess, self.sizes)) / len(self.sizes)

    def solve(self, points: Tensor) -> Tensor:
        return geometry.hulls(points)

    def longest(self, size: int) -> int:
        return size + 1

    def grade(self, points: Tensor, answer: list[int]) -> float:
        return float(geometry.same_hull(answer, geometry.hull(points)))

    def _guess(self, size: int) -> float:
        corners = (self.solve(_sets(DRAWN, size, TEST_SEED)) != IGNORED).sum(1)
        polygons = {count: comb(size, count) * factorial(count - 1) / 2 for count in range(3, size + 1)}
        return max(float((corners == count).double().mean()) / number for count, number in polygons.items())


class DelaunayTrial(PointingTrial):
    """The share of the triangles that are found."""

    subject = "Delaunay triangulations"
    metric, better, sizes, choose = "triangle coverage", "higher", (6,), "any"
    steps, learning_rate, tested = 2000, 1.4e-2, 500

    @property
    def guessing(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride] follows from the sizes
        """Naming as many different triangles as an answer can hold: each is as likely as any other."""
        return sum(self._most(size) / comb(size, 3) for size in self.sizes) / len(self.sizes)

    def solve(self, points: Tensor) -> Tensor:
        return geometry.triangulations(points)

    def longest(self, size: int) -> int:
        return 3 * self._most(size) + 1

    def grade(self, points: Tensor, answer: list[int]) -> float:
        triangles = [*zip(answer[::3], answer[1::3], answer[2::3], strict=False)]
        return geometry.triangle_coverage(triangles, geometry.delaunay(points))

    def _most(self, size: int) -> int:
        return 2 * size - 5


class TourTrial(PointingTrial):
    """Length over that of the shortest tour; what has been visited is left out, so that every tour is valid."""

    subject = "tours"
    metric, unit, decimals, better = "relative length", "times the shortest", 3, "lower"
    sizes, choose = (5, 6, 7), "all"
    steps, learning_rate = 2000, 1e-2

    @property
    def guessing(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride] measured
        """Visiting the points in the order in which they are given."""
        return sum(map(self._guess, self.sizes)) / len(self.sizes)

    def solve(self, points: Tensor) -> Tensor:
        return geometry.tours(points)

    def longest(self, size: int) -> int:
        return size + 1

    def grade(self, points: Tensor, answer: list[int]) -> float:
        (best,) = self.solve(points[None]).tolist()
        return geometry.tour_length(points, answer) / geometry.tour_length(points, best)

    def _guess(self, size: int) -> float:
        points = _sets(DRAWN, size, TEST_SEED)
        best = points.gather(1, self.solve(points)[..., None].expand(-1, -1, 2))
        lengths = [(stops - stops.roll(-1, 1)).norm(dim=-1).sum(-1) for stops in (points, best)]
        return float((lengths[0] / lengths[1]).mean())


@cache
def _sets(count: int, size: int, seed: int) -> Tensor:
    return geometry.uniform_points(count, size, torch.Generator().manual_seed(seed + size))


def _standard(points: Tensor, device: torch.device) -> Tensor:
    return ((points - 0.5) * 12**0.5).float().to(device)
