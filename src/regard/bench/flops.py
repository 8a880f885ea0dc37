"""Floating-point operations of matrix products, counted from the events of torch's profiler.

What an operator of our own does inside is among the events. A fused attention counts its two products and its backward
five, half of them where it is causal; a convolution counts as the product it is, and its backward as two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import prod
from typing import Any

Formula = Callable[[list[Any], list[Any]], float]
"""From the shapes of an operator's tensors and the values of its other arguments."""


def flops(events: Iterable[Any]) -> float:
    """The sum over events recorded with shapes; of products that fall apart into others, the whole alone."""
    counted = (event for event in events if event.name in _FORMULAS and not _inside_counted(event))
    return sum(_FORMULAS[event.name](event.input_shapes, event.concrete_inputs) for event in counted)


def _inside_counted(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name in _FORMULAS or _inside_counted(parent))


def _product(shapes: list[Any], values: list[Any], *, left: int) -> float:
    return 2.0 * prod(shapes[left]) * shapes[left + 1][-1]


def _fused(shapes: list[Any], values: list[Any], *, query: int, causal: int, products: int) -> float:
    """`products` of the five have, on average, the width of query and value."""
    (*batch, rows, width), (*_, keys, _), (*_, value_width) = shapes[query : query + 3]
    return prod(batch) * rows * keys * products * (width + value_width) * (0.5 if values[causal] else 1.0)


def _convolution(shapes: list[Any], values: list[Any]) -> float:
    x, weight = shapes[:2]
    stride, padding, dilation, transposed = values[3:7]
    places = x[2:]
    if not transposed:
        axes = zip(x[2:], weight[2:], stride, padding, dilation, strict=True)
        places = [(size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, gap in axes]
    return 2.0 * x[0] * prod(places) * prod(weight)


def _convolution_backward(shapes: list[Any], values: list[Any]) -> float:
    grad, x, weight = shapes[:3]
    transposed, wanted = values[7], values[10]
    return 2.0 * grad[0] * prod((x if transposed else grad)[2:]) * prod(weight) * sum(wanted[:2])


_FORMULAS: dict[str, Formula] = {
    **{f"aten::{name}": partial(_product, left=0) for name in ("mm", "bmm")},
    **{f"aten::{name}": partial(_product, left=1) for name in ("addmm", "addmm_", "baddbmm", "baddbmm_")},
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    **{
        f"aten::_scaled_dot_product_{name}": partial(_fused, query=query, causal=causal, products=products)
        for name, query, causal, products in (
            ("flash_attention_for_cpu", 0, 4, 2),
            ("flash_attention", 0, 4, 2),
            ("efficient_attention", 0, 6, 2),
            ("cudnn_attention", 0, 6, 2),
            ("flash_attention_for_cpu_backward", 1, 7, 5),
            ("flash_attention_backward", 1, 11, 5),
            ("efficient_attention_backward", 1, 11, 5),
            ("cudnn_attention_backward", 1, 14, 5),
        )
    },
}
