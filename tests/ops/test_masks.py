"""Masks mean what they say, and every form derived from a mask is the mask."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import masks, sizes

from regard.ops import attention
from regard.ops.masks import (
    Blocks,
    Causal,
    Dense,
    Dilated,
    Keys,
    Mask,
    Neighborhood,
    Ordered,
    Padding,
    Prefix,
    Segments,
    Sinks,
    Tiles,
    Window,
    plan,
)
from regard.ops.masks.base import EMPTY, FULL
from regard.ops.neighborhood import neighborhood_attention


def rows(mask: Mask, queries: int, keys: int, **sizes) -> list[str]:
    dense = mask.dense(queries, keys, **sizes)[0, 0]
    return ["".join("x" if allowed else "." for allowed in row) for row in dense.tolist()]


@pytest.mark.parametrize(
    ("mask", "picture"),
    [
        (Causal(), ["x...", "xx..", "xxx.", "xxxx"]),
        (Window(1), ["xx..", "xxx.", ".xxx", "..xx"]),
        (Window(2, 0), ["x...", "xx..", "xxx.", ".xxx"]),
        (Causal() & (Window(0) | Sinks(1)), ["x...", "xx..", "x.x.", "x..x"]),
        (Causal() | Prefix(3), ["xxx.", "xxx.", "xxx.", "xxxx"]),
        (Blocks(3), ["xxx.", "xxx.", "xxx.", "...x"]),
        (Dilated(1, 2), ["x.x.", ".x.x", "x.x.", ".x.x"]),
        (Dilated(1, 3), ["x..x", ".x..", "..x.", "x..x"]),
        (Segments(torch.tensor([0, 0, 1, 1])), ["xx..", "xx..", "..xx", "..xx"]),
        (Segments.from_lengths([1, 3]), ["x...", ".xxx", ".xxx", ".xxx"]),
        (Padding(torch.tensor([2])), ["xx..", "xx..", "xx..", "xx.."]),
        (Keys(torch.tensor([True, False, False, True])), ["x..x"] * 4),
        (~Causal(), [".xxx", "..xx", "...x", "...."]),
        (Ordered(torch.tensor([0, 3, 1, 2]), torch.tensor([2, 0, 3, 0])), [".x.x", "xxxx", ".x.x", "xx.x"]),
        (Dense(torch.eye(4, dtype=torch.bool)), ["x...", ".x..", "..x.", "...x"]),
        (Neighborhood((4,), (3,)), ["xxx.", "xxx.", ".xxx", ".xxx"]),
        (Neighborhood((2, 2), (1, 1)), ["x...", ".x..", "..x.", "...x"]),
    ],
    ids=repr,
)
def test_picture(mask, picture):
    assert rows(mask, 4, 4) == picture


def test_unequal_lengths_align_at_the_end():
    assert rows(Causal(), 2, 4) == ["xxx.", "xxxx"]
    assert rows(Causal(), 4, 2) == ["..", "..", "x.", "xx"]
    assert rows(Window(1, 0), 1, 4) == ["..xx"]


def test_per_sample_masks_differ_by_sample():
    dense = (Causal() & Padding(torch.tensor([1, 3]))).dense(3, 3, batch=2)
    assert dense.shape == (2, 1, 3, 3)
    assert dense[0, 0].sum() == 3
    assert dense[1, 0].sum() == 6


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([1, 7, 16, 64]), st.sampled_from([1, 5, 16, 64]))
def test_a_plan_never_lies(data, query_tile, key_tile):
    size = data.draw(sizes())
    mask = data.draw(masks(size)) or Causal()
    tiles = Tiles(size.batch, size.heads, size.queries, size.keys, query_tile, key_tile)
    states = plan(mask, tiles).states.expand(size.batch, size.heads, -1, -1)
    dense = mask.dense(size.queries, size.keys, batch=size.batch, heads=size.heads)
    dense = dense.expand(size.batch, size.heads, -1, -1)
    for row, queries in enumerate(dense.split(query_tile, dim=2)):
        for column, tile in enumerate(queries.split(key_tile, dim=3)):
            state = states[:, :, row, column]
            assert not (tile.flatten(2).any(-1) & (state == EMPTY)).any()
            assert (tile.flatten(2).all(-1) | (state != FULL)).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_flex_form_is_the_dense_form(data):
    size = data.draw(sizes())
    mask = data.draw(masks(size)) or Causal()
    mask_mod = mask.flex(size.queries, size.keys)
    index = [torch.arange(extent) for extent in (size.batch, size.heads, size.queries, size.keys)]
    grid = torch.meshgrid(*index, indexing="ij")
    dense = mask.dense(size.queries, size.keys, batch=size.batch, heads=size.heads)
    asked = mask_mod(*grid)
    assert torch.equal(asked.expand(grid[0].shape), dense.expand(grid[0].shape))


def test_plan_of_a_window_is_sparse_and_does_not_build_the_square():
    tiles = Tiles(1, 1, 2**20, 2**20, 1024, 1024)
    made = plan(Causal() & Window(1024), tiles)
    assert made.density < 0.004
    assert made.states.numel() == 1024 * 1024


@dataclass(frozen=True, eq=False, repr=False)
class EveryOther(Mask):
    """A user's mask with nothing but `allows`."""

    phase: int

    def allows(self, batch, head, query, key):
        return (key - query + self.phase) % 2 == 0


