"""Neighborhood attention: on a grid, each query attends the keys nearest to it, forward and backward, on any device.

Along each axis, in steps of the dilation, a query sees the `kernel_size` keys around it; near a border the window shifts
inward, so that it never sees fewer. Sources: Neighborhood Attention Transformer (Hassani et al. 2022, arXiv 2204.07143),
Dilated Neighborhood Attention Transformer (Hassani and Shi 2022, 2209.15001), Faster Neighborhood Attention (Hassani et
al. 2024, 2403.04690: causal axes) and Generalized Neighborhood Attention (Hassani et al. 2025, 2504.16922: strides).
What happens at borders is as in the authors' package, NATTEN 0.21.

The grid is cut into tiles of queries (`_neighborhood_tiles`). A tile and its box of keys are two small dense matrices, so
the work is batched matrix products. With tiles of T and windows of k positions per axis that is ``(T + k − 1) / k`` times
the necessary products per axis; memory beside inputs and outputs is bounded by the chunk of tiles in work.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.ops._neighborhood_tiles import Axis, Region, regions, tile_shape, window
from regard.ops.checks import require

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
    bias: Float[Tensor, heads * offsets] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads *grid value_dim"]:
    """``out_i = Σ_j softmax_j(scale · q_i·k_j + bias[j − i]) v_j`` over the neighborhood of i, on a grid of 1 to 3 axes.

    Args:
        query, key, value: floating tensors of one dtype and device. Half types are computed in float32.
        kernel_size: keys per axis that a query sees; odd, and ``kernel_size · dilation`` at most the length of the axis.
        dilation: distance between those keys; positions equal modulo the dilation see each other only.
        stride: queries per axis, at most `kernel_size`, that share the window of their leader: the one right of their
            centre, or the last one on a causal axis.
        is_causal: axes on which a query sees no key after itself: the last `kernel_size` up to the leader, fewer at the
            beginning.
        bias: relative position bias of shape ``(heads, 2·kernel_size − 1 per axis)``. A key's entry along an axis is
            ``(key − query) / dilation + kernel_size − 1``, which stays inside for every stride and causal axis.
        scale: factor on ``q·k``; ``head_dim ** −0.5`` by default.

    `attends` is the definition per axis. Returns the output in the dtype of the inputs. Raises ``ValueError`` for shapes,
    dtypes and options that do not fit together, ``RuntimeError`` for a second derivative.
    """
    _check_tensors(query, key, value)
    lengths = tuple(query.shape[2:-1])
    kernel_sizes = _per_axis("kernel_size", kernel_size, len(lengths), int)
    dilations = _per_axis("dilation", dilation, len(lengths), int)
    strides = _per_axis("stride", stride, len(lengths), int)
    causal = _per_axis("is_causal", is_causal, len(lengths), bool)
    for axis in zip(lengths, kernel_sizes, dilations, strides, strict=True):
        _check_axis(*axis)
    if bias is not None:
        _check_bias(bias, query, kernel_sizes)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _forward(query, key, value, bias, kernel_sizes, dilations, strides, causal, scale)


def attends(
    query_index: Int[Tensor, ...],
    key_index: Int[Tensor, ...],
    length: int,
    kernel_size: int,
    dilation: int,
    stride: int,
    is_causal: bool,
) -> Bool[Tensor, ...]:
    """Whether the query at one index of an axis sees the key at another; the index tensors broadcast.

    A query sees a key of a grid if it does so along every axis.
    """
    group = query_index % dilation
    group_length = (length - 1 - group) // dilation + 1
    first, last = window(query_index // dilation, group_length, kernel_size, stride, is_causal)
    position = key_index // dilation
    return (group == key_index % dilation) & (first <= position) & (position <= last)


@torch.library.custom_op("regard::neighborhood_attention", mutates_args=())
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
    out, dtype = _new(query, value.shape[-1]), _computing_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    for region in _regions(query, value, kernel_size, dilation, stride, is_causal):
        q_tiles, k_boxes, v_boxes = region.query_tiles(query), region.key_boxes(key), region.key_boxes(value)
        out_tiles = region.query_tiles(out)
        logits = _added_logits(region, bias, kernel_size)
        for chunk in region.chunks(*query.shape[:2]):
            out_chunk = out_tiles[chunk]
            q, k, v = (_matrices(x[chunk], len(kernel_size)) for x in (q_tiles, k_boxes, v_boxes))
            weights = _weights(q, k, scale, logits, out_chunk.shape[:2])
            out_chunk.copy_(torch.bmm(weights, v).view(out_chunk.shape))
    return out


@_forward.register_fake
def _(query, key, value, bias, kernel_size, dilation, stride, is_causal, scale):
    return _new(query, value.shape[-1])


@torch.library.custom_op("regard::neighborhood_attention_backward", mutates_args=())
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
    given, dtype = query.dtype, _computing_dtype(query)
    grad, query, key, value = grad.to(dtype), query.to(dtype), key.to(dtype), value.to(dtype)
    query_grad, key_grad, value_grad = _new(query), _new(key).zero_(), _new(value).zero_()
    bias_grad = None if bias is None else query.new_zeros(bias[0].numel(), query.shape[1])
    for region in _regions(query, value, kernel_size, dilation, stride, is_causal):
        q_tiles, k_boxes, v_boxes = region.query_tiles(query), region.key_boxes(key), region.key_boxes(value)
        grad_tiles, query_grad_tiles = region.query_tiles(grad), region.query_tiles(query_grad)
        key_pieces, value_pieces = region.box_pieces(key_grad), region.box_pieces(value_grad)
        logits = _added_logits(region, bias, kernel_size)
        for chunk in region.chunks(*query.shape[:2]):
            q, k, v, g = (_matrices(x[chunk], len(kernel_size)) for x in (q_tiles, k_boxes, v_boxes, grad_tiles))
            samples = q_tiles[chunk].shape[:2]
            weights = _weights(q, k, scale, logits, samples)
            _add(value_pieces, chunk, torch.bmm(weights.mT, g).view(v_boxes[chunk].shape))
            scores_grad = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.mT), weights, -1, dtype)
            query_grad_tiles[chunk].copy_(torch.bmm(scores_grad, k).view(q_tiles[chunk].shape))
            _add(key_pieces, chunk, torch.bmm(scores_grad.mT, q).view(k_boxes[chunk].shape))
            if bias_grad is not None:
                per_head = scores_grad.unflatten(0, (*samples, -1)).sum((0, 2))
                bias_grad.index_add_(0, region.bias_index(kernel_size).flatten(), per_head.flatten(1).T)
    grads = (query_grad.mul_(scale).to(given), key_grad.mul_(scale).to(given), value_grad.to(given))
    return *grads, query.new_empty(0) if bias_grad is None else bias_grad.T.reshape(bias.shape).to(bias.dtype)


@_backward.register_fake
def _(grad, query, key, value, bias, kernel_size, dilation, stride, is_causal, scale):
    bias_grad = query.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return _new(query), _new(key), _new(value), bias_grad


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.kernel_size, ctx.dilation, ctx.stride, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad: Tensor) -> tuple:
    options = (ctx.kernel_size, ctx.dilation, ctx.stride, ctx.is_causal, ctx.scale)
    *grads, bias_grad = _backward(grad, *ctx.saved_tensors, *options)
    has_bias = ctx.saved_tensors[3] is not None
    return *grads, bias_grad if has_bias else None, None, None, None, None, None


def _refuse(ctx, *grads) -> None:
    raise RuntimeError(f"{_OWNER}: a second derivative is not implemented; use a dense attention for it")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)


def _regions(
    query: Tensor,
    value: Tensor,
    kernel_size: list[int],
    dilation: list[int],
    stride: list[int],
    is_causal: list[bool],
) -> tuple[Region, ...]:
    axes = tuple(map(Axis, query.shape[2:-1], kernel_size, dilation, stride, is_causal))
    tile = tile_shape(axes, query.shape[0] * query.shape[1], query.shape[-1] + value.shape[-1])
    return regions(axes, tile, query.dtype, query.device)


def _added_logits(region: Region, bias: Tensor | None, kernel_size: list[int]) -> Tensor:
    """Mask and relative bias of a region's tiles: (queries, keys), with a bias (heads, 1, queries, keys)."""
    if bias is None:
        return region.mask
    return region.mask + bias.flatten(1)[:, region.bias_index(kernel_size)].unsqueeze(1)


