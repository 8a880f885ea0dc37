from __future__ import annotations

import math
import warnings
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.ops import _neighborhood_tiles as tiles
from regard.ops import neighborhood
from regard.ops.neighborhood import attends, neighborhood_attention
from regard.testing.checks.memory import peak_bytes

Options = dict[str, tuple]


def dense_mask(grid: tuple[int, ...], options: Options) -> Tensor:
    """(queries, keys) of the flattened grid, from the definition along each axis."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis, length in enumerate(grid):
        index = torch.arange(length)
        seen = attends(index[:, None], index, length, *(values[axis] for values in options.values()))
        mask = (mask[:, None, :, None] & seen[None, :, None, :]).flatten(2).flatten(0, 1)
    return mask


def dense_bias(bias: Tensor, grid: tuple[int, ...], options: Options) -> Tensor:
    """(heads, queries, keys): the relative bias at every pair, anything where the pair's offset is not in it."""
    places = torch.cartesian_prod(*(torch.arange(length) for length in grid)).view(-1, len(grid))
    offset = (places[None] - places[:, None]) // torch.tensor(options["dilation"])
    sizes = torch.tensor(options["kernel_size"])
    index = torch.minimum((offset + sizes - 1).clamp(min=0), 2 * sizes - 2)
    return bias[(slice(None), *index.unbind(-1))]


def dense(query: Tensor, key: Tensor, value: Tensor, options: Options, bias: Tensor | None = None) -> Tensor:
    grid = tuple(query.shape[2:-1])
    scores = query.flatten(2, -2) @ key.flatten(2, -2).mT * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + dense_bias(bias, grid, options)
    weights = scores.masked_fill(~dense_mask(grid, options), -math.inf).softmax(-1)
    return (weights @ value.flatten(2, -2)).view(*query.shape[:-1], value.shape[-1])


def every(axes: int, kernel_size: int, dilation: int = 1, stride: int = 1, is_causal: bool = False) -> Options:
    values = {"kernel_size": kernel_size, "dilation": dilation, "stride": stride, "is_causal": is_causal}
    return {name: (value,) * axes for name, value in values.items()}


