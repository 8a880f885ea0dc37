"""Additive, general and location-based attention: alignment functions of "An Attentive Survey of Attention Models",
Chaudhari, Mithal, Polatkan & Ramanath, 2019, arXiv 1904.02874.

    additive   s_ij = v · tanh(W_1 q_i + W_2 k_j + b)      Bahdanau, Cho & Bengio, 2014, arXiv 1409.0473
    general    s_ij = (W q_i + b) · k_j                    Luong, Pham & Manning, 2015, arXiv 1508.04025
    location   s_ij = (W q_i)_j, whatever k_j is           the same
    coverage   s_ij = v · tanh(W_1 q_i + W_2 k_j + w_c c_ij + b),   c_ij = Σ_{i' < i} a_i'j
               loss_i = Σ_j min(a_ij, c_ij)                See, Liu & Manning, 2017, arXiv 1704.04368,
                                                           after Tu et al., 2016, arXiv 1601.04811

q_i are the tokens and k_j those of the context, and every head has W, v, b and w_c of its own. Softmax a, values and
output are multi-head attention's. The survey's "concat" is additive attention with W = [W_1, W_2], its "biased general"
is general attention with b. Others of its table are elsewhere: (scaled) dot product in `multi_head`, deep in
`neural_attention`.

Cost: time O(n m d), memory O((n + m) d). General: heads compare whole tokens, time O(n m d h), memory O(n d h + m d).
Coverage: a row of weights needs all rows before it, so that queries are walked one by one, in n steps of O(m d), and
training keeps O(n m d).

Differences: the W of location attention is, in each head, a row per position times the query projection: of full rank
with one head. As in its source keys beyond `max_length` get nothing; positions of packed sequences start anew. General
and location attention have no scale. General attention's W starts smaller than the source's, which was made for the
states of an LSTM: tokens of variance 1 get scores of variance 1. Coverage is counted for each head. The activated
general, the cosine and the feature-based function of the survey's table, each of a single model, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, CROSS, Attention
from regard.nn.pair_attention import PairAttention
from regard.ops.attention import attention, attention_weights
from regard.ops.biases import AdditiveScores
from regard.ops.cache import KeyValueCache
from regard.ops.checks import require
from regard.ops.masks import Causal, Keys, Mask, Padding, Segments, Sinks, segments_of
from regard.ops.precision import statistics_dtype


def coverage_loss(weights: Float[Tensor, "*batch queries keys"]) -> Float[Tensor, "*batch queries"]:
    """``Σ_j min(a_ij, c_ij)`` of every query: how much of its attention goes where earlier queries' went.

    0 exactly where no key of positive weight had any before. `weights` are those of `attention_map`.
    """
    before = F.pad(weights.cumsum(-2)[..., :-1, :], (0, 0, 1, 0))
    return torch.minimum(weights, before).sum(-1)


@dataclass(frozen=True)
class CoverageState:
    """Keys and values seen so far, and the attention each key has had."""

    cache: KeyValueCache
    spent: Float[Tensor, "batch heads length"]


@register(
    "additive_attention",
    paper="attentive_survey",
    contract=replace(
        ATTENTION,
        options=(
            OptionSet({"hidden_dim": 6, "head_dim": 5, "dropout": 0.1, "bias": True}),
            CROSS,
            OptionSet(
                {"coverage": True, "dropout": 0.1},
                # Noncausal self-attention has no order of time. What an earlier query may look at enters the coverage
                # that a later one sees: through masks that part them in another way than sequences it would leak.
                {
                    "patterns": ("causal self", "noncausal cross", "causal cross"),
                    "memory": "n*m*d",
                    "any_mask": False,
                    "permutation": None,
                },
            ),
        ),
    ),
)
class AdditiveAttention(PairAttention):
    """A layer with tanh scores each pair of query and key; with coverage it knows what was attended to before.

    Args:
        hidden_dim: width of that layer in each head; `head_dim` by default.
        coverage: whether a key's score depends on the attention it had from earlier queries. `coverage_loss` of the
            weights is the loss that goes with it.
        bias: whether the layer and the other projections have biases.

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        causal: bool = False,
        coverage: bool = False,
        bias: bool = False,
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
            bias=bias,
            dropout=dropout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )
        factory = {"device": device, "dtype": dtype}
        self.hidden_dim = self.head_dim if hidden_dim is None else hidden_dim
        require(self.hidden_dim > 0, self._name, f"hidden_dim {hidden_dim}", "give a positive width")
        if self.hidden_dim != self.head_dim:
            self.query = nn.Linear(dim, heads * self.hidden_dim, bias=bias, **factory)
            self.key = nn.Linear(self.context_dim, heads * self.hidden_dim, bias=bias, **factory)
        self.vector = nn.Parameter(torch.empty(heads, self.hidden_dim, **factory))
        self.coverage = nn.Parameter(torch.empty(heads, self.hidden_dim, **factory)) if coverage else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Bahdanau's: v and biases 0, the rest of the score normal with deviation 0.001. Glorot-uniform elsewhere."""
        super().reset_parameters()
        for projection in (self.query, self.key):
            nn.init.normal_(projection.weight, std=1e-3)
        for name, own in self.named_parameters(recurse=False):  # none yet when `Attention` calls this
            nn.init.normal_(own, std=1e-3)
            if name == "vector":
                nn.init.zeros_(own)

    @property
    def score_dim(self) -> int:
        return self.hidden_dim

    def scores(self, query: Tensor, key: Tensor) -> AdditiveScores:
        """The layer's score of each pair, in at least float32."""
        precise = statistics_dtype(query.dtype)
        return AdditiveScores(query.to(precise), key.to(precise), self.vector.to(precise))

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None, *, seen: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        require(
            self.coverage is None or self.causal or context is not None,
            self._name,
            "coverage=True with causal=False and no context",
            "build with causal=True or give a context: coverage needs queries that come one after the other",
        )
        require(
            self.coverage is None or mask is None or isinstance(mask, Padding | Segments),
            self._name,
            f"mask {type(mask).__name__} with coverage=True",
            "give Padding or Segments: others would leak through the attention that earlier queries paid",
        )
        return super().project(x, context, mask, positions, seen=seen)

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        if self.coverage is None:
            return super().attention_map(x, context, mask=mask, positions=positions)
        query, key, value = self.project(x, context, mask, positions)
        return self.cover(query, key, mask)[0].to(value.dtype), value

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, dropout: float) -> Tensor:
        if self.coverage is None:
            return super().mix(query, key, value, mask, dropout)
        weights, _ = self.cover(query, key, mask)
        return F.dropout(weights.to(value.dtype), dropout) @ value

    def cover(
        self, query: Tensor, key: Tensor, mask: Mask | None, spent: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch heads queries keys"], Float[Tensor, "batch heads keys"]]:
        """The weights, query by query, and what each key has had after the last one (`spent`: before the first)."""
        assert self.coverage is not None
        (batch, heads, queries, _), keys = query.shape, key.shape[2]
        mask, precise, rows = self.full_mask(mask), statistics_dtype(query.dtype), []
        if mask is not None:
            mask.validate(batch, heads, queries, keys)
            # The masks that it takes are the same for all heads.
            allowed = mask.to(query.device).dense(queries, keys, batch=batch, device=query.device)[:, 0]
            rows = allowed.expand(batch, -1, -1).unbind(1)
        key, vector = key.to(precise), self.coverage.to(precise)[:, None]
        total = key.new_zeros(batch, heads, keys) if spent is None else spent
        nothing, nowhere = key.new_zeros(batch, heads, 1, 1), key.new_zeros(batch, heads, keys, 1)
        weights = []
        for row in range(queries):
            scores = self.scores(query[:, :, row : row + 1], key + total[..., None] * vector)
            seen = Keys(rows[row]) if rows else None
            weights.append(attention_weights(nothing, nowhere, mask=seen, bias=scores))
            total = total + weights[-1][:, :, 0]
        return torch.cat(weights, dim=2), total

    def init_state(self, batch: int) -> KeyValueCache | CoverageState:
        cache = super().init_state(batch)
        if self.coverage is None:
            return cache
        return CoverageState(cache, cache.key.new_zeros(cache.key.shape[:3], dtype=statistics_dtype(cache.key.dtype)))

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache | CoverageState
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache | CoverageState]:
        if isinstance(state, KeyValueCache):
            return super().step(x, state)
        query, key, value = self.project_step(x, state.cache.length, state.cache.key.shape[0])
        cache = state.cache.append(key, value)
        weights, spent = self.cover(query, cache.key, None, F.pad(state.spent, (0, x.shape[1])))
        return self.combine(weights.to(value.dtype) @ cache.value), CoverageState(cache, spent)