def _weights(q: Tensor, k: Tensor, scale: float, logits: Tensor, samples: torch.Size) -> Tensor:
    if logits.ndim > 2:
        tiles = q.shape[0] // samples.numel()
        logits = logits.expand(*samples, tiles, -1, -1).flatten(0, 2)
    return torch.baddbmm(logits, q, k.mT, alpha=scale).softmax(-1)


def _matrices(tiles: Tensor, axes: int) -> Tensor:
    """(…, extent per axis, features) as a batch of matrices (positions, features)."""
    return tiles.reshape(-1, math.prod(tiles.shape[-1 - axes : -1]), tiles.shape[-1])


def _add(pieces: list[tuple[Tensor, tuple]], chunk: tuple[slice, ...], boxes: Tensor) -> None:
    for view, part in pieces:
        view[chunk].add_(boxes[part])


def _new(x: Tensor, features: int | None = None) -> Tensor:
    """An uninitialised contiguous tensor like `x`."""
    return x.new_empty(*x.shape[:-1], x.shape[-1] if features is None else features)


def _computing_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    require(
        4 <= query.ndim <= 6,
        _OWNER,
        f"query has shape {tuple(query.shape)}",
        "pass (batch, heads, *grid, head_dim) with a grid of 1, 2 or 3 axes",
    )
    require(key.shape == query.shape, _OWNER, f"key and query differ in shape: {shapes}", "pass one grid for both")
    require(
        value.shape[:-1] == query.shape[:-1],
        _OWNER,
        f"value differs from query before its last axis: {shapes}",
        "pass one batch, heads and grid for both",
    )
    require(
        query.is_floating_point() and query.dtype == key.dtype == value.dtype,
        _OWNER,
        f"dtypes {query.dtype}, {key.dtype}, {value.dtype}",
        "pass query, key and value in one floating dtype",
    )
    require(
        query.device == key.device == value.device,
        _OWNER,
        f"devices {query.device}, {key.device}, {value.device}",
        "pass query, key and value on one device",
    )


