"""The softmax grammar as a module: project → position → score → mask and bias → normalise → mix → project.

Mechanisms of this grammar derive from `Attention` and change one or two of the stages.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.catalogue import Contract, OptionSet
from regard.nn.mechanism import Mechanism, head_width
from regard.ops.attention import attention, attention_weights
from regard.ops.biases import Alibi, Bias, RelativeBias
from regard.ops.cache import KeyValueCache
from regard.ops.checks import one_of, require
from regard.ops.masks import Causal, Mask
from regard.ops.normalizers import Normalizer
from regard.ops.positions import rotary

Position = Literal["rotary", "alibi", "relative"]

ATTENTION = Contract(
    input="tokens",
    patterns=("noncausal self", "causal self", "noncausal cross", "causal cross"),
    time="n*m*d",
    memory="(n+m)*d",
    padding=True,
    packed=True,
    any_mask=True,
    step=True,
    state="linear",
    attention_map=True,
    exact=True,
    permutation="equivariant",
)
"""What the whole grammar can do; a mechanism of it replaces what it changes."""

ROTARY = OptionSet({"position": "rotary"}, {"positions": True, "permutation": None})
ALIBI = OptionSet({"position": "alibi"}, {"permutation": None})
# A key's bias adds the same to every score of a row, which softmax takes off again.
RELATIVE = OptionSet({"position": "relative", "bias": True}, {"permutation": None, "frozen": ("key.bias",)})
CROSS = OptionSet({"context_dim": 24}, {"patterns": ("noncausal cross", "causal cross"), "step": False, "state": None})

BUCKETS, BUCKETED_DISTANCE = 32, 128
"""T5's relative buckets and the distance beyond which they no longer grow."""


class Attention(Mechanism):
    """Projections, positions, masks, decoding and maps for softmax-like attention over tokens.

    Args:
        dim: width of the tokens.
        heads: number of query heads.
        kv_heads: number of key and value heads, a divisor of `heads`; as many by default.
        head_dim: width of a head; ``dim / heads`` by default.
        causal: whether a token sees only itself and what came before.
        position: ``"rotary"`` turns queries and keys, ``"alibi"`` adds ALiBi's slopes, ``"relative"`` T5's buckets.
        bias: whether the projections have biases.
        dropout: probability of dropping an attention weight in training.
        context_dim: width of `context`; `dim` by default.
    """

    normalizer: str | Normalizer = "softmax"

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        position: Position | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.causal = dim, heads, causal
        self.position: Position | None = position
        self.head_dim = head_width(self._name, dim, heads, head_dim)
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.context_dim = dim if context_dim is None else context_dim
        self.dropout = dropout
        require(
            self.kv_heads > 0 and heads % self.kv_heads == 0,
            self._name,
            f"kv_heads {self.kv_heads} does not divide heads {heads}",
            "give a divisor",
        )
        require(0.0 <= dropout < 1.0, self._name, f"dropout {dropout}", "give a probability in [0, 1)")
        if position is not None:
            one_of(self._name, "position", position, ("rotary", "alibi", "relative"))
        require(
            position != "rotary" or self.head_dim % 2 == 0,
            self._name,
            f"head_dim {self.head_dim} is odd with position='rotary'",
            "rotary turns pairs of features: use an even head_dim",
        )
        factory = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, heads * self.head_dim, bias=bias, **factory)
        self.key = nn.Linear(self.context_dim, self.kv_heads * self.head_dim, bias=bias, **factory)
        self.value = nn.Linear(self.context_dim, self.kv_heads * self.head_dim, bias=bias, **factory)
        self.output = nn.Linear(heads * self.head_dim, dim, bias=bias, **factory)
        if position == "alibi":
            self.register_buffer("slopes", Alibi.for_heads(heads).slopes.to(**factory))
        elif position == "relative":
            self.relative = nn.Parameter(torch.empty(heads, BUCKETS, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform projections, zero biases; T5's normal initialisation of relative biases."""
        for projection in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.position == "relative":
            nn.init.normal_(self.relative, std=self.dim**-0.5)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself, or to `context`.

        `mask` is combined with the mechanism's own; `positions` (with ``position="rotary"``) defaults to 0, 1, 2, ….
        With a context the queries are aligned with its end.
        """
        query, key, value = self.project(x, context, mask, positions)
        mixed = attention(
            query,
            key,
            value,
            mask=self.full_mask(mask),
            bias=self.score_bias(),
            normalizer=self.normalizer,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.combine(mixed)

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        """The weights and the values they mix: ``combine(weights @ value)`` is the output in eval mode."""
        query, key, value = self.project(x, context, mask, positions)
        weights = attention_weights(
            query, key, mask=self.full_mask(mask), bias=self.score_bias(), normalizer=self.normalizer
        )
        return weights.to(value.dtype), value.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def combine(self, mixed: Float[Tensor, "batch heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        """Concatenate the heads and project."""
        return self.output(rearrange(mixed, "batch heads length width -> batch length (heads width)"))

    def init_state(self, batch: int) -> KeyValueCache:
        """The state before the first token."""
        weight = self.key.weight
        return KeyValueCache.empty(batch, self.kv_heads, self.head_dim, device=weight.device, dtype=weight.dtype)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache]:
        """The outputs of one or more further tokens, and the state after them. Causal self-attention only."""
        query, key, value = self.project_step(x, state.length, state.key.shape[0])
        state = state.append(key, value)
        mixed = attention(
            query,
            state.key,
            state.value,
            mask=self.full_mask(None),
            bias=self.score_bias(),
            normalizer=self.normalizer,
        )
        return self.combine(mixed), state

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None, *, seen: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Checked arguments as query, key and value heads, with positions applied; `seen` tokens came before them."""
        self.check_tokens(x, context, mask, positions, takes_positions=self.position == "rotary")
        self.check_width(x, self.dim)
        require(
            context is not None or self.context_dim == self.dim,
            self._name,
            f"no context, built with context_dim {self.context_dim} beside dim {self.dim}",
            "give a context, or build without context_dim",
        )
        source = x if context is None else context
        self.check_width(source, self.context_dim, name="x" if context is None else "context")
        query, key, value = self.split(x, source)
        if self.position == "rotary":
            end = seen + source.shape[1]
            key_positions = torch.arange(seen, end, device=x.device)
            if positions is None:
                positions = torch.arange(end - x.shape[1], end, device=x.device)
            query = rotary(query, positions)
            key = rotary(key, positions if context is None else key_positions)
        return query, key, value

    def project_step(self, x: Tensor, seen: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads of tokens that follow `seen` others in a state of `batch` samples."""
        self.check_step(x, self.dim, batch)
        return self.project(x, None, None, None, seen=seen)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project and split into heads."""
        pattern = "batch length (heads width) -> batch heads length width"
        return (
            rearrange(self.query(x), pattern, heads=self.heads),
            rearrange(self.key(source), pattern, heads=self.kv_heads),
            rearrange(self.value(source), pattern, heads=self.kv_heads),
        )

    def full_mask(self, mask: Mask | None) -> Mask | None:
        """The caller's mask and the mechanism's own."""
        own = self.own_mask()
        if own is None or mask is None:
            return own if mask is None else mask
        return own & mask

    def own_mask(self) -> Mask | None:
        """What the mechanism itself forbids."""
        return Causal() if self.causal else None

    def score_bias(self) -> Bias | None:
        """What is added to the scores."""
        if self.position == "alibi":
            return Alibi(self.slopes)  # pyright: ignore[reportArgumentType] a buffer
        if self.position == "relative":
            return RelativeBias(self.relative, BUCKETED_DISTANCE, None, not self.causal)
        return None
