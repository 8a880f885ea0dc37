"""Scenes show the objects that their masks say, and the score knows a perfect answer from a chance one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from regard.tasks.scenes import COLOURS, GROUND, Scenes, foreground_ari


def scenes(count: int = 200, **options: int) -> tuple[Tensor, Tensor]:
    return Scenes(**{"size": 16, **options}).batch(count, torch.Generator().manual_seed(0))


def test_pixels_of_an_object_have_one_colour_and_the_ground_is_black():
    images, ids = scenes(40)
    assert images.shape == (40, 3, 16, 16)
    for image, own in zip(images, ids, strict=True):
        assert (image[:, own == GROUND] == -1).all()
        for number in own.unique().tolist():
            colours = image[:, own == number]
            assert_close(colours, colours[:, :1].expand_as(colours))
            if number != GROUND:
                assert (((colours[:, 0] + 1) / 2 - COLOURS).abs().amax(-1) < 1e-6).any()


def test_number_of_objects_is_what_was_asked_for():
    _, ids = scenes(fewest=2, most=4)
    seen = torch.stack([(ids == number).any((1, 2)) for number in range(1, 5)], dim=1)
    # Only an object that is drawn before another can be covered, never the last one.
    last = (ids.amax((1, 2))).unique()
    assert last.tolist() == [2, 3, 4]
    assert seen.float().mean() > 0.6


def test_objects_lie_inside_the_image_and_have_a_size():
    _, ids = scenes(fewest=1, most=1)
    area = (ids == 1).float().mean((1, 2))
    assert area.min() > 0.01
    assert area.max() < 0.2


def test_shapes_are_squares_discs_and_triangles():
    """A square fills its box, a disc about π/4 of it and a triangle about half."""
    _, ids = scenes(300, size=64, fewest=1, most=1)
    filled = []
    for shown in ids == 1:
        rows, columns = shown.any(1).sum(), shown.any(0).sum()
        filled.append(float(shown.sum() / (rows * columns)))
    kinds = torch.tensor(filled)
    for share in (1.0, 0.785, 0.53):
        assert ((kinds - share).abs() < 0.06).float().mean() > 0.2
    assert torch.stack([(kinds - share).abs() < 0.06 for share in (1.0, 0.785, 0.53)]).any(0).float().mean() > 0.95


def test_seed_determines_the_scenes():
    assert all(map(torch.equal, scenes(), scenes()))


def test_perfect_masks_score_one_whatever_the_ground():
    _, ids = scenes(20)
    renamed = (7 - ids).masked_fill(ids == GROUND, 3)
    assert foreground_ari(ids, renamed) == [1.0] * 20


def test_chance_scores_about_zero_and_one_slot_for_two_objects_zero():
    _, ids = scenes(100, fewest=2, most=2)
    random = torch.randint(4, ids.shape, generator=torch.Generator().manual_seed(1))
    assert abs(sum(foreground_ari(ids, random)) / 100) < 0.05
    both = ids[(ids == 1).any((1, 2)) & (ids == 2).any((1, 2))]
    assert not any(foreground_ari(both, torch.zeros_like(both)))


@pytest.mark.parametrize(
    ("options", "message"), [({"size": 4}, "size 4"), ({"fewest": 3, "most": 2}, "3 to 2 objects")]
)
def test_bad_sizes_are_named(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=f"Scenes: {message}"):
        Scenes(**options)


def test_masks_of_another_size_are_refused():
    with pytest.raises(ValueError, match="foreground_ari: found of shape"):
        foreground_ari(torch.zeros(1, 4, 4), torch.zeros(1, 5, 4))
