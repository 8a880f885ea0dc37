"""Neighborhood attention: on a grid, each query attends the keys nearest to it. Forward and backward, any device.

Along an axis, in steps of the dilation, a query sees the `kernel_size` keys around it; at a border the window shifts
inward, so that it sees no fewer. Sources: Neighborhood Attention Transformer (Hassani et al. 2022, arXiv 2204.07143),
Dilated Neighborhood Attention Transformer (Hassani and Shi 2022, 2209.15001), Faster Neighborhood Attention (Hassani
et al. 2024, 2403.04690) for causal axes, Generalized Neighborhood Attention (Hassani et al. 2025, 2504.16922) for
strides. Borders are those of the authors' package, NATTEN 0.21.

The grid is cut into tiles of queries (see `_neighborhood_tiles`). A tile and its box of keys are small dense matrices,
so all work is batched matrix products: per axis ``(T + k − stride) / k`` times the necessary ones, for tiles of T
queries and windows of k keys. The backward computes the weights anew. Beside inputs, outputs and gradients (and float32
copies of half types) memory holds the scores of one chunk of tiles.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.ops._neighborhood_tiles import Axis, Region, regions, tile_shape, window
from regard.ops.checks import require
from regard.ops.precision import exact, statistics_dtype

_OWNER = "neighborhood_attention"


def neighborhood_attention(
    query: Float[Tensor, "batch heads *grid head_dim"],
    key: Float[Tensor, "batch heads *grid head_dim"],
    value: Float[Tensor, "batch heads *grid value_dim"],
    *,
    kernel_size: int | tuple[int, ...],
    dilation: int | tuple[int, ...] = 1,
    stride: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    bias: Float[Tensor, "heads *offsets"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads *grid value_dim"]:
    """``out_i = Σ_j w_ij v_j``, ``w_i = softmax_j(scale · q_i·k_j + bias_(j−i))`` over the neighborhood of i.

    Args:
        query, key, value: floating tensors of one dtype and device on a grid of 1 to 3 axes.
        kernel_size: keys a query sees along each axis; odd, and times the dilation no more than the axis is long.
        dilation: distance between these keys. Positions equal modulo the dilation see each other only.
        stride: how many queries along each axis, at most `kernel_size`, share the window of their leader: the one right
            of their center or, on a causal axis, the last.
        is_causal: axes on which a query sees, of the last `kernel_size` keys up to its leader, those not after itself.
        bias: relative position bias of shape (heads, 2 · kernel_size − 1 per axis). A key is at
            ``(key − query) / dilation + kernel_size − 1`` on each axis, which no option takes out of the table.
        scale: factor on ``q·k``; ``head_dim ** −0.5`` by default.

    A tuple gives one value per axis. `attends` is the exact rule along one. Half types are computed in float32; the
    output has the dtype of the inputs.

    Raises ``ValueError`` for shapes, dtypes and options that do not fit, ``RuntimeError`` for a second derivative.
    """
    _check_tensors(query, key, value)
    lengths = query.shape[2:-1]
    kernel_sizes = _per_axis("kernel_size", kernel_size, len(lengths), int)
    dilations = _per_axis("dilation", dilation, len(lengths), int)
    strides = _per_axis("stride", stride, len(lengths), int)
    for axis in zip(lengths, kernel_sizes, dilations, strides, strict=True):
        _check_axis(*axis)
    if bias is not None:
        _check_bias(bias, query, kernel_sizes)
    causal = _per_axis("is_causal", is_causal, len(lengths), bool)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _forward(query, key, value, bias, kernel_sizes, dilations, strides, causal, scale)


def attends(
    query_index: Int[Tensor, "..."],
    key_index: Int[Tensor, "..."],
    length: int,
    kernel_size: int,
    dilation: int,
    stride: int,
    is_causal: bool,
) -> Bool[Tensor, "..."]:
    """Whether a query sees a key, by their indices along an axis of `length`; the index tensors broadcast.

    On a grid a query sees a key that it sees along every axis.
    """
    group = query_index % dilation
    group_length = (length - 1 - group) // dilation + 1
    first, last = window(query_index // dilation, group_length, kernel_size, stride, is_causal)
    position = key_index // dilation
    return (group == key_index % dilation) & (first <= position) & (position <= last)


@torch.library.custom_op("regard::neighborhood_attention", mutates_args=())
@exact
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    stride: list[int],
    is_causal: list[bool],
    scale: float,
) -> Tensor:
    out, dtype = _new(query, value.shape[-1]), statistics_dtype(query.dtype)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    for region in _regions(query, value, kernel_size, dilation, stride, is_causal):
        q_tiles, k_boxes, v_boxes = region.query_tiles(query), region.key_boxes(key), region.key_boxes(value)
        out_tiles, logits = region.query_tiles(out), _added_logits(region, bias, kernel_size)
        queries, keys = region.mask.shape
        for chunk in region.chunks(*query.shape[:2]):
            q, k, v = _rows(q_tiles[chunk], queries), _rows(k_boxes[chunk], keys), _rows(v_boxes[chunk], keys)
            out_chunk = out_tiles[chunk]
            weights = _weights(q, k, scale, logits, out_chunk.shape[:2])
            out_chunk.copy_(torch.bmm(weights, v).view(out_chunk.shape))
    return out


@_forward.register_fake
def _(query, key, value, bias, kernel_size, dilation, stride, is_causal, scale):
    return _new(query, value.shape[-1])


@torch.library.custom_op("regard::neighborhood_attention_backward", mutates_args=())
@exact
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    stride: list[int],
    is_causal: list[bool],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given, dtype = query.dtype, statistics_dtype(query.dtype)
    grad, query, key, value = grad.to(dtype), query.to(dtype), key.to(dtype), value.to(dtype)
    query_grad, key_grad, value_grad = _new(query), _new(key).zero_(), _new(value).zero_()
    bias_grad = query.new_zeros(0 if bias is None else bias[0].numel(), query.shape[1])
    for region in _regions(query, value, kernel_size, dilation, stride, is_causal):
        q_tiles, k_boxes, v_boxes = region.query_tiles(query), region.key_boxes(key), region.key_boxes(value)
        grad_tiles, query_grad_tiles = region.query_tiles(grad), region.query_tiles(query_grad)
        key_grad_pieces, value_grad_pieces = region.box_pieces(key_grad), region.box_pieces(value_grad)
        logits = _added_logits(region, bias, kernel_size)
        queries, keys = region.mask.shape
        for chunk in region.chunks(*query.shape[:2]):
            q, k, v = _rows(q_tiles[chunk], queries), _rows(k_boxes[chunk], keys), _rows(v_boxes[chunk], keys)
            g = _rows(grad_tiles[chunk], queries)
            weights = _weights(q, k, scale, logits, q_tiles[chunk].shape[:2])
            scores_grad = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.mT), weights, -1, dtype)
            _add(value_grad_pieces, chunk, torch.bmm(weights.mT, g).view(v_boxes[chunk].shape))
            _add(key_grad_pieces, chunk, torch.bmm(scores_grad.mT, q).view(k_boxes[chunk].shape))
            query_grad_tiles[chunk].copy_(torch.bmm(scores_grad, k).view(q_tiles[chunk].shape))
            if bias is not None:
                summed = scores_grad.unflatten(0, (*q_tiles[chunk].shape[:2], -1)).sum((0, 2))
                bias_grad.index_add_(0, region.bias_index(kernel_size).flatten(), summed.flatten(1).T)
    scaled = query_grad.mul_(scale).to(given), key_grad.mul_(scale).to(given)
    return *scaled, value_grad.to(given), bias_grad.T.contiguous()


@_backward.register_fake
def _(grad, query, key, value, bias, kernel_size, dilation, stride, is_causal, scale):
    bias_grad = query.new_empty(
        query.shape[1], 0 if bias is None else bias[0].numel(), dtype=statistics_dtype(query.dtype)
    )
    return _new(query), _new(key), _new(value), bias_grad


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    query, key, value, bias, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, bias)


def _differentiate(ctx, grad: Tensor) -> tuple:
    bias = ctx.saved_tensors[3]
    *grads, bias_grad = _backward(grad, *ctx.saved_tensors, *ctx.options)
    bias_grad = None if bias is None else bias_grad.view(bias.shape).to(bias.dtype)
    return *grads, bias_grad, *(None for _ in ctx.options)


def _refuse(ctx, *grads: Tensor) -> None:
    raise RuntimeError(f"{_OWNER}: a second derivative is not implemented; write the attention densely for it")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def _regions(
    query: Tensor, value: Tensor, kernel_size: list[int], dilation: list[int], stride: list[int], is_causal: list[bool]
) -> tuple[Region, ...]:
    axes = tuple(map(Axis, query.shape[2:-1], kernel_size, dilation, stride, is_causal))
    tile = tile_shape(axes, query.shape[0] * query.shape[1], query.shape[-1] + value.shape[-1])
    return regions(axes, tile, query.dtype, query.device)


def _added_logits(region: Region, bias: Tensor | None, kernel_size: list[int]) -> Tensor:
    """What all tiles of a region add to their scores: (queries, keys), or (heads, 1, queries, keys) with a bias."""
    if bias is None:
        return region.mask
    return region.mask + bias.to(region.mask.dtype).flatten(1)[:, region.bias_index(kernel_size)].unsqueeze(1)


def _weights(q: Tensor, k: Tensor, scale: float, logits: Tensor, samples: torch.Size) -> Tensor:
    if logits.ndim > 2:
        logits = logits.expand(*samples, q.shape[0] // samples.numel(), -1, -1).flatten(0, 2)
    return torch.baddbmm(logits, q, k.mT, alpha=scale).softmax(-1)


def _rows(tiles: Tensor, rows: int) -> Tensor:
    """The tiles of a view, each as a matrix with a row per position."""
    return tiles.reshape(-1, rows, tiles.shape[-1])


def _add(pieces: list[tuple[Tensor, tuple]], chunk: tuple[slice, ...], boxes: Tensor) -> None:
    for view, part in pieces:
        view[chunk].add_(boxes[part])


def _new(x: Tensor, features: int | None = None) -> Tensor:
    """Uninitialised and contiguous, like `x` but for the number of features."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] if features is None else features)


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    named = {"query": query, "key": key, "value": value}
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
    kinds = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in named.items())
    rank = "pass (batch, heads, *grid, head_dim) with a grid of 1, 2 or 3 axes"
    require(4 <= query.ndim <= 6, _OWNER, f"query of shape {tuple(query.shape)}", rank)
    require(key.shape == query.shape, _OWNER, f"key is not shaped as query: {shapes}", "give key the shape of query")
    fits = value.shape[:-1] == query.shape[:-1]
    require(fits, _OWNER, f"value is not on query's grid: {shapes}", "only value's last axis may differ from query's")
    same = query.dtype == key.dtype == value.dtype and query.device == key.device == value.device
    require(same and query.is_floating_point(), _OWNER, kinds, "use one floating dtype and one device for all three")


