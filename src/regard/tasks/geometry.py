"""Geometry whose answers point at inputs. "Pointer Networks", Vinyals et al., 2015, arXiv 1506.03134.

    hull       the corners of the convex hull, counter-clockwise, from the corner of smallest index
    delaunay   triangles of increasing indices, in lexicographic order of their incentres
    tour       the shortest closed tour, from point 0, in the direction whose second point has the smaller index

Points are uniform in the unit square. All answers are exact: the tour is Held and Karp's, for at most 10 points. The
scores are the paper's: exact accuracy and covered area for hulls, accuracy and triangle coverage for triangulations,
length for tours.

Differences: the paper leaves the direction of a tour open, and takes approximate tours for more points.
"""

from __future__ import annotations

from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.ops.checks import require

MOST_CITIES = 10
"""Held and Karp's table has ``cities · 2^cities`` entries."""


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
