"""Attention written out: a softmax over keys whose result is multiplied with the values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.precision import statistics_dtype
from regard.sites.call import AttentionCall, Heads, part, softmax
from regard.sites.hosts.host import Seat
from regard.sites.hosts.intercept import Function, first_query

_T = torch.Tensor
SOFTMAX = {F.softmax, torch.softmax, _T.softmax}
PRODUCTS = {torch.matmul, _T.matmul, _T.__matmul__, torch.bmm, _T.bmm}
SAME_WEIGHTS = {
    F.dropout, torch.dropout, torch.reshape, torch.flatten,
    _T.to, _T.type_as, _T.type, _T.float, _T.half, _T.bfloat16, _T.double,
    _T.contiguous, _T.clone, _T.view, _T.reshape, _T.flatten, _T.unflatten,
}  # fmt: skip
"""Functions whose result still is the weights: what happens to them on the way to the product."""


@dataclass(frozen=True)
class _Weights:
    """The logits of weights, and how the host makes weights of logits; `now` keeps the identity from being reused."""

    logits: Tensor
    made: tuple[Callable[[Tensor], Tensor], ...]
    now: Tensor


class Products:
    """Remembers weights by identity from their softmax to the product that uses them as its first factor."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._weights: dict[int, _Weights] = {}

    def take(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer of any torch function; that of a product through the door."""
        if function in SOFTMAX:
            return self._softmax(function, args, kwargs)
        if function in SAME_WEIGHTS and args and id(args[0]) in self._weights:
            known, out = self._weights[id(args[0])], function(*args, **kwargs)

            def again(weights: Tensor) -> Tensor:
                return function(weights, *args[1:], **kwargs)

            self._weights[id(out)] = replace(known, made=(*known.made, again), now=out)
            return out
        if function in PRODUCTS and len(args) == 2 and id(args[0]) in self._weights:
            return self._mix(self._weights[id(args[0])], function, args[1])
        if function is torch.einsum and len(args) == 3 and id(args[1]) in self._weights:
            return self._einsum(*args)
        return function(*args, **kwargs)

    def _softmax(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        out = function(*args, **kwargs)
        given = dict(zip(("input", "dim"), args, strict=False)) | kwargs
        logits = given["input"]
        if logits.ndim >= 3 and given.get("dim") in (-1, logits.ndim - 1):

            def again(logits: Tensor) -> Tensor:
                return function(logits, *args[1:], **{name: kwargs[name] for name in kwargs if name != "input"})

            self._weights[id(out)] = _Weights(logits, (again,), out)
        return out

    def _einsum(self, equation: str, weights: Tensor, value: Tensor) -> Tensor:
        """As a product, where the equation is one over the last axis of the weights and of the value's keys."""
        left, _, out = equation.replace(" ", "").partition("->")
        of_weights, _, of_value = left.partition(",")
        lead, query, key = of_weights[:-2], of_weights[-2:-1], of_weights[-1:]
        width = "".join(label for label in of_value if label not in of_weights)
        if "." in equation or len(width) != 1 or key not in of_value or set(out) != set(f"{lead}{query}{width}"):
            return torch.einsum(equation, weights, value)
        shared = "".join(label for label in lead if label in of_value)
        ordered = torch.einsum(f"{of_value}->{shared}{key}{width}", value)
        axes = [ordered.shape[shared.index(label)] if label in shared else 1 for label in lead]

        def host(weights: Tensor, ordered: Tensor) -> Tensor:
            return torch.einsum(f"{out}->{lead}{query}{width}", torch.einsum(equation, weights, value))

        mixed = self._mix(self._weights[id(weights)], host, ordered.reshape(*axes, *ordered.shape[-2:]))
        return torch.einsum(f"{lead}{query}{width}->{out}", mixed)

    def _mix(self, known: _Weights, multiply: Callable[[Tensor, Tensor], Tensor], value: Tensor) -> Tensor:
        site, logits, weights = self._seat.site, known.logits, known.now
        queries, keys = logits.shape[-2:]
        apart = next((each for each in (logits, weights) if each.ndim > 3), None)
        heads = site.heads or 1 if apart is None else apart.shape[-3]
        total = logits.shape[:-2].numel()
        if value.ndim < 3 or (site.heads and heads != site.heads) or total % heads:
            return multiply(weights, value)
        batch = total // heads
        laid_out = logits.reshape(batch, heads, queries, keys)
        key_heads = value.shape[-3] if value.ndim > 3 else max(1, value.shape[0] // batch)
        shared = value.reshape(-1, key_heads, *value.shape[-2:])
        shared = shared.expand(batch, *shared.shape[1:])

        def attend(bias: Tensor | None) -> Tensor:
            if bias is None:
                return multiply(weights, value).reshape(batch, heads, queries, -1)
            biased = (laid_out + bias).to(logits.dtype)
            # The softmax of a row whose keys have all been masked would be NaN.
            empty = torch.isneginf(biased).all(-1, keepdim=True)
            changed = biased.masked_fill(empty, 0.0).reshape(logits.shape)
            for step in known.made:
                changed = step(changed)
            return multiply(changed, value).reshape(batch, heads, queries, -1).masked_fill(empty, 0.0)

        def scores(rows: slice, chosen: Heads) -> Tensor:
            return part(laid_out, rows, chosen).to(statistics_dtype(laid_out.dtype))

        def normalize(logits: Tensor, chosen: Heads) -> Tensor:
            return softmax(logits)

        start = first_query(site, queries, keys)
        call = AttentionCall(site, None, None, shared, queries, scores, normalize, attend, start, 0)
        return self._seat.door(call).reshape(*weights.shape[:-1], value.shape[-1])
