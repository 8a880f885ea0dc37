"""The digits are scikit-learn's, one in four held out."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from regard.tasks.digits import CLASSES, GRID, HELD_OUT, images

SPLITS = ("train", "test")


def described(pixels: Tensor, shown: Tensor) -> Counter:
    return Counter((*row, label) for row, label in zip(pixels.flatten(1).tolist(), shown.tolist(), strict=True))


@pytest.mark.parametrize(("split", "count"), [("train", 1347), ("test", 450)])
def test_splits_have_their_sizes(split: str, count: int):
    pixels, shown = images(split)
    assert pixels.shape == (count, *GRID, 1)
    assert shown.shape == (count,)
    assert (pixels.dtype, shown.dtype) == (torch.float32, torch.int64)


def test_one_in_four_is_held_out():
    assert len(images("test")[1]) == -(-sum(len(images(split)[1]) for split in SPLITS) // HELD_OUT)


@pytest.mark.parametrize("split", SPLITS)
def test_pixels_go_from_zero_to_one(split: str):
    pixels, _ = images(split)
    assert pixels.min() == 0
    assert pixels.max() == 1
    assert torch.equal(16 * pixels, (16 * pixels).round())


@pytest.mark.parametrize("split", SPLITS)
def test_every_digit_is_shown_about_equally_often(split: str):
    counts = torch.bincount(images(split)[1], minlength=CLASSES)
    assert counts.shape == (CLASSES,)
    assert (counts > 0.7 * counts.float().mean()).all()


def test_no_image_is_on_both_sides():
    assert not described(*images("train")) & described(*images("test"))


def test_splits_are_everything_with_the_labels_of_the_source():
    pixels, shown = map(torch.from_numpy, load_digits(return_X_y=True))
    everything = described((pixels / 16).float(), shown)
    assert described(*images("train")) + described(*images("test")) == everything


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="digits: split 'tests' is not known; did you mean 'test'"):
        images("tests")
