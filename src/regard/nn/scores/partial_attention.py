"""Partial attention. "Decoder-Only or Encoder-Decoder? Interpreting Language Model as a Regularized Encoder-Decoder",
Fu et al., 2023, arXiv 2304.04052.

A row is a source of s tokens and a target that goes on from it. Attention over both spreads over more and more target
tokens, and less and less of it falls on the source; a second one sees the source alone, at every position:

    x   = x + e_source or e_target                                      language embedding (`language`)
    a   = softmax(Q Kᵀ / √d_h + Mask) V W^O                             causal attention over source and target
    h   = norm(x + a)                                                   `after`; without it h = x
    P   = P_1 + P_1 W_2,   P_1 = tanh(h_{1…s} W_1)                      F_P (`feed_forward`); without it P = h_{1…s}
    y   = a + softmax(Q_P K_Pᵀ / √d_h + Mask_P) V_P W_P^O               Q_P = h W_P^Q,  K_P = P W_P^K,  V_P = P W_P^V

Positions are separate: rotary ones count from the start of the source in the source, of the target in the target.
With ``causal=True`` a source token sees, in both attentions, what came before it, so that the row can be read token by
token; with ``causal=False`` it sees the whole source, as an encoder's does. Target tokens are causal in either.

Cost: time O(n (n + s) d), memory O(n d). Decoding keeps the keys and values of s tokens more, however long the target.

Source: no code of the authors is public. The paper's abstract and summaries of it name the separate attention to the
source, separate positional encoding and language embeddings. The equations of h and P follow an independent
implementation (github.com/christianThardy/Partial-Attention-Language-Model) and could not be compared with the paper:
whether the partial attention stands behind the self-attention or beside it, whether F_P makes the source's keys or
follows the partial attention, its activation, the norm, and whether the source sees itself whole.

Differences: language embeddings and positions belong to the layer, in the paper to the model's input, and the residual
that h is made of is the layer's own input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, ROTARY, Attention, Position
from regard.ops.attention import attention, attention_weights
from regard.ops.cache import KeyValueCache
from regard.ops.checks import one_of, require
from regard.ops.masks import Causal, Keys, Mask, Prefix, Window, segments_of
from regard.ops.positions import rotary

SourceLength = int | Int[Tensor, " batch"]


@dataclass(frozen=True)
class PartialState:
    """Keys and values of all tokens, those of the source for the partial attention, and how long the source is."""

    cache: KeyValueCache
    source: KeyValueCache
    source_length: SourceLength


class Row(NamedTuple):
    """Tokens with their language embedding, which of them are source, and how far each is into its part."""

    x: Float[Tensor, "batch length dim"]
    source: Bool[Tensor, "*batch length"]
    places: Int[Tensor, "*batch length"]


class Part(NamedTuple):
    """One of the two attentions."""

    query: Float[Tensor, "batch heads length head_dim"]
    key: Float[Tensor, "batch heads keys head_dim"]
    value: Float[Tensor, "batch heads keys head_dim"]
    mask: Mask | None


class FeedForward(nn.Module):
    """``P_1 + P_1 W_2`` with ``P_1 = tanh(x W_1)``, biases included."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(dim, dim, device=device, dtype=dtype) for _ in range(2))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        first = self.first(x).tanh()
        return first + self.second(first)


