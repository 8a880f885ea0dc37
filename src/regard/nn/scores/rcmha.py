"""Relative convolutional multi-head attention (RCMHA). "RCMHA: Relative Convolutional Multi-Head Attention for Natural
Language Modelling", Sugiharto et al., 2023, arXiv 2308.03429.

    Q, K, V = DConv(x W_q), DConv(x W_k), DConv(x W_v)          DConv(z)_t = Σ_{τ<3} w_τ ⊙ z_{t−2+τ} + b
    s_ij    = (Q_i K_jᵀ + u K_jᵀ + Q_i R_{j−i}ᵀ + S_{j−i}) / √d_h,      y = softmax(s) V W_o

The convolution is depthwise and causal, of width 3, with one filter per feature of a head that all heads share. The
score is Transformer-XL's: content with content, u with content, content with distance, and distance alone, where S is
learned in place of v R. R and S are tables per head; u, R and S start at zero.

Cost: time O(n m d), memory O((n + m) d): Q R is computed a tile at a time and shifted there (`RelativeScores`).

Differences: distances beyond `max_distance` share the outermost entry; the release has 4096 and no more. The filter of
keys has no bias, where the softmax takes it off again. The convolution is causal whether attention is or not, as in the
release; it looks beyond what a mask allows, so that only padding and packing are taken, within which it stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, CROSS, Attention
from regard.ops.attention import attention, attention_weights
from regard.ops.biases import Bias
from regard.ops.cache import KeyValueCache
from regard.ops.checks import require
from regard.ops.indices import Span
from regard.ops.masks import Mask, Segments
from regard.ops.precision import statistics_dtype

WIDTH = 3
"""Of the convolutions."""


@dataclass(frozen=True, eq=False, repr=False)
class RelativeScores(Bias):
    """``query_i · table_{j−i} + level_{j−i}``, the distance clipped to the tables."""

    query: Float[Tensor, "batch heads queries head_dim"]
    table: Float[Tensor, "heads distances head_dim"]
    level: Float[Tensor, "heads distances"]
    keys: Int[Tensor, "keys 0"]
    """Empty: its shape says how many keys there are, and with it where the queries stand."""

    def score(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        entry = self.entry(key - query)
        product = self.query[batch, head, query - self.start] * self.table[head, entry]
        return product.sum(-1) + self.level[head, entry]

    def tile(self, batch: Span, heads: Span, queries: Span, keys: Span, device: torch.device) -> Tensor:
        height, width = queries[1] - queries[0], keys[1] - keys[0]
        rows = slice(queries[0] - self.start, queries[1] - self.start)
        query = self.query[batch[0] : batch[1], heads[0] : heads[1], rows]
        # One distance more than there are, so that a row is never empty once it is shifted.
        entry = self.entry(torch.arange(keys[0] - queries[1] + 1, keys[1] - queries[0] + 1, device=device))
        table, level = (part[heads[0] : heads[1]][:, entry] for part in (self.table, self.level))
        scores = query @ table.mT + level[:, None]
        # Row i begins at distance height − 1 − i: read with rows one entry shorter, each starts one earlier.
        return scores.flatten(-2)[..., height - 1 : -1].unflatten(-1, (height, -1))[..., :width]

    def entry(self, distance: Tensor) -> Tensor:
        reach = self.table.shape[1] // 2
        return distance.clamp(-reach, reach) + reach

    @property
    def start(self) -> int:
        """Where the first query stands among the keys."""
        return self.keys.shape[0] - self.query.shape[2]


@dataclass(frozen=True)
class RelativeConvState:
    """Convolved keys and values, and the last inputs of the three convolutions."""

    cache: KeyValueCache
    tails: tuple[Tensor, ...]


@register(
    "rcmha",
    paper="rcmha",
    contract=replace(
        ATTENTION,
        any_mask=False,
        permutation=None,
        options=(OptionSet({"max_distance": 5, "head_dim": 6, "dropout": 0.1}), CROSS),
    ),
)
class RelativeConvAttention(Attention):
    """Depthwise convolutions behind the projections and Transformer-XL's relative score.

    Args:
        max_distance: distance up to which R and S have entries of their own.

    The other arguments are those of `Attention`. Values and output have biases, queries and keys none.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        max_distance: int = 4096,
        dropout: float = 0.0,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            head_dim=head_dim,
            causal=causal,
            bias=True,
            dropout=dropout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )
        require(max_distance > 0, self._name, f"max_distance {max_distance}", "give a positive number of positions")
        self.max_distance = max_distance
        for projection in (self.query, self.key):
            projection.register_parameter("bias", None)
        factory = {"device": device, "dtype": dtype}
        width = self.head_dim
        self.query_filter = nn.Conv1d(width, width, WIDTH, groups=width, **factory)
        self.key_filter = nn.Conv1d(width, width, WIDTH, groups=width, bias=False, **factory)
        self.value_filter = nn.Conv1d(width, width, WIDTH, groups=width, **factory)
        self.content = nn.Parameter(torch.zeros(heads, 1, width, **factory))
        self.table = nn.Parameter(torch.zeros(heads, 2 * max_distance + 1, width, **factory))
        self.level = nn.Parameter(torch.zeros(heads, 2 * max_distance + 1, **factory))

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself, or to `context`, at whose end the queries then stand.

        Raises ValueError for positions and for any mask but ``Padding`` and ``Segments``.
        """
        query, key, value = self.project(x, context, mask, positions)
        dropout = self.dropout if self.training else 0.0
        return self.combine(
            attention(
                query + self.content,
                key,
                value,
                mask=self.full_mask(mask),
                bias=self.relative_scores(query, key),
                dropout=dropout,
            )
        )

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        query, key, value = self.project(x, context, mask, positions)
        weights = attention_weights(
            query + self.content, key, mask=self.full_mask(mask), bias=self.relative_scores(query, key)
        )
        return weights.to(value.dtype), value

    def init_state(self, batch: int) -> RelativeConvState:
        tail = self.query.weight.new_zeros(batch, self.heads, WIDTH - 1, self.head_dim)
        return RelativeConvState(super().init_state(batch), (tail, tail, tail))

    def step(
        self, x: Float[Tensor, "batch new dim"], state: RelativeConvState
    ) -> tuple[Float[Tensor, "batch new dim"], RelativeConvState]:
        self.check_step(x, self.dim, state.tails[0].shape[0])
        inputs = [
            torch.cat([tail, heads], dim=2)
            for tail, heads in zip(state.tails, super().project(x, None, None, None), strict=True)
        ]
        filters = self.query_filter, self.key_filter, self.value_filter
        query, key, value = (convolve(own, heads, None) for own, heads in zip(filters, inputs, strict=True))
        cache = state.cache.append(key, value)
        mixed = attention(
            query + self.content,
            cache.key,
            cache.value,
            mask=self.full_mask(None),
            bias=self.relative_scores(query, cache.key),
        )
        # Copies, so that a state keeps no more alive than it needs.
        tails = tuple(heads[:, :, 1 - WIDTH :].clone() for heads in inputs)
        return self.combine(mixed), RelativeConvState(cache, tails)

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None, *, seen: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            F.pad(heads, (0, 0, WIDTH - 1, 0)) for heads in super().project(x, context, mask, positions, seen=seen)
        )
        of_queries = of_keys = None
        if isinstance(mask, Segments):
            mask.validate(x.shape[0], self.heads, query.shape[2] - WIDTH + 1, key.shape[2] - WIDTH + 1)
            of_keys = mask.places().to(x.device)
            of_queries = of_keys if mask.query_ids is None else Segments(mask.query_ids).places().to(x.device)
            of_queries = of_queries[..., of_queries.shape[-1] - x.shape[1] :]
        return (
            convolve(self.query_filter, query, of_queries),
            convolve(self.key_filter, key, of_keys),
            convolve(self.value_filter, value, of_keys),
        )

    def relative_scores(self, query: Tensor, key: Tensor) -> RelativeScores:
        """The terms of distance, scaled like the others."""
        precise, scale = statistics_dtype(query.dtype), self.head_dim**-0.5
        keys = torch.empty(key.shape[2], 0, dtype=torch.long, device=key.device)
        return RelativeScores(query.to(precise) * scale, self.table.to(precise), self.level.to(precise) * scale, keys)


def convolve(
    own: nn.Conv1d,
    heads: Float[Tensor, "batch heads length+2 head_dim"],
    places: Int[Tensor, "*batch length"] | None,
) -> Float[Tensor, "batch heads length head_dim"]:
    """The filter over heads with two more tokens in front; `places` in their sequence, before which is nothing."""
    windows = heads.unfold(2, WIDTH, 1)
    if places is not None:
        before = places[..., None] < torch.arange(WIDTH - 1, -1, -1, device=places.device)
        windows = windows.masked_fill((before if before.ndim == 2 else before[:, None])[..., None, :], 0.0)
    out = torch.einsum("bhndw,dw->bhnd", windows, own.weight[:, 0])
    return out if own.bias is None else out + own.bias