@register(
    "general_attention",
    paper="attentive_survey",
    contract=replace(
        ATTENTION,
        time="n*m*d*h",
        memory="n*d*h + m*d",
        options=(OptionSet({"head_dim": 5, "dropout": 0.1, "bias": True}), CROSS),
    ),
)
class GeneralAttention(Attention):
    """A bilinear form of each head compares the tokens themselves, at full rank.

    Args:
        bias: whether the form is biased and values and outputs have biases.

    The other arguments are those of `Attention`. Heads mix the tokens themselves and project what they mixed: the same
    as mixing values, with only the tokens to keep.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
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
            bias=bias,
            dropout=dropout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )
        self.kv_heads, self.key = 1, nn.Identity()
        self.query = nn.Linear(dim, heads * self.context_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W such that scores of unit tokens have variance 1; values and output Glorot-uniform; zero biases."""
        nn.init.normal_(self.query.weight, std=(self.dim * self.context_dim) ** -0.5)
        for projection in (self.value, self.output):
            nn.init.xavier_uniform_(projection.weight)
        for projection in (self.query, self.value, self.output):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W q for each head, and the tokens for all heads, as keys and as what is mixed."""
        query = rearrange(self.query(x), "batch length (heads width) -> batch heads length width", heads=self.heads)
        # Takes the score's own scale off again.
        return query * self.context_dim**0.5, source[:, None], source[:, None]

    def combine(self, mixed: Float[Tensor, "batch heads length context_dim"]) -> Float[Tensor, "batch length dim"]:
        """Each head's values of the tokens it mixed, concatenated and projected."""
        value = mixed @ self.value.weight.unflatten(0, (self.heads, self.head_dim)).mT
        if self.value.bias is not None:
            value = value + self.value.bias.unflatten(0, (self.heads, 1, self.head_dim))
        return super().combine(value)

    def init_state(self, batch: int) -> KeyValueCache:
        """The state before the first token: its keys are the tokens, its values have no width."""
        weight = self.value.weight
        return KeyValueCache.empty(batch, 1, self.dim, value_dim=0, device=weight.device, dtype=weight.dtype)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache]:
        query, key, _ = self.project_step(x, state.length, state.key.shape[0])
        state = state.append(key, key[..., :0])
        return self.combine(attention(query, state.key, state.key, mask=self.own_mask())), state


