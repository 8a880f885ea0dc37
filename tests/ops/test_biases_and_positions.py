"""Biases and positions are those of their papers."""

from __future__ import annotations

import math

import pytest
import torch

from regard.ops.biases import AdditiveScores, Alibi, RelativeBias
from regard.ops.cache import KeyValueCache
from regard.ops.linear import linear_attention
from regard.ops.positions import grid_positions, layer_decay, lrpe, lrpe_angles, rotary, sinusoidal


def dense(bias, queries, keys, heads):
    return bias.dense(queries, keys, batch=1, heads=heads, device=torch.device("cpu"))[0]


def test_alibi_slopes_of_the_paper():
    assert Alibi.for_heads(8).slopes.tolist() == [2.0**-power for power in range(1, 9)]
    # For 12 heads: the 8 of 8 heads, then every other one of 16.
    assert Alibi.for_heads(12).slopes[8:].tolist() == pytest.approx([2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])


def test_alibi_grows_with_distance_to_both_sides():
    assert dense(Alibi(torch.tensor([2.0])), 3, 3, 1)[0].tolist() == [[0, -2, -4], [-2, 0, -2], [-4, -2, 0]]


def test_clipped_relative_bias_is_a_lookup_of_the_offset():
    table = torch.arange(5.0)[None]
    found = dense(RelativeBias(table, 2), 2, 5, 1)[0]
    # Query 0 stands at key 3: offsets −3 … 1, clipped at −2.
    assert found.tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 1, 2]]


