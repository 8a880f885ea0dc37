"""Masks of groups: pictures, tiles that are called what they are, and the masks they generalise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard.ops import attention
from regard.ops.masks import Blocks, GlobalTokens, Mask, Segments, ShiftedBlocks, Sinks, Tiles
from regard.ops.masks.base import EMPTY, FULL, PARTIAL


def picture(mask: Mask, head: int = 0) -> list[str]:
    dense = mask.dense(6, 6, heads=2).expand(1, 2, 6, 6)[0, head]
    return ["".join("x" if allowed else "." for allowed in row) for row in dense.tolist()]


PLAIN, SHIFTED = (
    ["xxx...", "xxx...", "xxx...", "...xxx", "...xxx", "...xxx"],
    ["x.....", *[".xxx.."] * 3, *["....xx"] * 2],
)


def test_the_first_of_the_shifted_blocks_is_what_stands_before_the_shift():
    mask = ShiftedBlocks(3, 1, first=1)
    assert picture(mask, 0) == PLAIN
    assert picture(mask, 1) == SHIFTED


def test_global_tokens_are_a_row_and_a_column():
    assert picture(GlobalTokens(1)) == ["xxxxxx", *["x....."] * 5]
    wanted = Sinks(2).dense(9, 9) | Sinks(2).dense(9, 9).mT
    assert torch.equal(GlobalTokens(2).dense(9, 9), wanted)


def test_places_begin_anew_with_each_sequence():
    packed = Segments.from_lengths([4, 2])
    places = packed.places()
    assert picture(ShiftedBlocks(3, 1, places=places) & packed) == [
        "x.....", ".xxx..", ".xxx..", ".xxx..", "....x.", ".....x",
    ]  # fmt: skip
    assert picture(GlobalTokens(1, places) & packed) == ["xxxx..", "x.....", "x.....", "x.....", "....xx", "....x."]


@pytest.mark.parametrize("mask", [ShiftedBlocks(5, 0), ShiftedBlocks(5, 3, first=9)], ids=repr)
def test_without_a_shift_they_are_blocks(mask):
    assert torch.equal(mask.dense(23, 23, heads=2).expand(1, 2, 23, 23)[:, :1], Blocks(5).dense(23, 23))


@st.composite
def grouped(draw: st.DrawFn, keys: int) -> Mask:
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    batch = draw(st.sampled_from([(), (2,)]))
    ids = (torch.rand(*batch, keys, generator=random) < 0.1).cumsum(-1)
    places = draw(st.sampled_from([None, Segments(ids).places()]))
    size = draw(st.integers(1, 9))
    if draw(st.booleans()):
        return ShiftedBlocks(size, draw(st.integers(0, size - 1)), draw(st.integers(0, 4)), places)
    return GlobalTokens(size, places)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 17), st.integers(1, 17))
def test_a_tile_is_never_called_what_it_is_not(data, query_tile, key_tile):
    keys = data.draw(st.integers(1, 60))
    queries = data.draw(st.integers(1, keys))
    mask = data.draw(grouped(keys))
    states = mask.tile_states(Tiles(2, 4, queries, keys, query_tile, key_tile)).expand(2, 4, -1, -1)
    dense = mask.dense(queries, keys, batch=2, heads=4).expand(2, 4, -1, -1)
    exact = mask.places is None  # pyright: ignore[reportAttributeAccessIssue] both have it
    for row, part in enumerate(dense.split(query_tile, dim=2)):
        for column, tile in enumerate(part.flatten(0, 1).split(key_tile, dim=2)):
            tile, state = tile.flatten(1), states[:, :, row, column].flatten()
            wanted = torch.where(tile.all(-1), FULL, torch.where(tile.any(-1), PARTIAL, EMPTY))
            # Places that begin anew may leave a tile in doubt.
            assert (state == wanted).all() if exact else ((state == wanted) | (state == PARTIAL)).all()


def test_engines_agree():
    query, key, value = (torch.randn(2, 4, 300, 4, dtype=torch.float64) for _ in range(3))
    places = Segments.from_lengths([130, 170]).places()
    for mask in (ShiftedBlocks(50, 25, 2), ShiftedBlocks(50, 25, 2, places) | GlobalTokens(3, places)):
        wanted = attention(query, key, value, mask=mask, backend="reference")
        torch.testing.assert_close(attention(query, key, value, mask=mask, backend="tiled"), wanted)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: ShiftedBlocks(0, 0), "size 0"),
        (lambda: ShiftedBlocks(3, 3), "shift 3 for blocks of 3"),
        (lambda: ShiftedBlocks(3, 1, -1), "first -1"),
        (lambda: ShiftedBlocks(3, 1, 0, torch.rand(4)), "places"),
        (lambda: GlobalTokens(-1), "n -1"),
        (lambda: GlobalTokens(1, torch.zeros(5, dtype=torch.long)).validate(1, 1, 4, 4), r"places of shape \(5,\)"),
    ],
)
def test_what_says_nothing_is_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
