"""Plumbing of Combiner: tokens laid out by spans, abstractions of spans, and parts of one softmax put together.

Slots are laid out row by row, `size` to a row: a span is a row, or a column, or what they have but for one slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from regard.ops.attention import attention, attention_with_lse
from regard.ops.masks import Causal, Keys, Mask, Padding, Segments, Window, segments_of
from regard.ops.normalizers import Softmax

OTHERS = ~Window(0)
EARLIER = Causal() & OTHERS
"""Of rows. Made here, since torch.compile does not trace ``~``."""


class Tokens(NamedTuple):
    """What is laid out: inputs (as one head), their projections, and what is mixed: the values, or one-hot rows."""

    x: Float[Tensor, "batch 1 length dim"]
    query: Float[Tensor, "batch heads length head_dim"]
    key: Float[Tensor, "batch heads length head_dim"]
    value: Float[Tensor, "batch heads length head_dim"]
    carried: Float[Tensor, "batch heads length carried_dim"]

    def each(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """The same with every tensor changed; values that are what is mixed stay one tensor."""
        x, query, key, value = (change(tensor) for tensor in self[:4])
        return Tokens(x, query, key, value, value if self.carried is self.value else change(self.carried))

    def followed_by(self, new: Tokens) -> Tokens:
        """The same with further tokens, of which the values are what is mixed."""
        x, query, key, value = (torch.cat(pair, dim=2) for pair in zip(self[:4], new[:4], strict=True))
        return Tokens(x, query, key, value, value)


class Span(NamedTuple):
    """Abstractions of spans, which queries look at in the place of keys and values."""

    key: Float[Tensor, "batch heads spans head_dim"]
    value: Float[Tensor, "batch heads spans carried_dim"]


class Part(NamedTuple):
    """The result over some of the keys, and the log-sum-exp of their scores: −inf where there is none."""

    out: Float[Tensor, "batch heads length carried_dim"]
    lse: Float[Tensor, "batch heads length"]


@dataclass(frozen=True)
class Slots:
    """Where tokens stand when every sequence begins at a multiple of its extent, and which slots hold one."""

    count: int
    real: Bool[Tensor, "batch_or_1 slots"]
    full: bool
    """Whether every slot holds a token."""
    sequence: Int[Tensor, "batch_or_1 slots"] | None = None
    """Of each slot where several are packed, −1 for none."""
    extent: Int[Tensor, "batch_or_1 slots"] | None = None
    """How many slots the sequence of a slot has for itself."""
    slot: Int[Tensor, "batch_or_1 length"] | None = None
    """Of each token; None where it is the token's position."""

    @classmethod
    def of(cls, length: int, mask: Mask | None, device: torch.device, multiple: int | None) -> Slots:
        """Sequences begin at multiples of `multiple`, or of the least power of two that holds them."""
        segments = segments_of(mask)
        if segments is not None:
            return cls._packed(segments.places().to(device).view(-1, length), multiple)
        count = 1 << (length - 1).bit_length() if multiple is None else -(-length // multiple) * multiple
        real = torch.arange(count, device=device)[None] < length
        if isinstance(mask, Padding):
            real = real & mask.to(device).real(count)
        return cls(count, real, count == length and mask is None)

    @classmethod
    def _packed(cls, places: Tensor, multiple: int | None) -> Slots:
        sequence = (places == 0).cumsum(-1) - 1
        lengths = places.new_zeros(places.shape[0], int(sequence.max()) + 1)
        lengths.scatter_add_(1, sequence, torch.ones_like(sequence))
        if multiple is None:
            extents = lengths.clamp(min=1).double().log2().ceil().exp2().long() * (lengths > 0)
        else:
            extents = (lengths + multiple - 1) // multiple * multiple
        # The largest first: every sum of larger powers of two is a multiple of the next.
        ordered, order = extents.sort(dim=-1, descending=True, stable=True)
        starts = torch.zeros_like(extents).scatter(1, order, ordered.cumsum(-1) - ordered)
        slot, count = starts.gather(1, sequence) + places, int(extents.sum(-1).max())
        if multiple is None:
            count = 1 << (count - 1).bit_length()

        def by_slot(of_token: Tensor, empty: int) -> Tensor:
            return of_token.new_full((of_token.shape[0], count), empty).scatter(1, slot, of_token)

        owner = by_slot(sequence, -1)
        return cls(count, owner >= 0, False, owner, by_slot(extents.gather(1, sequence), 0), slot)

    @staticmethod
    def of_rows(of_slots: Tensor, size: int) -> Tensor:
        """What is said of the first slot of each row, without an axis of samples that are all alike."""
        rows = of_slots[:, ::size]
        return rows[0] if rows.shape[0] == 1 else rows

    def lay(self, tokens: Float[Tensor, "batch heads length width"]) -> Float[Tensor, "batch heads slots width"]:
        """By slots; zeros where there is no token."""
        if self.full:
            return tokens
        if self.slot is None:
            laid = F.pad(tokens, (0, 0, 0, self.count - tokens.shape[2]))
        else:
            slot = self.slot[:, None, :, None].expand(tokens.shape)
            laid = tokens.new_zeros(*tokens.shape[:2], self.count, tokens.shape[3]).scatter(2, slot, tokens)
        return laid.where(self.real[:, None, :, None], torch.zeros_like(laid))

    def take(self, laid: Float[Tensor, "batch heads slots width"], length: int) -> Tensor:
        """By tokens."""
        if self.slot is None:
            return laid[:, :, :length]
        return laid.gather(2, self.slot[:, None, :, None].expand(*laid.shape[:2], -1, laid.shape[3]))


def by_span(tokens: Float[Tensor, "batch heads slots width"], size: int) -> Float[Tensor, "folded 1 size width"]:
    """Samples, heads and spans folded into one axis."""
    return tokens.unflatten(2, (-1, size)).flatten(0, 2)[:, None]


def by_column(tokens: Float[Tensor, "batch heads slots width"], size: int) -> Float[Tensor, "batch folded rows width"]:
    """Heads and places in a row of `size` slots folded into one axis."""
    return tokens.unflatten(2, (-1, size)).transpose(2, 3).flatten(1, 2)


def real_keys(real: Bool[Tensor, "batch_or_1 slots"], size: int, batch: int, heads: int) -> Keys:
    """The mask of empty slots for what `by_span` folds."""
    return Keys(real[:, None].expand(batch, heads, -1).reshape(-1, size))


def abstraction(tokens: Tokens, size: int, real: Tensor | None, dropout: float) -> Span:
    """Spans of `size` slots: the largest features of the keys, and what the largest of the queries attend to.

    `real` says which slots count; None says that all of them do, where it matters.
    """
    if size == 1:
        return Span(tokens.key, tokens.carried)
    query, key = (_pooled(each, size, real) for each in (tokens.query, tokens.key))
    mask = None if real is None else real_keys(real, size, *query.shape[:2])
    folded = (by_span(each, size) for each in (tokens.key, tokens.carried))
    value = attention(by_span(query, 1), *folded, mask=mask, dropout=dropout)
    return Span(key, value.view(*key.shape[:3], -1))


def _pooled(tokens: Tensor, size: int, real: Tensor | None) -> Float[Tensor, "batch heads spans width"]:
    rows = tokens.unflatten(2, (-1, size))
    if real is None:
        return rows.amax(3)
    counted = real.unflatten(1, (-1, size))[:, None, :, :, None]
    pooled = rows.masked_fill(~counted, -torch.inf).amax(3)
    return pooled.where(counted.any(3), torch.zeros_like(pooled))


def own_span(tokens: Tokens, size: int, causal: bool, real: Tensor | None, dropout: float) -> Part:
    """What each token gets of its own span directly."""
    query, key, carried = (by_span(each, size) for each in (tokens.query, tokens.key, tokens.carried))
    mask: Mask | None = Causal() if causal else None
    if mask is None and real is not None:
        mask = real_keys(real, size, *tokens.query.shape[:2])
    out, lse = attention_with_lse(query, key, carried, mask=mask, dropout=dropout)
    shape = tokens.query.shape[:3]
    return Part(out.view(*shape, -1), lse.view(shape))


def other_spans(query: Tensor, span: Span, size: int, mask: Mask, dropout: float) -> Part:
    """What each token gets of the spans that `mask` allows its row; of one column where spans are told apart by it."""
    out, lse = attention_with_lse(by_column(query, size), span.key, span.value, mask=mask, dropout=dropout)
    return _in_order(out, lse, size)


def _in_order(out: Tensor, lse: Tensor, size: int) -> Part:
    """What `by_column` undid."""
    return Part(*(each.unflatten(1, (-1, size)).transpose(2, 3).flatten(2, 3) for each in (out, lse)))


def own_column(tokens: Tokens, size: int, mask: Mask, present: Tensor | None, dropout: float) -> Part:
    """What each token gets of the rows that `mask` allows its own, in its own column.

    `present` says in which slots there is a key; None says in all of them.
    """
    query, key, carried = (by_column(each, size) for each in (tokens.query, tokens.key, tokens.carried))
    batch, columns, rows = query.shape[:3]
    if present is not None:
        of_columns = present.unflatten(1, (rows, size)).transpose(1, 2)[:, None]
        mask = mask & Keys(of_columns.expand(batch, columns // size, -1, -1).reshape(-1, rows))
    folded = (each.flatten(0, 1)[:, None] for each in (query, key, carried))
    out, lse = attention_with_lse(*folded, mask=mask, dropout=dropout)
    return _in_order(out.view(batch, columns, rows, -1), lse.view(batch, columns, rows), size)


def row_but_one(tokens: Tokens, size: int, real: Tensor | None, dropout: float) -> tuple[Tokens, Tensor]:
    """For every slot the abstraction of the others in its row, as key and as what is mixed; and where there are any."""
    query, key = (_others(each, size, 3, None, real, both=True) for each in (tokens.query, tokens.key))
    mask: Mask = OTHERS if real is None else OTHERS & real_keys(real, size, *query.shape[:2])
    folded = (by_span(each, size) for each in (query, tokens.key, tokens.carried))
    out, lse = attention_with_lse(*folded, mask=mask, dropout=dropout)
    shape = query.shape[:3]
    found = tokens._replace(key=key, carried=out.view(*shape, -1))
    return found, lse.view(shape)[:, 0] > -torch.inf


def column_but_one(
    tokens: Tokens, size: int, mask: Mask, sequence: Tensor | None, real: Tensor | None, causal: bool, dropout: float
) -> tuple[Tokens, Tensor]:
    """The same of its column: of what stands above where that is `causal`."""
    query, key = (_others(each, size, 2, sequence, real, both=not causal) for each in (tokens.query, tokens.key))
    part = own_column(tokens._replace(query=query), size, mask, real, dropout)
    return tokens._replace(key=key, carried=part.out), part.lse[:, 0] > -torch.inf


def others_in_row(query: Tensor, spans: Tokens, size: int, present: Tensor, dropout: float) -> Part:
    """What each token gets of the abstractions that stand in its row but not in its slot."""
    folded = (by_span(each, size) for each in (query, spans.key, spans.carried))
    mask = OTHERS & real_keys(present, size, *query.shape[:2])
    out, lse = attention_with_lse(*folded, mask=mask, dropout=dropout)
    shape = query.shape[:3]
    return Part(out.view(*shape, -1), lse.view(shape))


def of_columns(mask: Mask, slots: Slots, size: int, columns: int) -> Mask:
    """`mask` over rows, within each of the packed sequences, for `columns` columns of each sample."""
    if slots.sequence is None:
        return mask
    rows = slots.sequence[:, ::size]
    return mask & Segments(rows[0] if rows.shape[0] == 1 else rows.repeat_interleave(columns, dim=0))


def _others(
    tokens: Tensor, size: int, axis: int, sequence: Tensor | None, real: Tensor | None, *, both: bool
) -> Float[Tensor, "batch heads slots width"]:
    """The largest features before each slot along rows (axis 3) or columns (2), or on `both` sides; 0 where none is."""
    grid = tokens.unflatten(2, (-1, size))
    if real is not None:
        grid = grid.masked_fill(~real.unflatten(1, (-1, size))[:, None, :, :, None], -torch.inf)
    ids = None if sequence is None else sequence[:, None, ::size, None, None]
    largest = _before(grid, axis, ids)
    if both:
        backward = _before(grid.flip(axis), axis, None if ids is None else ids.flip(axis)).flip(axis)
        largest = torch.maximum(largest, backward)
    return largest.where(largest > -torch.inf, torch.zeros_like(largest)).flatten(2, 3)


def above(
    tokens: Tensor, size: int, largest: Float[Tensor, "batch heads size width"] | None
) -> Float[Tensor, "batch heads slots width"]:
    """The largest features above each slot, `largest` being those of the rows before; 0 where there is none."""
    grid = tokens.unflatten(2, (-1, size))
    first = torch.full_like(grid[:, :, :1], -torch.inf) if largest is None else largest[:, :, None]
    found = torch.cat([first, grid[:, :, :-1]], dim=2).cummax(2).values
    return found.where(found > -torch.inf, torch.zeros_like(found)).flatten(2, 3)


def _before(grid: Tensor, axis: int, ids: Tensor | None) -> Tensor:
    if ids is None:
        return _moved(grid, axis, 1, None).cummax(axis).values
    largest, step = _moved(grid, axis, 1, ids), 1
    while step < grid.shape[axis]:
        largest = torch.maximum(largest, _moved(largest, axis, step, ids))
        step *= 2
    return largest


def _moved(grid: Tensor, axis: int, step: int, ids: Tensor | None) -> Tensor:
    """Everything `step` places on along an axis, but not into another sequence."""
    length = grid.shape[axis]
    step = min(step, length)
    kept = grid.narrow(axis, 0, length - step)
    if ids is not None:
        same = ids.narrow(axis, 0, length - step) == ids.narrow(axis, step, length - step)
        kept = kept.masked_fill(~same, -torch.inf)
    return torch.cat([torch.full_like(grid.narrow(axis, 0, step), -torch.inf), kept], dim=axis)


def together(parts: Sequence[Part], dropout: float = 0.0) -> Float[Tensor, "batch heads length carried_dim"]:
    """The result over the keys of all parts, whose weights are normalised together; zeros where there is none."""
    scores = torch.stack([part.lse for part in parts], dim=-1)
    weights = Softmax().weights(scores, torch.ones_like(scores[..., :1], dtype=torch.long))
    weights = F.dropout(weights, dropout)
    mixed = sum(part.out * weights[..., index, None] for index, part in enumerate(parts))
    return mixed.to(parts[0].out.dtype)  # pyright: ignore[reportAttributeAccessIssue] there is a part
