"""Combiner. "Combiner: Full Attention Transformer with Sparse Computation Cost", Ren et al., 2021, arXiv 2107.05768.

    A(x_i)     = Σ_{j ∈ Ω_i⁰} p(j|i) v_j + Σ_r p(Ω_i^r|i) Σ_{j ∈ Ω_i^r} p(j|Ω_i^r) v_j
    p(j|i)     ∝ exp(q_i · k_j / √d_h),   p(Ω|i) ∝ exp(q_i · k_Ω / √d_h),      normalised together
    p(j|Ω)     ∝ exp(q_Ω · k_j / √d_h),   k_Ω = max_{j ∈ Ω} k_j,  q_Ω = max_{j ∈ Ω} q_j      (feature by feature)

The spans Ω_i^r are disjoint and, with the tokens Ω_i⁰ that i attends to directly, hold all that i may see: every weight
is positive. `plan` says which they are, of what stands before i where it is causal:

    fixed             Ω_i⁰ the block of i of `block_size` tokens, Ω_i^r the others
    logsparse         Ω_i⁰ = {i}, Ω_i^r the neighbour of the block of i among blocks of 2^r, for every r
    axial_rowmajor    as fixed, blocks being rows; p(j|Ω) of row r has the query of i's column c there, q_Ω = q_(r,c),
                      and what that finds, o_(r,c), makes the key, k_Ω = W_2 norm(x_(r,c) + W_1 o_(r,c))
    axial_vertical    Ω_i⁰ the row and the column of i, Ω_i^r the other columns without the row of i
    axial_horizontal  Ω_i⁰ the row and the column of i, Ω_i^r the other rows without the column of i

Several plans are a mixture, the mean of their A.

Cost: time O(n (s + n/s) d) with s = `block_size`, which is O(n √n d) for s = √n, and memory O(n d); logsparse
O(n log n d) both. The decoding state holds n/s spans and a block (fixed), else keys and values of all tokens or spans.

Differences: the last row may be short; where it has no token in i's column it is asked with zeros (rowmajor). The
released code gives noncausal tokens the summary of their own block beside its tokens; here spans are disjoint, as in
the paper. Its appendices on noncausal logsparse and axial plans were not read: neighbours to both sides, and columns
and rows to all sides, are the same supports without "before i". W_1, W_2 and norm are the released JAX layer's. The
released axial mixture has vertical and horizontal spans in one softmax, where they overlap; a mixture here is the
paper's mean. Clusters learned as in Routing Transformer (Combiner-Routing) and DeepSets for the maximum are not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, Attention
from regard.nn.sparse._spans import (
    EARLIER,
    OTHERS,
    Part,
    Slots,
    Span,
    Tokens,
    above,
    abstraction,
    by_column,
    by_span,
    column_but_one,
    of_columns,
    other_spans,
    others_in_row,
    own_column,
    own_span,
    real_keys,
    row_but_one,
    together,
)
from regard.ops.attention import attention
from regard.ops.cache import KeyValueCache
from regard.ops.checks import one_of, require
from regard.ops.masks import Causal, Keys, Mask, Segments
from regard.ops.precision import statistics_dtype

Plan = Literal["fixed", "logsparse", "axial_rowmajor", "axial_vertical", "axial_horizontal"]


@dataclass(frozen=True)
class RowState:
    """Abstractions of the blocks that are complete, and the tokens of the next one."""

    spans: KeyValueCache
    open: Tokens


@dataclass(frozen=True)
class AxialState:
    """Keys and values of complete rows by column, and the tokens of the next row.

    Beside these the abstractions of complete rows by column (horizontal), or the largest features of the queries and
    of the keys of each column (vertical).
    """

    columns: KeyValueCache
    spans: KeyValueCache | None
    largest: tuple[Tensor, Tensor] | None
    open: Tokens


@dataclass(frozen=True)
class LogState:
    """All tokens: queries beside keys, and values."""

    tokens: KeyValueCache


@dataclass(frozen=True)
class CombinerState:
    """The state of each plan, and how many tokens were seen."""

    plans: tuple[RowState | AxialState | LogState, ...]
    length: int


@register(
    "combiner",
    paper="combiner",
    contract=replace(
        ATTENTION,
        patterns=("noncausal self", "causal self"),
        time="n*(min(n, block_size)+n/block_size)*d",
        memory="n*d",
        any_mask=False,
        exact=False,
        permutation=None,
        options=(
            OptionSet({"block_size": 4}),
            OptionSet({"plan": "logsparse", "dropout": 0.1}, {"time": "n*(1+log2(n))*d", "memory": "n*(1+log2(n))*d"}),
            OptionSet({"plan": "axial_rowmajor", "block_size": 4}),
            OptionSet({"plan": "axial_vertical", "block_size": 4}),
            OptionSet({"plan": "axial_horizontal", "block_size": 5}),
            # A key's bias adds the same to every score of a row, which softmax takes off again.
            OptionSet({"block_size": 5, "head_dim": 6, "bias": True, "dropout": 0.1}, {"frozen": ("key.bias",)}),
            OptionSet(
                {"plan": ("axial_rowmajor", "logsparse", "fixed"), "block_size": 8},
                {"time": "n*(block_size+n/block_size+log2(n))*d", "memory": "n*(1+log2(n))*d"},
            ),
        ),
    ),
)
class CombinerAttention(Attention):
    """Full attention at a sparse cost: to some tokens directly, to all others by abstractions of their spans.

    Args:
        plan: ``"fixed"``, ``"logsparse"``, ``"axial_rowmajor"``, ``"axial_vertical"`` or ``"axial_horizontal"``, or
            several of them for their mixture.
        block_size: number of tokens of a block, or of a row; about √n for the least work.
        dropout: probability of dropping a weight in training, in spans and between them.

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        plan: Plan | tuple[Plan, ...] = "fixed",
        block_size: int = 32,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, heads=heads, head_dim=head_dim, causal=causal, bias=bias, dropout=dropout, device=device, dtype=dtype
        )
        self.plans = plan if isinstance(plan, tuple) else (plan,)
        require(len(self.plans) > 0, self._name, "plan ()", "name one")
        for each in self.plans:
            one_of(self._name, "plan", each, get_args(Plan))
        require(block_size > 0, self._name, f"block_size {block_size}", "give a positive number of tokens")
        self.block_size = block_size
        if "axial_rowmajor" in self.plans:
            width = heads * self.head_dim
            factory = {"device": device, "dtype": dtype}
            self.row_output = nn.Linear(width, dim, bias=bias, **factory)
            self.row_norm = nn.LayerNorm(dim, eps=1e-6, **factory)
            self.row_key = nn.Linear(dim, width, bias=bias, **factory)
            for projection in (self.row_output, self.row_key):
                nn.init.xavier_uniform_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: None = None,
        *,
        mask: Mask | None = None,
        positions: None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself. `mask` may be a ``Padding``, or ``Segments``: each has blocks of its own."""
        query, key, value = self.project(x, context, mask, positions)
        return self.combine(self._attend(Tokens(x[:, None], query, key, value, value), mask))

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: None = None,
        *,
        mask: Mask | None = None,
        positions: None = None,
    ) -> tuple[Float[Tensor, "batch heads length length"], Float[Tensor, "batch heads length head_dim"]]:
        """The effective weights q(j|i) = p(j|Ω) p(Ω|i), which sum to 1, and the values."""
        query, key, value = self.project(x, context, mask, positions)
        each = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(*value.shape[:2], -1, -1)
        return self._attend(Tokens(x[:, None], query, key, value, each), mask), value

    def init_state(self, batch: int) -> CombinerState:
        weight, size = self.key.weight, self.block_size
        factory = {"device": weight.device, "dtype": weight.dtype}
        none = torch.empty(batch, self.heads, 0, self.head_dim, **factory)
        opened = Tokens(torch.empty(batch, 1, 0, self.dim, **factory), none, none, none, none)

        def start(plan: Plan) -> RowState | AxialState | LogState:
            if plan == "logsparse":
                doubled = KeyValueCache.empty(batch, self.heads, 2 * self.head_dim, value_dim=self.head_dim, **factory)
                return LogState(doubled)
            heads = self.heads * (1 if plan == "fixed" else size)
            cache = KeyValueCache.empty(batch, heads, self.head_dim, **factory)
            if plan == "axial_horizontal":
                return AxialState(cache, KeyValueCache.empty(batch, heads, self.head_dim, **factory), None, opened)
            if plan == "axial_vertical":
                largest = torch.zeros(batch, self.heads, size, self.head_dim, **factory)
                return AxialState(cache, None, (largest, largest), opened)
            return RowState(cache, opened)

        return CombinerState(tuple(start(plan) for plan in self.plans), 0)

    def step(self, x: Float[Tensor, "batch new dim"], state: CombinerState) -> tuple[Tensor, CombinerState]:
        first = state.plans[0]
        batch = first.tokens.key.shape[0] if isinstance(first, LogState) else first.open.key.shape[0]
        query, key, value = self.project_step(x, state.length, batch)
        new = Tokens(x[:, None], query, key, value, value)
        outputs, after = [], []
        for plan, old in zip(self.plans, state.plans, strict=True):
            if isinstance(old, LogState):
                mixed, new_state = self._step_log(new, old)
            elif isinstance(old, AxialState):
                mixed, new_state = self._step_axial(new, old)
            else:
                mixed, new_state = self._step_rows(plan, new, old)
            outputs.append(mixed)
            after.append(new_state)
        return self.combine(torch.stack(outputs).mean(0)), CombinerState(tuple(after), state.length + x.shape[1])

    @property
    def _dropped(self) -> float:
        return self.dropout if self.training else 0.0

    def _attend(self, tokens: Tokens, mask: Mask | None) -> Float[Tensor, "batch heads length carried_dim"]:
        """The mean over the plans."""
        (batch, heads, length), device = tokens.query.shape[:3], tokens.query.device
        if mask is not None:
            mask.validate(batch, heads, length, length)
        require(
            not isinstance(mask, Segments) or mask.query_ids is None,
            self._name,
            "Segments with query_ids in self-attention",
            "leave query_ids out: queries and keys are the same tokens",
        )
        outputs = []
        for plan in self.plans:
            slots = Slots.of(length, mask, device, None if plan == "logsparse" else self.block_size)
            laid = tokens.each(slots.lay)
            mixed = self._log(laid, 0, slots) if plan == "logsparse" else self._rows(plan, laid, slots)
            outputs.append(slots.take(mixed, length))
        return torch.stack(outputs).mean(0)

    def _rows(self, plan: Plan, tokens: Tokens, slots: Slots) -> Tensor:
        """Blocks or rows: the own one directly, the others by abstractions."""
        size = self.block_size
        # Nothing that is causal looks at an empty slot, or at a block with one.
        real = None if self.causal or slots.full else slots.real
        mask: Mask = EARLIER if self.causal else OTHERS
        if plan in ("axial_vertical", "axial_horizontal"):
            return together(self._axial(plan, tokens, slots, mask, real))
        if slots.sequence is not None:
            mask = mask & Segments(slots.of_rows(slots.sequence, size))
        if real is not None:
            mask = mask & Keys(slots.of_rows(real, size))
        parts = [
            own_span(tokens, size, self.causal, real, self._dropped),
            other_spans(tokens.query, self._abstract(plan, tokens, real, self._dropped), size, mask, self._dropped),
        ]
        return together(parts)

    def _axial(self, plan: Plan, tokens: Tokens, slots: Slots, mask: Mask, real: Tensor | None) -> list[Part]:
        """The own row and the own column directly, and the others of either kind by abstractions."""
        size, dropped = self.block_size, self._dropped
        mask = of_columns(mask, slots, size, self.heads * size)
        parts = [
            own_span(tokens, size, self.causal, real, dropped),
            own_column(tokens, size, mask, real, dropped),
        ]
        if plan == "axial_horizontal":
            spans, present = row_but_one(tokens, size, real, dropped)
            return [*parts, own_column(spans, size, mask, present, dropped)]
        spans, present = column_but_one(tokens, size, mask, slots.sequence, real, self.causal, dropped)
        return [*parts, others_in_row(tokens.query, spans, size, present, dropped)]

    def _abstract(self, plan: Plan, tokens: Tokens, real: Tensor | None, dropout: float) -> Span:
        """One abstraction a block, or one a token, which stands in its column, for the plan by rows."""
        size = self.block_size
        if plan == "fixed":
            return abstraction(tokens, size, real, dropout)
        batch, heads, slots = tokens.query.shape[:3]
        mask = None if real is None else real_keys(real, size, batch, heads)
        mixes_values = tokens.carried is tokens.value
        mixed = tokens.value if mixes_values else torch.cat([tokens.value, tokens.carried], dim=-1)
        folded = (by_span(each, size) for each in (tokens.query, tokens.key, mixed))
        out = attention(*folded, mask=mask, dropout=dropout).view(batch, heads, slots, -1)
        value, carried = (out, out) if mixes_values else out.split([self.head_dim, out.shape[-1] - self.head_dim], -1)
        row = self.row_output(rearrange(value, "batch heads slots width -> batch slots (heads width)"))
        row = self.row_norm(tokens.x[:, 0] + F.dropout(row, dropout))
        key = rearrange(self.row_key(row), "batch slots (heads width) -> batch heads slots width", heads=heads)
        return Span(by_column(key, size), by_column(carried, size))

    def _step_rows(self, plan: Plan, new: Tokens, state: RowState) -> tuple[Tensor, RowState]:
        size, count = self.block_size, new.query.shape[2]
        tokens = state.open.followed_by(new)
        length = tokens.query.shape[2]
        done = length // size * size
        spans = state.spans
        if done:
            complete = tokens.each(lambda each: each[:, :, :done])
            spans = spans.append(*self._abstract(plan, complete, None, 0.0))
        laid = tokens.each(lambda each: F.pad(each, (0, 0, 0, -length % size)))
        parts = [own_span(laid, size, True, None, 0.0)]
        if spans.length:
            # Rows stand at the end of the spans; an incomplete one has no span of its own to leave out.
            mask = Causal() if length > done else EARLIER
            parts.append(other_spans(laid.query, Span(spans.key, spans.value), size, mask, 0.0))
        mixed = together(parts)[:, :, length - count : length]
        # A copy: a view would keep what it looks into.
        return mixed, RowState(spans, tokens.each(lambda each: each[:, :, done:].clone()))

    def _step_axial(self, new: Tokens, state: AxialState) -> tuple[Tensor, AxialState]:
        size, count = self.block_size, new.query.shape[2]
        tokens = state.open.followed_by(new)
        length = tokens.query.shape[2]
        done = length // size * size
        columns, spans, largest = state.columns, state.spans, state.largest
        laid = tokens.each(lambda each: F.pad(each, (0, 0, 0, -length % size)))
        complete = tokens.each(lambda each: each[:, :, :done])
        if done:
            columns = columns.append(by_column(complete.key, size), by_column(complete.value, size))
        mask = Causal() if length > done else EARLIER
        parts = [own_span(laid, size, True, None, 0.0)]
        if columns.length:
            parts.append(other_spans(laid.query, Span(columns.key, columns.value), size, mask, 0.0))
        if spans is not None:
            if done:
                found, _ = row_but_one(complete, size, None, 0.0)
                spans = spans.append(by_column(found.key, size), by_column(found.carried, size))
            if spans.length and size > 1:
                parts.append(other_spans(laid.query, Span(spans.key, spans.value), size, mask, 0.0))
        if largest is not None and columns.length:
            before = state.columns.length > 0
            query, key = (
                above(each, size, past if before else None)
                for each, past in zip((laid.query, laid.key), largest, strict=True)
            )
            part = other_spans(query, Span(columns.key, columns.value), size, mask, 0.0)
            present = part.lse[:, 0] > -torch.inf
            parts.append(others_in_row(laid.query, laid._replace(key=key, carried=part.out), size, present, 0.0))
            if done:
                largest = tuple(
                    torch.cat([past.unsqueeze(2)] * before + [each.unflatten(2, (-1, size))], dim=2).amax(2)
                    for past, each in zip(largest, (complete.query, complete.key), strict=True)
                )
        mixed = together(parts)[:, :, length - count : length]
        opened = tokens.each(lambda each: each[:, :, done:].clone())
        return mixed, AxialState(columns, spans, largest, opened)  # pyright: ignore[reportArgumentType] two of them

    def _log(self, tokens: Tokens, start: int, slots: Slots | None) -> Tensor:
        """For slots from `start` on: themselves, and the neighbours of their blocks of 1, 2, 4, … slots."""
        query, count = tokens.query[:, :, start:], tokens.query.shape[2]
        index = torch.arange(start, count, device=query.device)
        real = None if self.causal or slots is None or slots.full else slots.real
        dropped = 0.0 if slots is None else self._dropped
        scores, values = [self._scores(query, tokens.key[:, :, start:])], [tokens.carried[:, :, start:]]
        for level in range((count - 1).bit_length()):
            size, neighbour = 1 << level, (index >> level) ^ 1
            first, stop = 0, -(-count // size)
            if self.causal:
                first, stop = max(0, (start >> level) - 1), (count - 1) >> level
            piece = tokens.each(lambda each, low=first * size, high=stop * size: each[:, :, low:high])
            span = abstraction(piece, size, None if real is None else real[:, : stop * size], dropped)
            seen = neighbour < index >> level if self.causal else neighbour < stop
            at = (neighbour - first).clamp(0, stop - first - 1)
            seen = seen[None]
            if real is not None:
                seen = seen & real.unflatten(1, (-1, size)).any(-1)[:, at]
            if slots is not None and slots.extent is not None:
                seen = seen & (slots.extent > size)
            score = self._scores(query, span.key[:, :, at])
            scores.append(score.masked_fill(~seen[:, None], -torch.inf))
            values.append(span.value[:, :, at])
        return together([Part(value, score) for value, score in zip(values, scores, strict=True)], dropped)

    def _scores(self, query: Tensor, key: Tensor) -> Float[Tensor, "batch heads length"]:
        dtype = statistics_dtype(query.dtype)
        return (query.to(dtype) * key.to(dtype)).sum(-1) * self.head_dim**-0.5

    def _step_log(self, new: Tokens, state: LogState) -> tuple[Tensor, LogState]:
        cache = state.tokens.append(torch.cat([new.query, new.key], dim=-1), new.value)
        query, key = cache.key.chunk(2, dim=-1)
        tokens = Tokens(new.x, query, key, cache.value, cache.value)
        return self._log(tokens, state.tokens.length, None), LogState(cache)
