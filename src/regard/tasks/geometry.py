"""Geometry whose answers point at inputs. "Pointer Networks", Vinyals et al., 2015, arXiv 1506.03134.

    hull       the corners of the convex hull, counter-clockwise, from the corner of smallest index
    delaunay   triangles of increasing indices, in lexicographic order of their incentres
    tour       the shortest closed tour, from point 0, in the direction whose second point has the smaller index

Points are uniform in the unit square. All answers are exact: the tour is Held and Karp's, for at most 10 points. The
scores are the paper's: exact accuracy and covered area for hulls, accuracy and triangle coverage for triangulations,
length for tours.

`hulls`, `triangulations` and `tours` give the same answers for many sets of few points at once, by trying everything:
as many as training takes.

Differences: the paper leaves the direction of a tour open, and takes approximate tours for more points.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, permutations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.ops.checks import require

MOST_CITIES = 10
"""Held and Karp's table has ``cities · 2^cities`` entries."""
MOST_TRIED = 8
"""There are ``(points − 1)! / 2`` tours of so many points."""
IGNORED = -100
"""What fills up answers that are shorter than others."""


def uniform_points(count: int, points: int, random: torch.Generator) -> Float[Tensor, "count points 2"]:
    """`count` sets of points in the unit square."""
    return torch.rand(count, points, 2, dtype=torch.float64, generator=random)


def hull(points: Float[Tensor, "points 2"]) -> list[int]:
    """Indices of the corners of the convex hull."""
    from scipy.spatial import ConvexHull

    require(len(points) >= 3, "hull", f"{len(points)} points", "give at least 3 that are not on a line")
    corners = ConvexHull(points.numpy()).vertices.tolist()
    first = corners.index(min(corners))
    return corners[first:] + corners[:first]


def delaunay(points: Float[Tensor, "points 2"]) -> list[tuple[int, int, int]]:
    """Triangles of the Delaunay triangulation."""
    from scipy.spatial import Delaunay

    require(len(points) >= 3, "delaunay", f"{len(points)} points", "give at least 3 that are not on a line")
    triangles = [tuple(sorted(triangle)) for triangle in Delaunay(points.numpy()).simplices.tolist()]
    return sorted(triangles, key=lambda triangle: _incentre(points[list(triangle)]))


def tour(points: Float[Tensor, "points 2"]) -> list[int]:
    """The shortest closed tour."""
    cities = len(points)
    require(
        3 <= cities <= MOST_CITIES,
        "tour",
        f"{cities} points",
        f"give 3 to {MOST_CITIES}: the exact tour of more takes too long",
    )
    distance = torch.cdist(points, points).tolist()
    # The cheapest way from 0 through a set of cities to the last of them, and the city before that one.
    best = {(frozenset([city]), city): (distance[0][city], 0) for city in range(1, cities)}
    for size in range(2, cities):
        for visited in map(frozenset, combinations(range(1, cities), size)):
            for last in visited:
                rest = visited - {last}
                best[visited, last] = min((best[rest, city][0] + distance[city][last], city) for city in rest)
    visited = frozenset(range(1, cities))
    last = min(visited, key=lambda city: best[visited, city][0] + distance[city][0])
    way = [last]
    while len(visited) > 1:
        visited, last = visited - {last}, best[visited, last][1]
        way.append(last)
    return [0, *(way if way[0] < way[-1] else way[::-1])]


def hulls(points: Float[Tensor, "count points 2"]) -> Int[Tensor, "count longest"]:
    """`hull` of each set, filled up with `IGNORED`. Time and memory go with the cube of the points."""
    size = _size("hulls", points)
    apart = points[:, None] - points[:, :, None]
    # A side of the hull, from i to j, has all others on its left.
    left = _cross(apart[:, :, :, None], apart[:, :, None]) > 0
    side = left.sum(-1) == size - 2
    following = side.int().argmax(-1)
    corner = side.any(-1).int().argmax(-1)
    way = [corner]
    for _ in range(size - 1):
        way.append(following.gather(1, way[-1][:, None])[:, 0])
    answers = torch.stack(way, dim=1)
    around = (answers[:, 1:] == answers[:, :1]).cumsum(1) > 0
    return torch.cat([answers[:, :1], answers[:, 1:].masked_fill(around, IGNORED)], dim=1)


def triangulations(points: Float[Tensor, "count points 2"]) -> Int[Tensor, "count longest"]:
    """The corners of `delaunay`'s triangles, one after the other, filled up with `IGNORED`.

    Time and memory go with the fourth power of the points.
    """
    size = _size("triangulations", points)
    triangles = torch.tensor([*combinations(range(size), 3)], device=points.device)
    corners = points[:, triangles]
    a, b, c = (corners[:, :, None] - points[:, None, :, None]).unbind(-2)
    inside = sum(_cross(v, w) * u.square().sum(-1) for u, v, w in ((a, b, c), (b, c, a), (c, a, b)))
    first, second, third = corners.unbind(-2)
    turn = _cross(second - first, third - first)
    empty = ~(inside * turn[..., None] > 0).any(-1)
    opposite = (corners.roll(-1, -2) - corners.roll(-2, -2)).norm(dim=-1)
    incentre = (opposite * corners[..., 0]).sum(-1) / opposite.sum(-1)
    most = 2 * size - 5
    order = incentre.masked_fill(~empty, torch.inf).argsort(-1)[:, :most]
    answers = triangles[order].masked_fill(~empty.gather(1, order)[..., None], IGNORED)
    return answers.flatten(1)


