"""Hulls, triangulations and tours are exact, in the order the paper asks for, and scored as it scores them."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from regard.tasks import geometry

pytest.importorskip("scipy")

SETS = geometry.uniform_points(20, 7, torch.Generator().manual_seed(0))
SQUARE = torch.tensor([[0.5, 0.5], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def side(a, b, c) -> float:
    return ((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])).item()


def test_every_point_is_left_of_every_edge_of_the_hull():
    for points in SETS:
        corners = geometry.hull(points)
        assert corners[0] == min(corners)
        for start, end in zip(corners, corners[1:] + corners[:1], strict=True):
            assert all(side(points[start], points[end], points[i]) > 0 for i in range(7) if i not in (start, end))


def test_no_point_lies_in_the_circle_of_a_delaunay_triangle_and_the_triangles_cover_the_hull():
    for points in SETS:
        triangles = geometry.delaunay(points)
        assert all(a < b < c for a, b, c in triangles)
        for triangle in triangles:
            a, b, c = points[list(triangle)]
            centre = torch.linalg.solve(2 * torch.stack([b - a, c - a]), torch.stack([b @ b - a @ a, c @ c - a @ a]))
            assert ((points - centre).norm(dim=-1) >= (a - centre).norm() - 1e-12).all()
        covered = sum(abs(side(*points[list(triangle)])) / 2 for triangle in triangles)
        assert covered == pytest.approx(geometry._area(points[geometry.hull(points)]))


def test_triangles_are_ordered_by_their_incentres():
    for points in SETS:
        centres = [geometry._incentre(points[list(triangle)]) for triangle in geometry.delaunay(points)]
        assert centres == sorted(centres)
    x, y = geometry._incentre(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]]))
    assert (x, y) == pytest.approx((1, 1))


def test_tours_are_the_shortest_of_all():
    for points in SETS[:5]:
        order = geometry.tour(points)
        assert order[0] == 0
        assert order[1] < order[-1]
        shortest = min(geometry.tour_length(points, [0, *rest]) for rest in permutations(range(1, 7)))
        assert geometry.tour_length(points, order) == pytest.approx(shortest)


def test_a_hull_may_begin_anywhere_and_go_either_way():
    true = geometry.hull(SQUARE)
    assert true == [1, 4, 2, 3]
    assert geometry.same_hull([2, 3, 1, 4], true)
    assert geometry.same_hull([4, 1, 3, 2], true)
    assert not geometry.same_hull([1, 2, 4, 3], true)
    assert not geometry.same_hull([1, 4, 2], true)
    assert not geometry.same_hull([], true)


def test_hull_coverage_is_the_share_of_the_area_and_none_for_what_is_no_polygon():
    assert geometry.hull_coverage(SQUARE, [1, 4, 2, 3]) == pytest.approx(1)
    assert geometry.hull_coverage(SQUARE, [2, 3, 1]) == pytest.approx(0.5)
    assert geometry.hull_coverage(SQUARE, [1, 2, 4, 3]) is None
    assert geometry.hull_coverage(SQUARE, [1, 4, 1]) is None


def test_triangles_count_whatever_their_order():
    true = geometry.delaunay(SQUARE)
    turned = [(c, a, b) for a, b, c in reversed(true)]
    assert geometry.same_triangulation(turned, true)
    assert not geometry.same_triangulation(turned[1:], true)
    assert geometry.triangle_coverage(turned[1:], true) == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geometry.tour(torch.rand(11, 2)), "11 points; give 3 to 10"),
        (lambda: geometry.hull(torch.rand(2, 2)), "2 points"),
        (lambda: geometry.delaunay(torch.rand(2, 2)), "2 points"),
        (lambda: geometry.tour_length(SQUARE, [0, 1, 2, 3, 3]), "every point once"),
        (lambda: geometry.padded([[1, 2]], 1, -100), "an answer of 2"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_padding_fills_up_answers():
    assert geometry.padded([[1], [2, 3]], 3, -100).tolist() == [[1, -100, -100], [2, 3, -100]]


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_many_at_once_have_the_answers_of_each(size: int):
    sets = geometry.uniform_points(40, size, torch.Generator().manual_seed(size))
    hulls, triangulations, tours = geometry.hulls(sets), geometry.triangulations(sets), geometry.tours(sets)
    for sample, points in enumerate(sets):
        assert hulls[sample][hulls[sample] != geometry.IGNORED].tolist() == geometry.hull(points)
        corners = triangulations[sample][triangulations[sample] != geometry.IGNORED]
        assert [*map(tuple, corners.view(-1, 3).tolist())] == geometry.delaunay(points)
        assert sample >= 10 or tours[sample].tolist() == geometry.tour(points)


@pytest.mark.parametrize("solve", [geometry.hulls, geometry.triangulations, geometry.tours])
def test_sets_of_too_few_points_are_refused(solve):
    with pytest.raises(ValueError, match=r"points of shape \(4, 2, 2\); give \(count, points, 2\)"):
        solve(torch.rand(4, 2, 2))


def test_tours_of_many_points_are_not_tried_out():
    with pytest.raises(ValueError, match="tours: 9 points; give 3 to 8"):
        geometry.tours(torch.rand(1, 9, 2))
