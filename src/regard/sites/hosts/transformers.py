"""transformers models that dispatch attention through its `AttentionInterface` (most of them).

A throw-away name is registered as an attention function and as the mask function of the implementation it stands in
for, and set on the configs of the modules: masks, caches and kernels stay the host's own.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.sites.call import AttentionCall, Heads, part, product, softmax
from regard.sites.hosts.host import Description, Seat
from regard.sites.site import Kind

_names = itertools.count()
MARK = "_regard_"
"""Stands in throw-away names between the implementation and a number."""

CROSS = ("encdecattention", "encoder_attn", "crossattention", "cross_attn")
"""Parts of the names of modules that attend to another sequence."""


class Transformers:
    """Modules whose forward asks `ALL_ATTENTION_FUNCTIONS` which function to run."""

    name = "transformers"

    def describe(self, name: str, module: nn.Module, model: nn.Module) -> Description | str | None:
        if "transformers" not in sys.modules:
            return None
        forward = inspect.unwrap(type(module).forward)
        if "ALL_ATTENTION_FUNCTIONS" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
            return None
        config = getattr(module, "config", None)
        if config is None or not hasattr(config, "_attn_implementation_internal"):
            return "it has no config that says which attention to run"
        if getattr(module, "reorder_and_upcast_attn", False) and config._attn_implementation == "eager":
            return "reorder_and_upcast_attn bypasses the attention interface; set it to False"
        heads = _first(module, config, "num_heads", "num_attention_heads", "n_heads", "n_head")
        head_dim = _first(module, config, "head_dim", "attention_head_size", "key_value_proj_dim", "d_kv")
        if not head_dim and heads:
            head_dim = _first(module, config, "embed_dim", "hidden_size", "d_model") // heads
        groups = getattr(module, "num_key_value_groups", 1) or 1
        causal = bool(getattr(module, "is_causal", False))
        return Description(_kind(name, module), heads, heads // groups, head_dim, causal)

    @contextmanager
    def route(self, seats: Sequence[Seat]) -> Iterator[None]:
        by_config: dict[int, tuple[Any, list[Seat]]] = {}
        for seat in seats:
            config = seat.module.config
            by_config.setdefault(id(config), (config, []))[1].append(seat)
        with ExitStack() as stack:
            for config, members in by_config.values():
                stack.enter_context(_routed(config, members))
            yield


@contextmanager
def _routed(config: Any, seats: list[Seat]) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    own = config._attn_implementation
    attention, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    name = f"{own}{MARK}{next(_names)}"
    # A door on a part of the model may have put its own name there, which begins with the one it stands in for.
    eager = own.partition(MARK)[0] == "eager"
    watches = {seat.module: _Watch(seat) for seat in seats}

    def routed(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor | None]:
        function = _own_function(module, own)
        if module not in watches:
            return function(module, query, key, value, attention_mask, **arguments)
        return _run(module, function, eager, watches[module], query, key, value, attention_mask, arguments)

    AttentionInterface.register(name, routed)
    if own in masks:
        AttentionMaskInterface.register(name, masks[own])
    with ExitStack() as stack:
        stack.callback(attention.pop, name, None)
        stack.callback(masks.pop, name, None)
        for watch in watches.values():
            stack.enter_context(watch.watching())
        config._attn_implementation_internal = name
        stack.callback(setattr, config, "_attn_implementation_internal", own)
        yield


@dataclass
class _Watch:
    """A seat with the positions that its module's next call starts at."""

    seat: Seat
    query_start: int | Tensor | None = None
    key_start: int | Tensor = 0
    passed: int = 0

    def watching(self) -> AbstractContextManager[Any]:
        """Ask the cache where queries and keys stand before each forward of the module."""
        module = self.seat.module
        names = list(inspect.signature(type(module).forward).parameters)[1:]

        def argument(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            place = names.index(name) if name in names else len(args)
            return args[place] if place < len(args) else kwargs.get(name)

        def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache, index = argument("past_key_values", args, kwargs), getattr(module, "layer_idx", None)
            self.query_start, self.key_start, self.passed = None, 0, 0
            if cache is None or index is None:
                return
            # Of an encoder–decoder, the part of the cache that knows how much was decoded.
            cache = getattr(cache, "self_attention_cache", cache)
            self.query_start = cache.get_query_offset(index)
            length = argument(names[0], args, kwargs).shape[1]
            if self.seat.site.kind == "self":
                self.key_start = cache.get_mask_sizes(length, index)[1]
            else:
                # The layer's self-attention came first and has counted these queries already.
                self.query_start -= length

        return _removing(module.register_forward_pre_hook(ask, with_kwargs=True))

    def starts(self, query: Tensor, key: Tensor) -> tuple[int | Tensor, int | Tensor]:
        """The sequence positions of the first query and the first key."""
        if self.query_start is not None:
            return self.query_start, self.key_start
        if self.seat.site.kind != "self":
            return 0, 0
        # Packed images come one after the other, each in a call of its own.
        start, self.passed = self.passed, self.passed + key.shape[2]
        return start + key.shape[2] - query.shape[2], start


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _run(
    module: nn.Module,
    function: Callable[..., tuple[Tensor, Tensor | None]],
    eager: bool,
    watch: _Watch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    host_weights: list[Tensor | None] = [None]

    def attend(bias: Tensor | None) -> Tensor:
        if bias is None:
            out, host_weights[0] = function(module, query, key, value, mask, **arguments)
            return out.transpose(1, 2)
        biased = _additive(mask, bias, query, key, causal)
        out, host_weights[0] = function(module, query, key, value, biased, **arguments)
        # The host's eager softmax makes NaN of a row whose keys have all been masked.
        empty = torch.isneginf(biased).all(-1, keepdim=True)
        return out.transpose(1, 2).masked_fill(empty, 0.0)

    causal = not eager and _is_causal(module, query, mask, arguments)
    scale = arguments.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    softcap, added = arguments.get("softcap"), arguments.get("position_bias")

    def scores(rows: slice, heads: Heads, keys: int | None = None) -> Tensor:
        logits = product(query, key[:, :, :keys], scale, rows, heads)
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        if added is not None:
            logits = logits + part(added, rows, heads)[..., :keys]
        if causal:
            hidden = ~_seen(rows, logits.shape[-1], query.device)[:, rows.start :]
            logits[..., rows.start :].masked_fill_(hidden, -torch.inf)
            return logits
        if mask is None:
            return logits
        shown = part(mask[..., : key.shape[2]], rows, heads)[..., :keys]
        return logits.masked_fill(~shown, -torch.inf) if mask.dtype == torch.bool else logits + _infinite(shown)

    sinks = arguments.get("s_aux")

    def normalize(logits: Tensor, heads: Heads) -> Tensor:
        if sinks is None:
            return softmax(logits)
        own = sinks if heads is None else sinks[list(heads)]
        own = own.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return softmax(torch.cat([logits, own], -1))[..., :-1]

    query_start, key_start = watch.starts(query, key)
    call = AttentionCall(
        watch.seat.site,
        query,
        key,
        value,
        query.shape[2],
        scores,
        normalize,
        attend,
        query_start,
        key_start,
        causal=causal,
    )
    out = watch.seat.door(call).transpose(1, 2).contiguous()
    return out, host_weights[0]


def _own_function(module: nn.Module, own: str) -> Callable[..., Any]:
    """The function that the module would run by itself."""
    home = inspect.unwrap(type(module).forward).__globals__
    return home["ALL_ATTENTION_FUNCTIONS"].get_interface(own, home.get("eager_attention_forward"))


def _is_causal(module: nn.Module, query: Tensor, mask: Tensor | None, arguments: dict[str, Any]) -> bool:
    """Whether the host's kernel itself is causal: without a mask, as its SDPA function decides it."""
    if mask is not None or query.shape[2] == 1:
        return False
    given = arguments.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _seen(rows: slice, keys: int, device: torch.device) -> Tensor:
    """Aligned at the first key: with more keys than queries the rest of a static cache is still empty."""
    return torch.arange(keys, device=device) <= torch.arange(rows.start, rows.stop, device=device)[:, None]


def _additive(mask: Tensor | None, bias: Tensor, query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """The host's mask with `bias`, as an additive mask (B, 1 or H, N, M)."""
    bias = bias.to(query.dtype)
    if causal:
        mask = _seen(slice(0, query.shape[2]), key.shape[2], query.device)[None, None]
    if mask is None:
        return bias.expand(*bias.shape[:2], query.shape[2], key.shape[2])
    mask = mask[..., : key.shape[2]]
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else _infinite(mask) + bias


def _infinite(mask: Tensor) -> Tensor:
    """An additive mask with −inf for its lowest numbers, which an edit that masks the other keys must not uncover.

    Rows of nothing else stay as they are: the host spreads these evenly.
    """
    low = mask <= torch.finfo(mask.dtype).min / 2
    return mask.masked_fill(low & ~low.all(-1, keepdim=True), -torch.inf)


def _kind(name: str, module: nn.Module) -> Kind:
    crosses = getattr(module, "is_cross_attention", None)
    if crosses is None:
        crosses = any(part in name.lower() for part in CROSS)
    return "cross" if crosses else "self"


def _first(module: nn.Module, config: Any, *names: str) -> int:
    """The first of these attributes that is a number, of the module or of its config; 0 if none is."""
    for owner in (module, config):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return value
    return 0
