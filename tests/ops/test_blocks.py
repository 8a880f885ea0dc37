"""Maps of chosen blocks: what each way of choosing chooses, and that engines compute what a map allows and no more."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import biases, sizes
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from regard.ops import attention, attention_with_lse, explain
from regard.ops.biases import RelativeBias
from regard.ops.blocks import BlockMap, block_means, split_map
from regard.ops.engines.chosen import ChosenLoop
from regard.ops.engines.loops import loop_for
from regard.ops.engines.routed import RoutedLoop
from regard.ops.engines.visits import ALIKE, Visits
from regard.ops.masks import Causal, Mask, Padding, Tiles, Window
from regard.ops.masks.base import EMPTY, FULL
from regard.ops.masks.plan import _kept

SCORES = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 4.0, -torch.inf], [torch.inf, 1.0, 1.5, 9.0]])[None, None]


def picture(blocks: BlockMap) -> list[str]:
    return ["".join("x" if visited else "." for visited in row) for row in blocks.visits[0, 0].tolist()]


def test_top_k_takes_the_highest_of_each_query():
    assert picture(BlockMap.top_k(SCORES, 2, query_block=1, key_block=8)) == ["x.x.", ".xx.", "x..x"]


def test_top_k_never_takes_what_has_minus_infinity():
    assert picture(BlockMap.top_k(SCORES, 4, query_block=1, key_block=8)) == ["xxxx", "xxx.", "xxxx"]


def test_expert_choice_takes_the_highest_of_each_block_of_keys():
    chosen = BlockMap.top_k(SCORES, 1, query_block=1, key_block=8, across="key")
    assert picture(chosen) == ["....", ".xx.", "x..x"]


def test_top_k_of_a_head_takes_the_highest_wherever_they_are():
    chosen = BlockMap.top_k(SCORES, 1, query_block=1, key_block=8, across="head")
    assert picture(chosen) == ["....", ".x..", "x..x"]


def test_threshold_takes_all_that_reach_it():
    assert picture(BlockMap.threshold(SCORES, 2.0, query_block=1, key_block=8)) == ["x.x.", ".xx.", "x..x"]


@pytest.mark.parametrize(
    ("share", "across", "wanted"),
    [
        (0.5, "query", ["x...", "x...", "x..."]),
        (0.6, "query", ["xx..", "x...", "xx.."]),
        (1.0, "query", ["xxx.", "x...", "xxx."]),
        (0.5, "key", ["....", "....", "xxx."]),
        (0.5, "head", ["....", "....", "xx.."]),
    ],
)
def test_cumulative_takes_the_fewest_that_reach_the_share(share, across, wanted):
    weights = torch.tensor([[0.5, 0.3, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0], [4.0, 2.0, 1.0, 0.0]])[None, None]
    chosen = BlockMap.cumulative(weights, share, query_block=1, key_block=8, across=across)
    assert picture(chosen) == wanted


def test_a_mask_of_blocks_is_the_map_written_out():
    visits = torch.rand(2, 3, 4, 5) < 0.5
    mask = BlockMap(visits, 3, 2, torch.tensor(-2)).dense(12, 10, batch=2, heads=3)
    assert torch.equal(mask, visits.repeat_interleave(3, 2).repeat_interleave(2, 3))


def test_block_means_average_the_real_tokens_of_a_short_block():
    x = torch.randn(2, 10, 3, dtype=torch.float64)
    wanted = torch.stack([x[:, :4].mean(1), x[:, 4:8].mean(1), x[:, 8:].mean(1)], dim=1)
    torch.testing.assert_close(block_means(x, 4), wanted)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tiles_of_a_map_are_exact_where_blocks_are_tiles(data):
    """Where blocks and tiles coincide or one divides the other, empty and full tiles are found, and only they."""
    rows, columns = (data.draw(st.sampled_from([16, 32, 64, 128])) for _ in "qk")
    queries, keys = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    visits = torch.rand(2, 2, -(-queries // rows), -(-keys // columns)) < 0.4
    mask = BlockMap(visits, rows, columns, torch.tensor(keys - queries))
    tiles = Tiles(2, 2, queries, keys, 64, 64)
    states, dense = mask.tile_states(tiles), mask.dense(queries, keys, batch=2, heads=2)
    for row in range(states.shape[-2]):
        for column in range(states.shape[-1]):
            tile = dense[..., row * 64 : (row + 1) * 64, column * 64 : (column + 1) * 64].flatten(-2)
            wanted = torch.where(tile.all(-1), FULL, torch.where(tile.any(-1), 1, EMPTY))
            assert torch.equal(states[..., row, column].long(), wanted.long())


def call(mask: Mask, query: Tensor, key: Tensor, value: Tensor, **more: object) -> list[Tensor]:
    """Output, log-sum-exp and gradients of both."""
    out, lse = attention_with_lse(query, key, value, mask=mask, **more)  # pyright: ignore[reportArgumentType]
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    total = (out * weight).sum() + lse.masked_fill(lse == -torch.inf, 0.0).mul(0.3).sum()
    return [out, lse, *torch.autograd.grad(total, [query, key, value])]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_single_queries_that_choose_equal_the_reference_in_float64(data):
    size = data.draw(sizes())
    tensors = size.tensors(torch.float64, 0)
    columns = data.draw(st.sampled_from([1, 7, 64, 128, 400]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    samples, heads = data.draw(st.sampled_from([1, size.batch])), data.draw(st.sampled_from([1, size.heads]))
    shape = samples, heads, size.queries, -(-size.keys // columns)
    mask: Mask = BlockMap(torch.rand(shape, generator=random) < 0.4, 1, columns, torch.tensor(size.keys - size.queries))
    others = [None, Causal(), Window(30), Padding(torch.randint(0, size.keys + 1, (size.batch,), generator=random))]
    other = data.draw(st.sampled_from(others))
    mask = mask if other is None else mask & other
    bias, dropout = data.draw(biases(size, torch.float64)), data.draw(st.sampled_from([0.0, 0.3]))
    results = []
    for backend in ("tiled", "reference"):
        torch.manual_seed(0)
        results.append(call(mask, *tensors, bias=bias, dropout=dropout, backend=backend))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_queries_that_fill_a_tile_leave_no_trace_though_a_bias_overflows_there():
    query, key, value = (torch.randn(1, 2, 130, 8, requires_grad=True) for _ in range(3))
    bias = RelativeBias(torch.full((2, 3), 1e4), 1)
    mask = BlockMap(torch.ones(1, 2, 2, 2, dtype=torch.bool), 128, 128)
    results = [call(mask, query, key, value, bias=bias, backend=name) for name in ("tiled", "reference")]
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


def test_a_bias_learns_through_chosen_blocks():
    query, key, value = (torch.randn(2, 4, 200, 8, dtype=torch.float64) for _ in range(3))
    table = torch.randn(4, 41, dtype=torch.float64, requires_grad=True)
    mask = BlockMap.top_k(torch.randn(2, 4, 200, 7), 3, query_block=1, key_block=32) & Causal()
    grads = []
    for backend in ("tiled", "reference"):
        out = attention(query, key, value, mask=mask, bias=RelativeBias(table, 20), backend=backend)
        grads.append(torch.autograd.grad(out.square().sum(), table)[0])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("query_block", [1, 128])
def test_work_is_in_proportion_to_what_is_visited(query_block):
    """FLOPs of tiled, counted: an eighth of the blocks is an eighth of the products, forward and backward."""
    heads, length, width = 2, 2048, 16
    query, key, value = (torch.randn(1, heads, length, width) for _ in range(3))
    scores = torch.rand(1, heads, length // query_block, length // 128)
    counted = []
    for count in (16, 2):
        mask = BlockMap.top_k(scores, count, query_block=query_block, key_block=128)
        text, tensors = mask.flatten()
        loop = loop_for(query, key, value, tensors, [], None, text, "", "Softmax()", 1.0, 0.0)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out, lse = loop.forward()
            loop.backward(torch.ones_like(out), torch.zeros_like(lse), out, lse, False)
        counted.append(counter.get_total_flops())
    # The counter does not see products into given memory.
    assert counted[0] >= 8 * heads * length**2 * width
    # Blocks that fewer queries visit than others in the same product are filled up.
    assert counted[0] // 8 <= counted[1] <= counted[0] // 8 / ALIKE


def test_queries_that_visit_their_own_block_alone_equal_the_reference():
    """All stand at the same distance from their block, and the mask is asked once for all blocks."""
    tensors = [torch.randn(2, 3, 256, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    own = torch.arange(256)[:, None] // 64 == torch.arange(4)
    for other in (Causal(), Window(5), Causal() & Padding(torch.tensor([256, 100]))):
        mask = BlockMap(own[None, None], 1, 64) & other
        for ours, wanted in zip(*(call(mask, *tensors, backend=name) for name in ("tiled", "reference")), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("query_block", "owner"), [(1, Visits), (128, ChosenLoop)])
def test_who_visits_whom_is_found_once_for_each_of_several_layers_and_let_go_with_them(query_block, owner, monkeypatch):
    found, make = [], owner._made
    monkeypatch.setattr(owner, "_made", lambda self: found.append(1) or make(self))
    x = torch.randn(1, 2, 256, 8, requires_grad=True)
    layers = [BlockMap(torch.rand(1, 2, 256 // query_block, 2) < 0.7, query_block, 128) for _ in range(3)]
    y = x
    for layer in layers:
        y = attention(y, y, y, mask=layer & Causal(), backend="tiled")
    y.sum().backward()
    assert len(found) == 3
    own = {name for name in _kept if {id(layer.visits) for layer in layers} & set(name)}
    assert own
    del y, layer, layers
    gc.collect()
    assert not own & set(_kept)


def test_a_map_that_changes_is_planned_anew():
    x = torch.randn(1, 2, 256, 8)
    for query_block in (1, 128):
        mask = BlockMap(torch.ones(1, 2, 256 // query_block, 2, dtype=torch.bool), query_block, 128)
        attention(x, x, x, mask=mask, backend="tiled")
        mask.visits[..., 1] = False
        ours, wanted = (attention(x, x, x, mask=mask, backend=name) for name in ("tiled", "reference"))
        torch.testing.assert_close(ours, wanted)


def test_each_map_has_its_loop():
    query = torch.randn(1, 2, 256, 8)

    def loop(query_block: int, heads: int = 2) -> object:
        mask = BlockMap(torch.ones(1, heads, 256 // query_block, 2, dtype=torch.bool), query_block, 128) & Causal()
        text, tensors = mask.flatten()
        return loop_for(query, query, query, tensors, [], None, text, "", "Softmax()", 1.0, 0.0)

    assert isinstance(loop(1), RoutedLoop)
    assert isinstance(loop(128), ChosenLoop)
    assert not isinstance(loop(128, heads=1), ChosenLoop | RoutedLoop)
    assert "tiled" in str(
        explain(*[torch.randn(1, 1, 512, 8)] * 3, mask=BlockMap(torch.ones(1, 1, 4, 4) > 0, 128, 128))
    )


def test_a_mask_is_split_into_its_finest_map_and_the_rest():
    coarse, fine = (BlockMap(torch.ones(1, 1, 4, 4, dtype=torch.bool), size, 8) for size in (8, 1))
    assert split_map(Causal() & coarse & (fine & Window(3))) == (fine, Causal() & coarse & Window(3))
    assert split_map(fine) == (fine, None)
    assert split_map(Causal() | fine) == (None, Causal() | fine)
    assert split_map(None) == (None, None)


def test_compiles_with_new_choices_and_lengths():
    torch._dynamo.reset()
    counter = CompileCounter()

    def routed(x: Tensor) -> Tensor:
        scores = x @ block_means(x, 64).mT
        return attention(x, x, x, mask=BlockMap.top_k(scores, 2, query_block=1, key_block=64), backend="tiled")

    compiled = torch.compile(routed, backend=counter, fullgraph=True)
    for length in (256, 320, 400):
        x = torch.randn(1, 2, length, 8)
        torch.testing.assert_close(compiled(x), routed(x))
    assert counter.frame_count <= 2


def test_flex_takes_a_map():
    query, key, value = (torch.randn(1, 2, 256, 16) for _ in range(3))
    mask = BlockMap(torch.rand(1, 2, 2, 2) < 0.6, 128, 128) & Causal()
    with torch.no_grad():
        ours = attention(query, key, value, mask=mask, backend="flex")
    torch.testing.assert_close(ours, attention(query, key, value, mask=mask, backend="reference"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockMap(torch.ones(1, 1, 2, 2), 1, 1), "booleans of shape"),
        (lambda: BlockMap(torch.ones(1, 1, 2, 2) > 0, 0, 1), "query_block 0 is not positive"),
        (lambda: BlockMap.top_k(SCORES, 0, query_block=1, key_block=1), "count 0 is not positive"),
        (lambda: BlockMap.top_k(SCORES, 1, query_block=1, key_block=1, across="row"), "across 'row' is not known"),  # pyright: ignore[reportArgumentType]
        (lambda: BlockMap.cumulative(SCORES, 1.5, query_block=1, key_block=1), "share 1.5"),
        (lambda: block_attention(BlockMap(torch.ones(1, 1, 2, 3) > 0, 4, 4)), r"give \(1 or 1, 2 or 1, 2, 2\)"),
        (lambda: block_attention(BlockMap(torch.ones(1, 1, 2, 2) > 0, 4, 4), queries=7), "give offset 1"),
    ],
)
def test_a_bad_map_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def block_attention(mask: BlockMap, queries: int = 8) -> Tensor:
    return attention(torch.randn(1, 2, queries, 4), *[torch.randn(1, 2, 8, 4)] * 2, mask=mask)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_heads_that_choose_tiles_equal_the_reference_in_float64(data):
    size = data.draw(sizes())
    tensors = size.tensors(torch.float64, 0)
    rows, columns = (data.draw(st.sampled_from([64, 128, 256])) for _ in "qk")
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shape = size.batch, size.heads, -(-size.queries // rows), -(-size.keys // columns)
    offset = torch.tensor(size.keys - size.queries)
    mask: Mask = BlockMap(torch.rand(shape, generator=random) < 0.6, rows, columns, offset)
    others = [None, Causal(), Window(30), Padding(torch.randint(0, size.keys + 1, (size.batch,), generator=random))]
    other = data.draw(st.sampled_from(others))
    mask = mask if other is None else mask & other
    bias, dropout = data.draw(biases(size, torch.float64)), data.draw(st.sampled_from([0.0, 0.3]))
    results = []
    for backend in ("tiled", "reference"):
        torch.manual_seed(0)
        results.append(call(mask, *tensors, bias=bias, dropout=dropout, backend=backend))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


# 1000 has all that 1024 has, and a short last block.
@pytest.mark.parametrize("length", [pytest.param(1024, marks=pytest.mark.slow), 1000])
def test_many_heads_that_choose_tiles_are_cut_into_pieces_that_change_nothing(length):
    """More rows and keys than are walked at once, a last block that is short, and shared key heads."""
    query = torch.randn(2, 12, length, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 4, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scores = torch.rand(2, 12, 8, 8)
    for mask in (
        BlockMap.top_k(scores, 3, query_block=128, key_block=128) & Causal(),
        BlockMap.threshold(scores, 0.3, query_block=128, key_block=128),
    ):
        tiled = call(mask, query, key, value, backend="tiled")
        for ours, wanted in zip(tiled, call(mask, query, key, value, backend="reference"), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_a_long_row_of_chosen_tiles_is_walked_in_ranges():
    query, key, value = (
        torch.randn(1, 2, length, 8, dtype=torch.float64, requires_grad=True) for length in (130, 5000, 5000)
    )
    mask = BlockMap(torch.rand(1, 2, 2, 40) < 0.9, 128, 128, torch.tensor(4870)) & Causal()
    tiled = call(mask, query, key, value, backend="tiled")
    for ours, wanted in zip(tiled, call(mask, query, key, value, backend="reference"), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("across", ["query", "key", "head"])
def test_the_fast_way_to_the_highest_chooses_what_topk_chooses(across, monkeypatch):
    """Where they are all different, where many are −∞ or +∞, and where ties or NaN leave the choice to `topk`."""
    scores = torch.randn(2, 3, 40, 24)
    masked = scores.masked_fill(torch.rand_like(scores) < 0.7, -torch.inf)
    owned = masked.diagonal_scatter(torch.full((2, 3, 24), torch.inf), dim1=2, dim2=3)
    broken = scores.index_fill(3, torch.tensor([5]), torch.nan)
    every = [scores, masked, owned, scores.round(), broken, torch.zeros_like(scores)]

    def choices() -> list[Tensor]:
        maps = [BlockMap.top_k(x, k, query_block=1, key_block=8, across=across) for x in every for k in (1, 5, 50)]
        return [chosen.visits for chosen in maps]

    fast = choices()
    monkeypatch.setattr("regard.ops.blocks._highest", lambda lines, count: None)
    for ours, wanted in zip(fast, choices(), strict=True):
        assert torch.equal(ours, wanted)
        assert ours.stride() == wanted.stride()
