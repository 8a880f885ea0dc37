"""regard's own mechanisms: their calls of `regard.ops.attention.attention` and `attention_with_lse`.

A mechanism that calls twice (agents, spans, blocks chosen and near) has two calls at its site. Of `attention_with_lse`
the log-sum-exp goes on as it is with what was added to the logits; other changes do not reach it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.ops.attention import attention, attention_with_lse
from regard.ops.biases import Bias, PairScores
from regard.ops.indices import full_tile, index_grid
from regard.ops.masks import Dense, Mask
from regard.ops.normalizers import Normalizer, ReversedSoftmax, Softmax, normalizer_of
from regard.sites.call import AttentionCall, Heads, part, product
from regard.sites.hosts.code import describe, mentions
from regard.sites.hosts.host import Description, Seat
from regard.sites.hosts.intercept import Function, Inside, first_query, intercepted


class Regard:
    """Modules of regard, and mechanisms derived from its own."""

    name = "regard"

    def describe(self, name: str, module: nn.Module, model: nn.Module) -> Description | str | None:
        from regard.nn.mechanism import Mechanism

        if not (isinstance(module, Mechanism) or type(module).__module__.startswith("regard.")):
            return None
        if _attends(module):
            normalizer = getattr(module, "normalizer", "softmax")
            if isinstance(normalizer_of(normalizer), ReversedSoftmax):
                return "its weights are normalised over queries, so that none can be had without all others"
            return describe(name, module)
        parent = model.get_submodule(name.rpartition(".")[0]) if name else None
        inner = (each for each in module.modules() if each is not module)
        if not isinstance(module, Mechanism) or any(_attends(each) or isinstance(each, Mechanism) for each in inner):
            return None
        if parent is not None and (_attends(parent) or isinstance(parent, Mechanism)):
            return None
        return "it does not attend through regard.ops.attention"

    @contextmanager
    def route(self, seats: Sequence[Seat]) -> Iterator[None]:
        with ExitStack() as stack:
            for seat in seats:
                for method in ("forward", "step"):
                    if hasattr(seat.module, method):
                        stack.enter_context(intercepted(seat.module, method, partial(RegardAttention, seat)))
            yield


def _attends(module: nn.Module) -> bool:
    return not {attention, attention_with_lse}.isdisjoint(mentions(type(module).forward, type(module)))


class RegardAttention(Inside):
    """Takes regard's attention out of one run of a mechanism."""

    def __init__(self, seat: Seat) -> None:
        super().__init__()
        self._seat = seat

    def take(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function is attention or function is attention_with_lse:
            return _attention(self._seat, function, *args, **kwargs)
        return function(*args, **kwargs)


def _attention(
    seat: Seat,
    function: Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None,
    bias: Bias | None,
    normalizer: str | Normalizer,
    scale: float | None,
    **options: Any,
) -> Any:
    queries, keys = query.shape[2], key.shape[2]
    batch, heads, start = query.shape[0], query.shape[1], keys - queries
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    normal = normalizer_of(normalizer)
    mask = None if mask is None else mask.to(query.device)
    lse: list[Tensor] = []

    def attend(added: Tensor | None) -> Tensor:
        both, shown = bias, mask
        if added is not None:
            # What may not be attended to does not count as a key either, which some normalizers ask for.
            hidden = torch.isneginf(added)
            if bool(hidden.any()):
                allowed = Dense(~hidden.expand(*hidden.shape[:2], queries, keys))
                shown = allowed if mask is None else mask & allowed
            both = Beside(added.to(query.dtype).masked_fill(hidden, 0.0), start, bias)
        out = function(query, key, value, mask=shown, bias=both, normalizer=normalizer, scale=scale, **options)
        if function is attention_with_lse:
            lse[:] = out[1:]
            return out[0]
        return out

    def scores(rows: slice, chosen: Heads) -> Tensor:
        logits = product(query, key, factor, rows, chosen)
        place = (rows.start + start, rows.stop + start), (0, keys)
        if bias is not None:
            logits = logits + part(bias.tile((0, batch), (0, heads), *place, query.device), slice(None), chosen)
        if mask is not None:
            allowed = full_tile(mask.allows(*index_grid((0, batch), (0, heads), *place, query.device)), *place)
            logits = logits.masked_fill(~part(allowed, slice(None), chosen), -torch.inf)
        return logits

    def normalize(logits: Tensor, chosen: Heads) -> Tensor:
        counts = (logits > -torch.inf).sum(-1, keepdim=True)
        if chosen is None or isinstance(normal, Softmax):
            return normal.weights(logits, counts)
        # A normalizer may have numbers of its own for each head, of which it wants all.
        every = logits.new_zeros(len(logits), heads, *logits.shape[2:])
        every[:, list(chosen)] = logits
        return normal.weights(every, (every > -torch.inf).sum(-1, keepdim=True))[:, list(chosen)]

    scored = isinstance(bias, PairScores)
    shown = (None, None) if scored else (query, key)
    first = first_query(seat.site, queries, keys)
    out = seat.door(AttentionCall(seat.site, *shown, value, queries, scores, normalize, attend, first, 0))
    if function is attention:
        return out
    if not lse:
        attend(None)
    return out, lse[0]


@dataclass(frozen=True, eq=False, repr=False)
class Beside(Bias):
    """A table that broadcasts to (B, H, N, M), and the bias it is added to; query 0 stands at key `start`."""

    table: Tensor
    start: int
    own: Bias | None = None

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        if self.own is not None:
            self.own.validate(batch, heads, queries, keys)

    def score(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = batch, head, query - self.start, key
        sizes = self.table.shape
        added = self.table[tuple(each if size > 1 else each * 0 for each, size in zip(at, sizes, strict=True))]
        return added if self.own is None else added + self.own.score(batch, head, query, key)
