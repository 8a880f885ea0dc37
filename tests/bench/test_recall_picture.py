"""The known picture of recall: exact attention holds every pair, a constant state fewer the more there are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from regard.bench.quality import train
from regard.bench.variant import Variant

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def accuracy() -> Iterator[dict[str, dict[int, float]]]:
    """By mechanism and number of pairs."""
    found = {}
    for key in ("multi_head", "lightning"):
        cell = train("recall", Variant(key), 0, torch.device("cpu"))
        found[key] = {int(pairs): score for pairs, score in cell.by.items()}
    yield found
    torch.use_deterministic_algorithms(False)


def test_exact_attention_recalls_at_every_capacity(accuracy: dict[str, dict[int, float]]):
    assert min(accuracy["multi_head"].values()) >= 0.99


def test_lightning_recalls_few_pairs(accuracy: dict[str, dict[int, float]]):
    assert accuracy["lightning"][4] >= 0.9


def test_lightning_does_not_recall_many_pairs(accuracy: dict[str, dict[int, float]]):
    assert accuracy["lightning"][64] < 0.6


def test_lightning_recalls_less_the_more_pairs_there_are(accuracy: dict[str, dict[int, float]]):
    by_pairs = [accuracy["lightning"][pairs] for pairs in sorted(accuracy["lightning"])]
    assert all(more <= fewer + 0.03 for fewer, more in pairwise(by_pairs))