def inputs(
    *grid: int,
    batch: int = 2,
    heads: int = 2,
    head_dim: int = 4,
    value_dim: int = 3,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    return [
        torch.randn(batch, heads, *grid, width, dtype=dtype, requires_grad=True)
        for width in (head_dim, head_dim, value_dim)
    ]


@st.composite
def problems(draw) -> tuple[tuple[int, ...], Options]:
    """A grid of 1 to 3 axes and options for it; mostly odd sizes, and dilation groups of unequal length."""
    axes = draw(st.integers(1, 3))
    spare = {1: 40, 2: 9, 3: 3}[axes]
    grid, drawn = [], []
    for _ in range(axes):
        kernel_size = draw(st.sampled_from([1, 3, 5, 7] if axes < 3 else [1, 3]))
        dilation = draw(st.integers(1, 3 if axes < 3 else 2))
        grid.append(kernel_size * dilation + draw(st.integers(0, spare)))
        drawn.append((kernel_size, dilation, draw(st.integers(1, kernel_size)), draw(st.booleans())))
    names = ("kernel_size", "dilation", "stride", "is_causal")
    return tuple(grid), dict(zip(names, zip(*drawn, strict=True), strict=True))


ONE_AXIS = [((length,), every(1, *options)) for length, options in product((23, 40, 64), product((3, 7), (1, 2, 3)))]
STRIDED = [((37,), every(1, 7, dilation, stride)) for dilation, stride in product((1, 2), range(2, 8))]
CAUSAL = [((37,), every(1, 7, dilation, stride, True)) for dilation, stride in product((1, 3), (1, 2, 3, 7))]
TWO_AXES = [
    ((length, 16), every(2, kernel_size, dilation, stride, is_causal))
    for length, kernel_size, dilation, stride, is_causal in product((14, 15), (3, 7), (1, 2), (1, 2, 3), (False, True))
]
THREE_AXES = [
    ((6, 6, 7), every(3, 3, dilation, stride, is_causal))
    for dilation, stride, is_causal in product((1, 2), (1, 2, 3), (False, True))
]
MIXED = [
    ((19, 12), {"kernel_size": (5, 3), "dilation": (3, 1), "stride": (4, 1), "is_causal": (False, True)}),
    ((12, 29), {"kernel_size": (11, 5), "dilation": (1, 5), "stride": (2, 3), "is_causal": (True, False)}),
    (
        (6, 9, 11),
        {"kernel_size": (5, 3, 3), "dilation": (1, 2, 3), "stride": (3, 1, 2), "is_causal": (True, False, False)},
    ),
]


@pytest.mark.parametrize(("grid", "options"), ONE_AXIS + STRIDED + CAUSAL + TWO_AXES + THREE_AXES + MIXED)
def test_agrees_with_natten(grid: tuple[int, ...], options: Options) -> None:
    natten = pytest.importorskip("natten")
    theirs = (natten.na1d, natten.na2d, natten.na3d)[len(grid) - 1]
    query, key, value = (torch.randn(1, 2, *grid, 8) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs(*(x.movedim(1, -2).contiguous() for x in (query, key, value)), **options).movedim(-2, 1)
    torch.testing.assert_close(neighborhood_attention(query, key, value, **options), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(problems(), st.booleans(), st.integers(0, 2**31))
def test_output_and_gradients_agree_with_the_dense_definition(
    problem: tuple[tuple[int, ...], Options], with_bias: bool, seed: int
) -> None:
    grid, options = problem
    torch.manual_seed(seed)
    tensors = inputs(*grid)
    bias = None
    if with_bias:
        bias = torch.randn(
            2, *(2 * size - 1 for size in options["kernel_size"]), dtype=torch.float64, requires_grad=True
        )
        tensors.append(bias)
    out = neighborhood_attention(*tensors[:3], bias=bias, **options)
    expected = dense(*tensors[:3], options, bias)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, tensors, direction), torch.autograd.grad(expected, tensors, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(problems())
def test_float32_is_within_its_rounding(problem: tuple[tuple[int, ...], Options]) -> None:
    grid, options = problem
    tensors = inputs(*grid)
    exact = neighborhood_attention(*tensors, **options)
    single = [x.detach().float().requires_grad_() for x in tensors]
    out = neighborhood_attention(*single, **options)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    for rounded, gradient in zip(
        torch.autograd.grad(out.sum(), single), torch.autograd.grad(exact.sum(), tensors), strict=True
    ):
        torch.testing.assert_close(rounded.double(), gradient, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("tile", [(1, 1), (2, 4), (4, 2), (8, 8), (32, 32)])
def test_every_tile_and_chunk_size_gives_the_same(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]) -> None:
    options = every(2, 5, dilation=2)
    tensors = inputs(15, 18)
    expected = dense(*tensors, options)
    gradients = torch.autograd.grad(expected.square().sum(), tensors)
    monkeypatch.setattr(neighborhood, "tile_shape", lambda *_: tile)
    for scores in (1, 500, 3000):
        monkeypatch.setattr(tiles, "_SCORES_PER_THREAD", scores)
        out = neighborhood_attention(*tensors, **options)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), tensors), gradients, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(1, 3))
def test_key_gradients_are_added_through_views_without_overlap(
    problem: tuple[tuple[int, ...], Options], multiple: int
) -> None:
    grid, options = problem
    positions = torch.arange(math.prod(grid)).view(1, 1, *grid, 1)
    axes = tuple(map(tiles.Axis, grid, *options.values()))
    tile = tuple(multiple * stride for stride in options["stride"])
    for region in tiles.regions(axes, tile, torch.float64, positions.device):
        boxes = region.key_boxes(positions)
        for view, part in region.box_pieces(positions):
            assert view.unique().numel() == view.numel()
            assert torch.equal(boxes[part], view)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_every_query_sees_kernel_size_keys_on_each_axis(problem: tuple[tuple[int, ...], Options]) -> None:
    grid, options = problem
    options["is_causal"] = (False,) * len(grid)
    assert (dense_mask(grid, options).sum(-1) == math.prod(options["kernel_size"])).all()


