"""Modules that call torch's attention themselves: `scaled_dot_product_attention`, `nn.MultiheadAttention`, or a softmax
whose result is multiplied with the values.

The module's forward is replaced on the instance by one that runs inside a `TorchFunctionMode`; nothing else changes.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.sites.call import AttentionCall, Heads, part, product, softmax
from regard.sites.hosts.code import HEADS, describe, first, mentions
from regard.sites.hosts.host import Description, Seat
from regard.sites.hosts.intercept import Function, Inside, first_query, intercepted
from regard.sites.hosts.softmax_product import Products

_LOOKS_LIKE_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_PRODUCTS = {"@", "matmul", "bmm", "einsum"}


class TorchCalls:
    """Modules whose own forward, with the methods and functions it calls, is torch's attention."""

    name = "torch"

    def describe(self, name: str, module: nn.Module, model: nn.Module) -> Description | str | None:
        if type(module).__module__.startswith("regard."):
            return None
        if attends(module):
            return describe(name, module)
        if not _looks(module):
            return None
        inner = (each for each in module.modules() if each is not module)
        if attends(_parent(name, model)) or any(attends(each) or _looks(each) for each in inner):
            return None
        return "its forward calls neither scaled_dot_product_attention nor a softmax and a product"

    @contextmanager
    def route(self, seats: Sequence[Seat]) -> Iterator[None]:
        with ExitStack() as stack:
            if any(isinstance(seat.module, nn.MultiheadAttention) for seat in seats):
                stack.enter_context(_without_fast_path())
            for seat in seats:
                stack.enter_context(intercepted(seat.module, "forward", partial(TorchAttention, seat)))
            yield


def attends(module: nn.Module | None) -> bool:
    """Whether the module's own code is torch's attention; a softmax alone counts in attention modules only."""
    if module is None:
        return False
    if isinstance(module, nn.MultiheadAttention):
        return True
    called = _code(module)
    if "scaled_dot_product_attention" in called:
        return True
    if {"softmax", "Softmax"}.isdisjoint(called) or _PRODUCTS.isdisjoint(called):
        return False
    return _looks(module) or first(module, *HEADS) > 0


def _looks(module: nn.Module) -> bool:
    return _LOOKS_LIKE_ATTENTION.search(type(module).__name__) is not None


def _code(module: nn.Module) -> frozenset[object]:
    return mentions(type(module).forward, type(module))


def _parent(name: str, model: nn.Module) -> nn.Module | None:
    return model.get_submodule(name.rpartition(".")[0]) if name else None


class TorchAttention(Inside):
    """Takes torch's attention out of one run of a module."""

    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self._seat = seat
        self._products = Products(seat)

    def take(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is F.scaled_dot_product_attention:
            return scaled_dot_product(self._seat, function, args, kwargs)
        if function is F.multi_head_attention_forward:
            with self:
                return _open_multi_head(*args, **kwargs)
        return self._products.take(function, args, kwargs)


def scaled_dot_product(seat: Seat, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The answer of `F.scaled_dot_product_attention` through the door."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    if query.is_nested:
        return function(*args, **kwargs)
    shape = (*query.shape[:-1], value.shape[-1])
    heads = query.shape[-3] if query.ndim > 3 else seat.site.heads or 1
    batch = max(1, query.shape[:-2].numel() // heads)
    if query.ndim != 4 and mask is not None and mask.ndim > 2:
        mask = mask.expand(*query.shape[:-2], *mask.shape[-2:]).reshape(batch, heads, *mask.shape[-2:])
    query, key, value = (tensor.reshape(batch, -1, *tensor.shape[-2:]) for tensor in (query, key, value))
    queries, keys = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if given.get("scale") is None else given["scale"]
    if given.get("is_causal"):
        # As torch aligns it: query 0 with key 0.
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()

    def attend(bias: Tensor | None) -> Tensor:
        if bias is None:
            return function(*args, **kwargs).reshape(batch, -1, queries, shape[-1])
        bias = bias.to(query.dtype)
        if mask is None:
            added = bias.expand(*bias.shape[:2], queries, keys)
        else:
            added = torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else mask + bias
        rest = {name: given[name] for name in ("dropout_p", "scale", "enable_gqa") if name in given}
        return function(query, key, value, attn_mask=added, **rest)

    def scores(rows: slice, chosen: Heads) -> Tensor:
        logits = product(query, key, scale, rows, chosen)
        if mask is None:
            return logits
        shown = part(mask, rows, chosen)
        return logits.masked_fill(~shown, -torch.inf) if mask.dtype == torch.bool else logits + shown

    def normalize(logits: Tensor, chosen: Heads) -> Tensor:
        return softmax(logits)

    start = first_query(seat.site, queries, keys)
    call = AttentionCall(seat.site, query, key, value, queries, scores, normalize, attend, start, 0)
    return seat.door(call).reshape(shape)


# torch shows a mode this function but not what it calls. A copy of it that finds nobody watching goes on to its body.
_multi_head = F.multi_head_attention_forward
_open_multi_head = FunctionType(
    _multi_head.__code__,
    {**_multi_head.__globals__, "has_torch_function": lambda tensors: False},
    _multi_head.__name__,
    _multi_head.__defaults__,
    _multi_head.__closure__,
)

_lock, _waiting, _enabled = threading.Lock(), [0], [True]


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """torch's fused encoder layer runs without calling its attention; it stays off while anyone watches one."""
    with _lock:
        if not _waiting[0]:
            _enabled[0] = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _waiting[0] += 1
    try:
        yield
    finally:
        with _lock:
            _waiting[0] -= 1
            if not _waiting[0]:
                torch.backends.mha.set_fastpath_enabled(_enabled[0])