def _per_axis(name: str, given: object, axes: int, kind: type) -> list:
    values = list(given) if isinstance(given, (tuple, list)) else [given] * axes
    fits = len(values) == axes and all(type(entry) is kind for entry in values)
    require(
        fits,
        _OWNER,
        f"{name} {given!r} on a grid of {axes} axes",
        f"pass one {kind.__name__}, or a tuple of {axes}",
    )
    return values


def _check_axis(length: int, kernel_size: int, dilation: int, stride: int) -> None:
    require(
        kernel_size >= 1 and kernel_size % 2 == 1,
        _OWNER,
        f"kernel_size {kernel_size} is not odd and positive",
        "use an odd kernel_size",
    )
    require(dilation >= 1, _OWNER, f"dilation {dilation} is below 1", "use 1 for adjacent keys")
    require(
        kernel_size * dilation <= length,
        _OWNER,
        f"kernel_size {kernel_size} times dilation {dilation} exceeds the axis of length {length}",
        "use a smaller kernel_size or dilation, or a larger grid",
    )
    require(
        1 <= stride <= kernel_size,
        _OWNER,
        f"stride {stride} is not between 1 and kernel_size {kernel_size}",
        "use a stride in that range",
    )


def _check_bias(bias: Tensor, query: Tensor, kernel_size: list[int]) -> None:
    shape = (query.shape[1], *(2 * size - 1 for size in kernel_size))
    require(
        bias.shape == shape and bias.is_floating_point() and bias.device == query.device,
        _OWNER,
        f"bias of shape {tuple(bias.shape)}, {bias.dtype}, on {bias.device}",
        f"pass a floating tensor of shape {shape} on {query.device}",
    )