def test_a_mask_of_ones_own_works_in_every_engine():
    query, key, value = (torch.randn(2, 2, 150, 4, dtype=torch.float64) for _ in range(3))
    mask = Causal() & EveryOther(1)
    wanted = attention(query, key, value, mask=mask, backend="reference")
    for backend in ("tiled", "fused"):
        torch.testing.assert_close(attention(query, key, value, mask=mask, backend=backend), wanted)


def test_neighborhood_mask_is_neighborhood_attention():
    grid, options = (9, 8), {"kernel_size": (5, 3), "dilation": (1, 2), "stride": (2, 1), "is_causal": (False, True)}
    query, key, value = (torch.randn(2, 2, *grid, 4, dtype=torch.float64) for _ in range(3))
    wanted = neighborhood_attention(query, key, value, **options)
    flat = (tensor.flatten(2, 3) for tensor in (query, key, value))
    found = attention(*flat, mask=Neighborhood(grid, **options), backend="tiled")
    torch.testing.assert_close(found.unflatten(2, grid), wanted)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_mask_survives_its_flat_form(data):
    mask = data.draw(masks(data.draw(sizes()))) or Causal()
    text, tensors = mask.flatten()
    again = Mask.unflatten(text, tensors)
    assert again == mask
    assert hash(again) == hash(mask)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (Causal(), "Causal()"),
        (Window(3), "Window(3)"),
        (Window(3, 0), "Window(3, 0)"),
        (Causal() & (Window(3, 0) | Sinks(4)), "Causal() & (Window(3, 0) | Sinks(n=4))"),
        (~(Causal() & Blocks(2)), "~(Causal() & Blocks(size=2))"),
        (Padding(torch.tensor([3, 5])), "Padding(lengths=tensor([3, 5]))"),
    ],
)
def test_repr_reads_like_the_constructor(mask, text):
    assert repr(mask) == text
    assert eval(text, {**globals(), "tensor": torch.tensor}) == mask


def test_equal_masks_compare_and_hash_equal_and_others_do_not():
    a, b = Causal() & Padding(torch.tensor([1, 2])), Causal() & Padding(torch.tensor([1, 2]))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Causal() & Padding(torch.tensor([1, 3]))
    assert Window(1) != Window(1, 0)
    assert Prefix(3) != Sinks(3)


def test_a_plan_is_kept_until_its_tensors_change():
    lengths = torch.tensor([10, 300])
    tiles = Tiles(2, 1, 300, 300, 128, 128)
    first = plan(Padding(lengths), tiles)
    assert plan(Padding(lengths), tiles) is first
    lengths[0] = 200
    changed = plan(Padding(lengths), tiles)
    assert changed is not first
    assert (changed.states != first.states).any()


def test_the_kept_plan_does_not_keep_the_tensor_alive():
    import weakref

    allowed = torch.ones(300, 300, dtype=torch.bool)
    reference = weakref.ref(allowed)
    plan(Dense(allowed), Tiles(1, 1, 300, 300, 128, 128))
    del allowed
    assert reference() is None


def test_masks_move_with_to():
    mask = Causal() & Padding(torch.tensor([1, 2]))
    assert mask.to(torch.device("cpu")) is mask
    moved = mask.to(torch.device("meta"))
    assert moved.flatten()[1][0].device.type == "meta"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Window(-1), "before -1 is negative"),
        (lambda: Sinks(-1), "n -1"),
        (lambda: Blocks(0), "size 0"),
        (lambda: Dilated(1, 0), "dilation 0"),
        (lambda: Padding(torch.tensor([1.5])), "torch.float32"),
        (lambda: Segments(torch.zeros(1, 2, 3)), r"\(1, 2, 3\)"),
        (lambda: Ordered(torch.zeros(3), torch.arange(3)), "query_positions .* torch.float32"),
        (lambda: Dense(torch.zeros(3, 3)), "torch.float32"),
        (lambda: Keys(torch.zeros(3)), "torch.float32"),
        (lambda: Neighborhood((4, 4), (3,)), "kernel_size"),
        (lambda: Segments(torch.tensor([0, 1])).validate(1, 1, 3, 3), "length 3"),
        (lambda: Ordered(torch.arange(2), torch.arange(5)).validate(1, 1, 3, 5), r"query_positions of shape \(2,\)"),
        (lambda: Neighborhood((4,), (3,)).validate(1, 1, 5, 5), "4 positions"),
        (lambda: Keys(torch.tensor([True])).validate(1, 1, 5, 5), "5 keys"),
    ],
)
def test_a_mask_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("shape", [(3, 2), (1, 2), (3, 1), (1, 1)])
def test_a_dense_mask_compiles_whatever_it_is_the_same_for(shape):
    mask = Dense(torch.rand(*shape, 300, 300) < 0.5)
    tensors = torch.randn(3, 3, 2, 300, 8).unbind()
    compiled = torch.compile(lambda *tensors: attention(*tensors, mask=mask), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), attention(*tensors, mask=mask, backend="reference"))