def _per_axis(name: str, given: object, axes: int, kind: type) -> list:
    values = list(given) if isinstance(given, (tuple, list)) else [given] * axes
    fits = len(values) == axes and all(type(value) is kind for value in values)
    way_out = f"pass one {kind.__name__} or a tuple of one per axis"
    require(fits, _OWNER, f"{name} {given!r} does not fit a grid of {axes} axes", way_out)
    return values


def _check_axis(length: int, kernel_size: int, dilation: int, stride: int) -> None:
    odd = kernel_size > 0 and kernel_size % 2 == 1
    require(odd, _OWNER, f"kernel_size {kernel_size} is not odd and positive", "use an odd kernel_size")
    require(dilation >= 1, _OWNER, f"dilation {dilation} is below 1", "use 1 for adjacent keys")
    reach = f"kernel_size {kernel_size} times dilation {dilation} exceeds the axis length {length}"
    require(kernel_size * dilation <= length, _OWNER, reach, "use a smaller kernel_size or dilation, or a larger grid")
    range_ = f"between 1 and kernel_size {kernel_size}"
    require(1 <= stride <= kernel_size, _OWNER, f"stride {stride} is not {range_}", f"use a stride {range_}")


def _check_bias(bias: Tensor, query: Tensor, kernel_size: list[int]) -> None:
    shape = (query.shape[1], *(2 * size - 1 for size in kernel_size))
    fits = bias.shape == shape and bias.is_floating_point() and bias.device == query.device
    found = f"bias of shape {tuple(bias.shape)}, {bias.dtype} on {bias.device}"
    require(fits, _OWNER, found, f"pass a floating tensor of shape {shape} on {query.device}")