@register(
    "partial_attention",
    paper="partial_attention_lm",
    contract=replace(
        ATTENTION,
        patterns=("noncausal self", "causal self"),
        memory="n*d",
        # What a source token has read goes into its keys: a mask of pairs cannot forbid that.
        any_mask=False,
        permutation=None,
        options=(
            replace(ROTARY, arguments={**ROTARY.arguments, "source_length": 5}),
            OptionSet(
                {"source_length": 5, "after": False, "feed_forward": False, "language": False}, {"any_mask": True}
            ),
            OptionSet(
                {"source_length": 3, "after": False, "position": "rotary", "head_dim": 6, "dropout": 0.1},
                {"any_mask": True, "positions": True},
            ),
            OptionSet({"source_length": 7, "feed_forward": False}),
        ),
    ),
)
class PartialAttention(Attention):
    """Attention over a source and what follows, and a second one to the source alone.

    Args:
        dim: width of the tokens.
        heads: number of heads of either attention.
        head_dim: width of a head; ``dim / heads`` by default.
        causal: whether a source token sees only what came before; otherwise it sees the whole source.
        position: None or ``"rotary"``, separate for source and target.
        source_length: how many tokens, the first of every row or packed sequence, are the source, where a call does not
            say.
        after: whether the partial attention reads the tokens after the self-attention, and not those before it.
        feed_forward: whether the source passes through F_P on its way to keys and values.
        language: whether a learned vector is added to source tokens and another to target tokens.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        position: Position | None = None,
        source_length: int = 16,
        after: bool = True,
        feed_forward: bool = True,
        language: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if position is not None:
            one_of(self._name, "position", position, ("rotary",))
        factory = {"device": device, "dtype": dtype}
        shared = {"heads": heads, "head_dim": head_dim, "position": position, "dropout": dropout, **factory}
        super().__init__(dim, causal=causal, **shared)
        self.check_source_length(source_length, None)
        self.source_length, self.after = source_length, after
        self.partial = Attention(dim, **shared)
        self.norm = nn.LayerNorm(dim, **factory) if after else None
        self.feed_forward = FeedForward(dim, **factory) if feed_forward else None
        self.language = nn.Parameter(0.02 * torch.randn(2, dim, **factory)) if language else None

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
        source_length: SourceLength | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from every token of a source and its target; `source_length` is one number or one per sample."""
        row, own, positions, length = self.read(x, context, mask, positions, source_length)
        dropout = self.dropout if self.training else 0.0
        attended = self.combine_own(attention(*own[:3], mask=own.mask, dropout=dropout))
        partial = self.partial_part(row, attended, mask, positions, length)
        return attended + self.partial.combine(attention(*partial[:3], mask=partial.mask, dropout=dropout))

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
        source_length: SourceLength | None = None,
    ) -> tuple[Float[Tensor, "batch both_heads length keys"], Float[Tensor, "batch both_heads keys head_dim"]]:
        """Weights and values of the self-attention's heads and, behind them, of the partial attention's."""
        row, own, positions, length = self.read(x, context, mask, positions, source_length)
        weights = attention_weights(own.query, own.key, mask=own.mask).to(x.dtype)
        partial = self.partial_part(row, self.combine_own(weights @ own.value), mask, positions, length)
        of_source = attention_weights(partial.query, partial.key, mask=partial.mask).to(x.dtype)
        missing = x.shape[1] - partial.key.shape[2]
        value = F.pad(partial.value, (0, 0, 0, missing))
        return torch.cat([weights, F.pad(of_source, (0, missing))], dim=1), torch.cat([own.value, value], dim=1)

    def combine(self, mixed: Float[Tensor, "batch both_heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        """Concatenate and project the heads of each attention, and add."""
        own, partial = mixed.chunk(2, dim=1)
        return self.combine_own(own) + self.partial.combine(partial)

    def combine_own(self, mixed: Float[Tensor, "batch heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        """The self-attention's output a."""
        return super().combine(mixed)

    def init_state(self, batch: int, *, source_length: SourceLength | None = None) -> PartialState:
        """The state before the first token; the length of the source may be given as in `forward`."""
        length = self.source_length if source_length is None else source_length
        self.check_source_length(length, batch)
        return PartialState(super().init_state(batch), super().init_state(batch), length)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: PartialState
    ) -> tuple[Float[Tensor, "batch new dim"], PartialState]:
        self.check_step(x, self.dim, state.cache.key.shape[0])
        seen, length = state.cache.length, state.source_length
        row, own, positions, _ = self.read(x, None, None, None, length, seen)
        cache, source = state.cache.append(own.key, own.value), state.source
        attended = self.combine_own(attention(own.query, cache.key, cache.value, mask=own.mask))
        partial = self.partial_part(row, attended, None, positions, length, seen)
        if partial.key.shape[2] > 0:
            source = source.append(partial.key, partial.value)
        mixed = attention(partial.query, source.key, source.value, mask=partial.mask)
        return attended + self.partial.combine(mixed), PartialState(cache, source, length)

    def read(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Mask | None,
        positions: Tensor | None,
        source_length: SourceLength | None,
        seen: int = 0,
    ) -> tuple[Row, Part, Tensor | None, SourceLength]:
        """Checked arguments as the row, its self-attention, its separate positions and the length of its source."""
        self.check_tokens(x, context, mask, positions, takes_positions=self.position == "rotary")
        self.check_width(x, self.dim)
        batch, tokens = x.shape[:2]
        length = self.source_length if source_length is None else source_length
        self.check_source_length(length, batch)
        if mask is not None:
            mask.validate(batch, self.heads, tokens, tokens)
        row = self.row(x, mask, length, seen)
        positions = self.separate(positions, row.places) if self.position == "rotary" else None
        own: Mask = Causal()
        if not self.causal:
            own = own | (Prefix(length) if mask is None else Keys(row.source))
        part = Part(*self.project(row.x, None, mask, positions), own if mask is None else own & mask)
        return row, part, positions, length

    def row(self, x: Tensor, mask: Mask | None, length: SourceLength, seen: int) -> Row:
        """Who is source and who is target; every packed sequence begins with a source of its own."""
        segments = segments_of(mask)
        if segments is None:
            places = torch.arange(seen, seen + x.shape[1], device=x.device)
        else:
            places = segments.places().to(x.device)
        start = length.to(x.device)[:, None] if isinstance(length, Tensor) else length
        source = places < start
        if self.language is not None:
            x = x + torch.where(source[..., None], self.language[0], self.language[1])
        return Row(x, source, torch.where(source, places, places - start))

    def separate(self, positions: Tensor | None, places: Tensor) -> Tensor:
        """Positions counted from the first token of the source for the source, of the target for the target."""
        if positions is None:
            return places
        starts = torch.arange(places.shape[-1], device=places.device) - places
        if positions.ndim < starts.ndim:
            positions = positions.expand_as(starts)
        elif starts.ndim < positions.ndim:
            starts = starts.expand_as(positions)
        return positions - positions.gather(-1, starts)

    def partial_part(
        self,
        row: Row,
        attended: Tensor,
        mask: Mask | None,
        positions: Tensor | None,
        length: SourceLength,
        seen: int = 0,
    ) -> Part:
        """The partial attention of tokens that `seen` others came before, with the keys of the source among them."""
        h = row.x if self.norm is None else self.norm(row.x + attended)
        tokens = h.shape[1]
        if mask is not None:
            kept, sources = tokens, Keys(row.source) & mask
            allowed = sources & Causal() if self.causal else sources
        else:
            longest = int(length.max()) if isinstance(length, Tensor) else length
            known = min(longest, seen + tokens)
            kept = max(known - seen, 0)
            # The queries stand at the end of the row, beyond the end of these keys.
            ahead = seen + tokens - known
            allowed = Window(seen + tokens, ahead) if self.causal and seen + 1 < known else None
            if isinstance(length, Tensor):
                allowed = Prefix(length) if allowed is None else allowed & Prefix(length)
        source = h[:, :kept]
        query, key, value = self.partial.split(h, source if self.feed_forward is None else self.feed_forward(source))
        if positions is not None:
            query, key = rotary(query, positions), rotary(key, positions[..., :kept])
        return Part(query, key, value, allowed)

    def _check_mask(self, mask: Mask) -> None:
        # Beside the self-attention no token carries what it has read, so that every mask is obeyed.
        if self.after or not isinstance(mask, Mask):
            super()._check_mask(mask)

    def check_source_length(self, length: SourceLength, batch: int | None) -> None:
        """Raise ValueError unless this is a positive number or, for a batch, one integer per sample."""
        if not isinstance(length, Tensor):
            require(length > 0, self._name, f"source_length {length}", "give a positive number of tokens")
            return
        require(
            batch is not None and tuple(length.shape) == (batch,) and not length.is_floating_point(),
            self._name,
            lambda: f"source_length of shape {tuple(length.shape)} and dtype {length.dtype}",
            lambda: f"give a number, or to a call one integer per sample: shape ({batch},)",
        )