@settings(max_examples=40, deadline=None)
@given(problems())
def test_every_offset_seen_is_in_the_bias_table(problem: tuple[tuple[int, ...], Options]) -> None:
    grid, options = problem
    for axis, length in enumerate(grid):
        index = torch.arange(length)
        own = [values[axis] for values in options.values()]
        offset = (index - index[:, None])[attends(index[:, None], index, length, *own)]
        assert (offset % options["dilation"][axis] == 0).all()
        assert (offset.abs() // options["dilation"][axis] < options["kernel_size"][axis]).all()


@pytest.mark.parametrize(("stride", "leader"), [(1, 5), (2, 5), (3, 4), (4, 6), (5, 7)])
def test_strided_window_is_that_of_the_leader_right_of_center(stride: int, leader: int) -> None:
    keys = torch.arange(30)
    seen = keys[attends(torch.tensor(5), keys, 30, 5, 1, stride, False)]
    assert seen.tolist() == list(range(leader - 2, leader + 3))


@pytest.mark.parametrize(("stride", "leader"), [(1, 10), (2, 11), (3, 11), (5, 14)])
def test_strided_causal_window_is_that_of_the_last_of_the_group(stride: int, leader: int) -> None:
    keys = torch.arange(30)
    seen = keys[attends(torch.tensor(10), keys, 30, 5, 1, stride, True)]
    assert seen.tolist() == list(range(leader - 4, 11))


def test_full_kernel_equals_dense_attention() -> None:
    query, key, value = inputs(7, 9)
    out = neighborhood_attention(query, key, value, kernel_size=(7, 9))
    expected = scaled_dot_product_attention(*(x.flatten(2, 3) for x in (query, key, value))).view_as(out)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_full_causal_kernel_equals_causal_attention() -> None:
    query, key, value = inputs(31)
    out = neighborhood_attention(query, key, value, kernel_size=31, is_causal=True)
    torch.testing.assert_close(out, scaled_dot_product_attention(query, key, value, is_causal=True))


def test_kernel_of_one_gives_the_values() -> None:
    query, key, value = inputs(5, 6, 7)
    torch.testing.assert_close(neighborhood_attention(query, key, value, kernel_size=1), value)


def test_stride_of_the_kernel_is_attention_in_blocks() -> None:
    query, key, value = inputs(21)
    out = neighborhood_attention(query, key, value, kernel_size=7, stride=7)
    blocks = scaled_dot_product_attention(*(x.unflatten(2, (3, 7)).movedim(2, 1) for x in (query, key, value)))
    torch.testing.assert_close(out, blocks.movedim(1, 2).flatten(2, 3))


def test_dilation_is_attention_within_each_group() -> None:
    query, key, value = inputs(22)
    out = neighborhood_attention(query, key, value, kernel_size=5, dilation=3)
    for group in range(3):
        alone = neighborhood_attention(*(x[:, :, group::3] for x in (query, key, value)), kernel_size=5)
        torch.testing.assert_close(out[:, :, group::3], alone)


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_causal_axis_has_no_gradient_from_later_positions(stride: int) -> None:
    query, key, value = inputs(17, 6)
    options = {"kernel_size": (5, 3), "stride": (stride, 1), "is_causal": (True, False), "dilation": (2, 1)}
    out = neighborhood_attention(query, key, value, **options)
    for gradient in torch.autograd.grad(out[:, :, :9].sum(), (query, key, value)):
        assert (gradient[:, :, 9:] == 0).all()
        assert (gradient[:, :, :9] != 0).any()


def test_gradcheck() -> None:
    options = {"kernel_size": (3, 5), "dilation": (2, 1), "stride": (1, 2), "is_causal": (False, True)}
    bias = torch.randn(2, 5, 9, dtype=torch.float64, requires_grad=True)
    tensors = inputs(7, 6, batch=1, head_dim=2, value_dim=3)
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: neighborhood_attention(q, k, v, bias=b, **options), (*tensors, bias)
    )