def tours(points: Float[Tensor, "count points 2"]) -> Int[Tensor, "count points"]:
    """`tour` of each set. Time and memory go with the factorial of the points."""
    size = _size("tours", points)
    require(size <= MOST_TRIED, "tours", f"{size} points", f"give 3 to {MOST_TRIED}, or take them one by one to tour")
    ways = _ways(size).to(points.device)
    distance = torch.cdist(points, points).flatten(1)
    step = ways * size + ways.roll(-1, 1)
    return ways[distance[:, step].sum(-1).argmin(1)]


def tour_length(points: Float[Tensor, "points 2"], order: list[int]) -> float:
    """Length of a closed tour. Raises ValueError unless it visits every point once."""
    require(
        sorted(order) == list(range(len(points))),
        "tour_length",
        f"order {order} of {len(points)} points",
        "name every point once",
    )
    stops = points[order]
    return (stops - stops.roll(-1, 0)).norm(dim=-1).sum().item()


def same_hull(predicted: list[int], true: list[int]) -> bool:
    """Whether two polygons are one, wherever and in whichever direction they begin."""
    turned = [predicted[start:] + predicted[:start] for start in range(len(predicted))]
    return any(true in (way, way[:1] + way[:0:-1]) for way in turned)


def hull_coverage(points: Float[Tensor, "points 2"], predicted: list[int]) -> float | None:
    """Area of the predicted polygon over that of the hull; None where its edges cross or points repeat."""
    if len(predicted) < 3 or len(set(predicted)) < len(predicted) or _crosses(points[predicted]):
        return None
    return _area(points[predicted]) / _area(points[hull(points)])


def triangle_coverage(predicted: list[tuple[int, int, int]], true: list[tuple[int, int, int]]) -> float:
    """Share of the true triangles that are predicted."""
    found = {tuple(sorted(triangle)) for triangle in predicted}
    return len(found & set(true)) / len(true)


def same_triangulation(predicted: list[tuple[int, int, int]], true: list[tuple[int, int, int]]) -> bool:
    """Whether the triangles are the same, in any order."""
    return {tuple(sorted(triangle)) for triangle in predicted} == set(true)


def padded(answers: list[list[int]], length: int, filler: int) -> Int[Tensor, "count length"]:
    """Answers of unequal length as one tensor."""
    longest = max(map(len, answers), default=0)
    require(longest <= length, "padded", f"an answer of {longest} for length {length}", "give a larger length")
    return torch.tensor([answer + [filler] * (length - len(answer)) for answer in answers])


@cache
def _ways(size: int) -> Int[Tensor, "ways points"]:
    return torch.tensor([[0, *rest] for rest in permutations(range(1, size)) if rest[0] < rest[-1]])


def _size(owner: str, points: Tensor) -> int:
    require(
        points.ndim == 3 and points.shape[2] == 2 and points.shape[1] >= 3,
        owner,
        lambda: f"points of shape {tuple(points.shape)}",
        "give (count, points, 2) with at least 3 points each",
    )
    return points.shape[1]


def _cross(a: Float[Tensor, "... 2"], b: Float[Tensor, "... 2"]) -> Float[Tensor, "..."]:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _incentre(corners: Float[Tensor, "3 2"]) -> tuple[float, float]:
    opposite = (corners.roll(-1, 0) - corners.roll(-2, 0)).norm(dim=-1, keepdim=True)
    x, y = ((opposite * corners).sum(0) / opposite.sum()).tolist()
    return x, y


def _area(polygon: Float[Tensor, "corners 2"]) -> float:
    x, y = polygon.unbind(-1)
    return 0.5 * (x * y.roll(-1) - x.roll(-1) * y).sum().abs().item()


def _crosses(polygon: Float[Tensor, "corners 2"]) -> bool:
    """Whether two edges without a common corner cut each other."""
    corners = polygon.tolist()
    edges = list(zip(corners, corners[1:] + corners[:1], strict=True))
    apart = ((i, j) for i, j in combinations(range(len(edges)), 2) if 1 < j - i < len(edges) - 1)
    return any(
        _side(*edges[i], edges[j][0]) * _side(*edges[i], edges[j][1]) < 0
        and _side(*edges[j], edges[i][0]) * _side(*edges[j], edges[i][1]) < 0
        for i, j in apart
    )


def _side(start: list[float], end: list[float], point: list[float]) -> float:
    return (end[0] - start[0]) * (point[1] - start[1]) - (end[1] - start[1]) * (point[0] - start[0])