def test_grid_relative_bias_looks_up_every_axis():
    table = torch.randn(1, 9 * 9)
    found = dense(RelativeBias(table, (4, 4), (3, 4)), 12, 12, 1)[0]
    for query, key in ((0, 11), (5, 2), (7, 7)):
        row, column = key // 4 - query // 4 + 4, key % 4 - query % 4 + 4
        assert found[query, key] == table[0, row * 9 + column]


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 7), (7, 3)])
def test_additive_scores_are_those_of_every_pair_and_head(queries, keys):
    vector, query, key = torch.randn(2, 4), torch.randn(3, 2, queries, 4), torch.randn(3, 2, keys, 4)
    found = AdditiveScores(query, key, vector)
    wanted = [
        [[[vector[h] @ torch.tanh(query[b, h, i] + key[b, h, j]) for j in range(keys)] for i in range(queries)]
         for h in range(2)]
        for b in range(3)
    ]  # fmt: skip
    tile = found.dense(queries, keys, batch=3, heads=2, device=query.device)
    torch.testing.assert_close(tile, torch.tensor(wanted))
    part = found.tile((1, 3), (1, 2), (keys - 1, keys), (0, keys), query.device)
    torch.testing.assert_close(part, tile[1:, 1:, -1:])
    torch.testing.assert_close(found.score(*map(torch.tensor, (2, 1, keys - 1, 0))), tile[2, 1, -1, 0])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_t5(bidirectional):
    """The formula of the paper's appendix, one offset at a time."""

    def bucket(offset: int) -> int:
        count, base = 32, 0
        if bidirectional:
            count //= 2
            base, offset = (count if offset > 0 else 0), abs(offset)
        else:
            offset = max(-offset, 0)
        if offset < count // 2:
            return base + offset
        far = count // 2 + int(math.log(offset / (count // 2)) / math.log(128 / (count // 2)) * (count - count // 2))
        return base + min(far, count - 1)

    table = torch.arange(32.0)[None]
    found = dense(RelativeBias(table, 128, None, bidirectional), 400, 400, 1)[0]
    wanted = [[bucket(key - query) for key in range(400)] for query in (0, 57, 200, 399)]
    assert found[[0, 57, 200, 399]].tolist() == wanted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RelativeBias(torch.zeros(2, 6), 3), "shape"),
        (lambda: RelativeBias(torch.zeros(2, 9), 1, (4, 4)), "2 axes"),
        (lambda: RelativeBias(torch.zeros(2, 8), 3, None, True).validate(1, 3, 4, 4), "3 query heads"),
        (lambda: RelativeBias(torch.zeros(2, 8), 1, None, True), "max_distance"),
        (lambda: Alibi(torch.zeros(3)).validate(1, 2, 4, 4), "2 query heads"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(("axes", "grid"), [(1, (11,)), (2, (3, 4)), (3, (2, 3, 2))])
def test_rotary_scores_depend_on_offsets_only(layout, axes, grid):
    places = grid_positions(*grid)
    query, key = (torch.randn(1, 2, len(places), 24, dtype=torch.float64) for _ in range(2))

    def scores(shift):
        moved = places + torch.tensor(shift)
        moved = moved[:, 0] if axes == 1 else moved
        options = {"axes": axes, "layout": layout, "rotary_dim": 12}
        return rotary(query, moved, **options) @ rotary(key, moved, **options).mT

    torch.testing.assert_close(scores([0] * axes), scores([5, 17, 3][:axes]))
    assert (scores([0] * axes) - query @ key.mT).abs().max() > 0.1


@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_rotary_is_the_rotation_of_pairs(layout):
    x = torch.randn(1, 1, 1, 6, dtype=torch.float64)
    found = rotary(x, torch.tensor([3]), layout=layout)[0, 0, 0]
    for pair in range(3):
        first, second = (pair, pair + 3) if layout == "half" else (2 * pair, 2 * pair + 1)
        turned = complex(x[0, 0, 0, first], x[0, 0, 0, second]) * complex(
            math.cos(3 * 10000 ** (-pair / 3)), math.sin(3 * 10000 ** (-pair / 3))
        )
        assert found[first].item() == pytest.approx(turned.real)
        assert found[second].item() == pytest.approx(turned.imag)


def test_partial_rotary_leaves_the_rest_alone():
    x = torch.randn(2, 1, 5, 8)
    assert torch.equal(rotary(x, torch.arange(5), rotary_dim=4)[..., 4:], x[..., 4:])


def test_rotary_takes_positions_per_sample():
    x = torch.randn(2, 1, 5, 8)
    places = torch.stack([torch.arange(5), torch.arange(5) + 7])
    both = rotary(x, places)
    torch.testing.assert_close(both[1:], rotary(x[1:], places[1]))


def test_rotary_of_half_types_keeps_far_positions_apart():
    x = torch.randn(1, 1, 2, 8).bfloat16()
    found = rotary(x, torch.tensor([100_000, 100_001]))
    exact = rotary(x.double(), torch.tensor([100_000, 100_001]))
    assert (found.double() - exact).abs().max() < 0.05


def test_lrpe_scores_depend_on_offsets_only_and_are_cosines_of_them():
    query, key = (torch.randn(2, 3, 7, 4, dtype=torch.float64) for _ in range(2))
    angles, places = torch.randn(3, 4, dtype=torch.float64), torch.arange(7)
    found = lrpe(query, places, angles) @ lrpe(key, places, angles).mT
    moved = torch.stack([places + 5, places + 1000])
    torch.testing.assert_close(lrpe(query, moved, angles) @ lrpe(key, moved, angles).mT, found)
    turns = ((places[:, None] - places)[..., None] * angles[:, None, None]).cos()
    torch.testing.assert_close(found, torch.einsum("bhsd,bhtd,hstd->bhst", query, key, turns))


def test_lrpe_with_decay_is_a_linear_attention_that_trains_its_angles():
    query, key, value = (torch.randn(2, 4, 70, 3, dtype=torch.float64) for _ in range(3))
    angles, places = lrpe_angles(4, 3).double().requires_grad_(), torch.arange(70)
    decay = layer_decay(4, 1, 3).double() / 8
    found = linear_attention(lrpe(query, places, angles), lrpe(key, places, angles), value, log_decay=decay)
    offsets = places[:, None] - places
    turns = (offsets[..., None] * angles[:, None, None]).cos()
    weights = torch.einsum("bhsd,bhtd,hstd->bhst", query, key, turns) * (offsets * decay[:, None, None]).exp()
    dense = weights.tril() @ value
    torch.testing.assert_close(found, dense)
    grads = [torch.autograd.grad(out.sin().sum(), angles)[0] for out in (found, dense)]
    torch.testing.assert_close(*grads)


def test_lrpe_starts_from_one_row_of_wavelengths_over_all_heads_and_decays_less_in_later_layers():
    assert lrpe_angles(2, 3).flatten().tolist() == pytest.approx([10000 ** (-i / 3) for i in range(6)])
    assert layer_decay(4).tolist() == [-2, -4, -6, -8]
    assert layer_decay(4, 3, 4).tolist() == [-0.5, -1, -1.5, -2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lrpe(torch.zeros(1, 2, 5, 4), torch.arange(5), torch.zeros(1, 4)), r"angles of shape \(1, 4\)"),
        (lambda: lrpe(torch.zeros(1, 2, 5, 4), torch.arange(4), torch.zeros(2, 4)), r"positions of shape \(4,\)"),
        (lambda: layer_decay(4, 3, 3), "layer 3 of 3"),
        (lambda: layer_decay(0), "heads 0"),
    ],
)
def test_bad_lrpe_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_sinusoidal_is_the_papers_table():
    found = sinusoidal(torch.tensor([0, 2]), 4)
    wanted = [[0, 1, 0, 1], [math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)]]
    torch.testing.assert_close(found, torch.tensor(wanted))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary_dim": 3}, "rotary_dim 3"),
        ({"axes": 2, "rotary_dim": 6}, "multiple of 4"),
        ({"layout": "halves"}, "did you mean 'half'"),
        ({"axes": 4}, "axes 4"),
        ({"axes": 2}, "positions of shape"),
    ],
)
def test_bad_rotary_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rotary(torch.zeros(1, 1, 5, 8), torch.arange(5), **options)


def test_cache_returns_what_was_appended():
    key, value = torch.randn(2, 1, 40, 4), torch.randn(2, 1, 40, 3)
    cache = KeyValueCache.empty(2, 1, 4, value_dim=3)
    for start, stop in ((0, 1), (1, 7), (7, 40)):
        cache = cache.append(key[:, :, start:stop], value[:, :, start:stop])
    assert torch.equal(cache.key, key)
    assert torch.equal(cache.value, value)


def test_a_cache_may_branch():
    start = KeyValueCache.empty(1, 1, 2).append(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    left = start.append(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    right = start.append(torch.full((1, 1, 1, 2), 2.0), torch.full((1, 1, 1, 2), 2.0))
    assert left.key[0, 0, 3].tolist() == [1, 1]
    assert right.key[0, 0, 3].tolist() == [2, 2]
    assert start.length == 3


def test_gradients_flow_through_a_cache():
    pieces = [torch.randn(1, 1, 2, 2, requires_grad=True) for _ in range(3)]
    cache = KeyValueCache.empty(1, 1, 2)
    for piece in pieces:
        cache = cache.append(piece, piece)
    grads = torch.autograd.grad(cache.key.sum() + 2 * cache.value.sum(), pieces)
    assert all((grad == 3).all() for grad in grads)