def test_second_derivative_is_refused() -> None:
    tensors = inputs(9)
    out = neighborhood_attention(*tensors, kernel_size=3)
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


SMALL = [
    ((11,), every(1, 5)),
    ((9, 8), {"kernel_size": (3, 5), "dilation": (2, 1), "stride": (3, 1), "is_causal": (True, False)}),
    ((4, 5, 6), every(3, 3, stride=2)),
]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("grid", "options"), SMALL)
def test_operator_is_well_formed(grid: tuple[int, ...], options: Options, with_bias: bool) -> None:
    shape = [2 * size - 1 for size in options["kernel_size"]]
    bias = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) if with_bias else None
    lists = [list(values) for values in options.values()]
    torch.library.opcheck(neighborhood._forward, (*inputs(*grid), bias, *lists, 0.5))
    detached = [x.detach() for x in inputs(*grid)]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    given_bias = None if bias is None else bias.detach()
    torch.library.opcheck(neighborhood._backward, (detached[2], *detached, given_bias, *lists, 0.5), test_utils=checks)


@pytest.mark.parametrize(("grid", "options"), SMALL)
def test_compiled_equals_eager(grid: tuple[int, ...], options: Options) -> None:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return neighborhood_attention(query, key, value, **options)

    torch._dynamo.reset()
    tensors = inputs(*grid)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors)
    eager = run(*tensors)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
    gradients = (torch.autograd.grad(out.square().sum(), tensors) for out in (compiled, eager))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_non_contiguous_inputs_give_the_same_and_are_not_written_to() -> None:
    packed = torch.randn(2, 9, 10, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    kept = packed.detach().clone()
    out = neighborhood_attention(*packed.movedim(-2, 1).unbind(-2), kernel_size=5)
    contiguous = [x.contiguous() for x in packed.movedim(-2, 1).unbind(-2)]
    expected = neighborhood_attention(*contiguous, kernel_size=5)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    ours, theirs = (torch.autograd.grad(x.sum(), packed, retain_graph=True)[0] for x in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert torch.equal(packed.detach(), kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    options = every(2, 5, dilation=2)
    half = [x.detach().to(dtype).requires_grad_() for x in inputs(13, 12)]
    single = [x.detach().float().requires_grad_() for x in half]
    bias = torch.randn(2, 9, 9)
    out = neighborhood_attention(*half, bias=bias, **options)
    expected = neighborhood_attention(*single, bias=bias, **options)
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    ours = torch.autograd.grad(out, half, torch.ones_like(out))
    theirs = torch.autograd.grad(expected, single, torch.ones_like(expected))
    for rounded, gradient in zip(ours, theirs, strict=True):
        assert torch.equal(rounded, gradient.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_huge_logits_stay_finite(dtype: torch.dtype) -> None:
    query, key, value = (x.detach().to(dtype) for x in inputs(9, 9))
    tensors = [x.requires_grad_() for x in (query.sign() * 50, key.sign() * 50, value)]
    out = neighborhood_attention(*tensors, kernel_size=3, scale=1.0)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), tensors))


def test_grid_of_one_position() -> None:
    query, key, value = inputs(1, 1)
    torch.testing.assert_close(neighborhood_attention(query, key, value, kernel_size=1), value)


def test_empty_batch() -> None:
    tensors = inputs(6, 7, batch=0)
    out = neighborhood_attention(*tensors, kernel_size=3)
    assert out.shape == (0, 2, 6, 7, 3)
    assert torch.autograd.grad(out.sum(), tensors)[1].shape == (0, 2, 6, 7, 4)


def test_inference_before_training_leaves_training_intact() -> None:
    tiles.regions.cache_clear()
    tensors = inputs(12, 13)
    with torch.inference_mode():
        neighborhood_attention(*tensors, kernel_size=5)
    neighborhood_attention(*tensors, kernel_size=5).sum().backward()
    assert all(x.grad is not None for x in tensors)


def test_two_calls_are_bitwise_equal() -> None:
    tensors = inputs(40, 40, dtype=torch.float32)
    bias = torch.randn(2, 13, 13, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        out = neighborhood_attention(*tensors, kernel_size=7, bias=bias)
        return out, *torch.autograd.grad(out.square().sum(), (*tensors, bias))

    assert all(torch.equal(first, second) for first, second in zip(run(), run(), strict=True))


def peak(length: int, kernel_size: int) -> int:
    """The most memory held at once by a forward and backward, beside its inputs."""
    tensors = inputs(length, batch=1, head_dim=16, value_dim=16, dtype=torch.float32)

    def run() -> None:
        torch.autograd.grad(neighborhood_attention(*tensors, kernel_size=kernel_size).sum(), tensors)

    run()
    return peak_bytes(run)


def test_memory_is_linear_in_the_grid_and_below_the_scores() -> None:
    short, long = peak(8192, 255), peak(32768, 255)
    scores = 2 * 32768 * 255 * 4
    assert long < 4.2 * short
    assert long < scores / 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kernel_size": 8}, "kernel_size 8 is not odd"),
        ({"kernel_size": -1}, "kernel_size -1 is not odd and positive"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size \(3, 3, 3\) does not fit a grid of 2 axes"),
        ({"kernel_size": 3.0}, "kernel_size 3.0 does not fit"),
        ({"kernel_size": 11}, "kernel_size 11 times dilation 1 exceeds the axis length 9"),
        ({"dilation": 0}, "dilation 0 is below 1"),
        ({"dilation": 4}, "kernel_size 3 times dilation 4 exceeds the axis length 9"),
        ({"stride": 0}, "stride 0 is not between 1 and kernel_size 3"),
        ({"stride": (4, 1)}, "stride 4 is not between 1 and kernel_size 3"),
        ({"is_causal": 1}, "is_causal 1 does not fit"),
        ({"bias": torch.zeros(2, 3, 3)}, r"bias of shape \(2, 3, 3\).*pass a floating tensor of shape \(2, 5, 5\)"),
        ({"bias": torch.zeros(2, 5, 5, dtype=torch.long)}, "torch.int64.*pass a floating tensor"),
        ({"query": torch.zeros(2, 9, 4)}, r"query of shape \(2, 9, 4\)"),
        ({"query": torch.zeros(1, 2, 3, 3, 3, 3, 4)}, "grid of 1, 2 or 3 axes"),
        ({"key": torch.zeros(2, 2, 9, 8, 4)}, r"key is not shaped as query.*\(2, 2, 9, 8, 4\)"),
        ({"value": torch.zeros(2, 2, 10, 9, 4)}, r"value is not on query's grid.*\(2, 2, 10, 9, 4\)"),
        ({"value": torch.zeros(2, 2, 9, 10, 4, dtype=torch.float64)}, "use one floating dtype and one device"),
        ({"value": torch.zeros(2, 2, 9, 10, 4, device="meta")}, "use one floating dtype and one device"),
        (
            {name: torch.zeros(2, 2, 9, 10, 4, dtype=torch.long) for name in ("query", "key", "value")},
            "use one floating dtype",
        ),
    ],
)
def test_a_bad_argument_is_named_with_its_rule(changed: dict, message: str) -> None:
    good = {name: torch.zeros(2, 2, 9, 10, 4) for name in ("query", "key", "value")} | {"kernel_size": 3}
    neighborhood_attention(**good)
    with pytest.raises(ValueError, match=f"neighborhood_attention: .*{message}"):
        neighborhood_attention(**(good | changed))