@register(
    "location_attention",
    paper="attentive_survey",
    contract=replace(
        ATTENTION,
        memory="(n+m+max_length)*d",
        permutation=None,
        options=(OptionSet({"max_length": 6, "head_dim": 5, "dropout": 0.1, "bias": True}), CROSS),
    ),
)
class LocationAttention(Attention):
    """A query alone says how much goes to each position, whatever stands there.

    Args:
        max_length: number of positions that have a score; keys further on are not attended to.

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        max_length: int = 2048,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require(max_length > 0, self._name, f"max_length {max_length}", "give a positive number of tokens")
        super().__init__(
            dim,
            heads=heads,
            head_dim=head_dim,
            causal=causal,
            bias=bias,
            dropout=dropout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )
        self.max_length = max_length
        self.key = nn.Embedding(max_length, heads * self.head_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Positions uniform in [−0.1, 0.1], as in the source; Glorot-uniform projections, zero biases."""
        nn.init.uniform_(self.key.weight, -0.1, 0.1)
        for projection in (self.query, self.value, self.output):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None, *, seen: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x, context, mask, positions, seen=seen)
        segments = segments_of(mask)
        if segments is not None:
            segments.validate(x.shape[0], self.heads, x.shape[1], key.shape[2])
            key = self.locations(segments.places().to(x.device)).expand_as(key)
        return query, key, value

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and values of the tokens, and keys of their positions."""
        pattern = "batch length (heads width) -> batch heads length width"
        query = rearrange(self.query(x), pattern, heads=self.heads)
        value = rearrange(self.value(source), pattern, heads=self.heads)
        places = torch.arange(source.shape[1], device=x.device)
        # Takes the score's own scale off again.
        return query * self.head_dim**0.5, self.locations(places).expand(x.shape[0], -1, -1, -1), value

    def locations(self, places: Int[Tensor, "*batch keys"]) -> Float[Tensor, "*batch heads keys head_dim"]:
        """What queries are compared with: a row for each head and place."""
        rows = self.key(places.clamp(max=self.max_length - 1))
        return rearrange(rows, "... keys (heads width) -> ... heads keys width", heads=self.heads)

    def full_mask(self, mask: Mask | None) -> Mask:
        segments = segments_of(mask)
        near = Sinks(self.max_length) if segments is None else Keys(segments.places() < self.max_length)
        own = Causal() & near if self.causal else near
        return own if mask is None else own & mask

    def init_state(self, batch: int) -> KeyValueCache:
        """The state before the first token: values only, its keys have no width."""
        weight = self.value.weight
        return KeyValueCache.empty(
            batch, self.heads, 0, value_dim=self.head_dim, device=weight.device, dtype=weight.dtype
        )

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache]:
        query, key, value = self.project_step(x, state.length, state.key.shape[0])
        state = state.append(key[..., :0], value)
        key = self.locations(torch.arange(state.length, device=x.device)).expand(x.shape[0], -1, -1, -1)
        return self.combine(attention(query, key, state.value, mask=self.full_mask(None))), state
