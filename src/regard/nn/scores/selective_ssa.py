"""Selective self-attention (SSA). "Selective Attention: Enhancing Transformer through Principled Context Control",
Zhang et al., 2024, arXiv 2411.12892.

    Q' = τ^q(X) ⊙ X W_q,   K' = τ^k(X) ⊙ X W_k,   V' = τ^v(X) ⊙ X W_v,   y = softmax(Q' K'ᵀ / √d_h) V' W_o
    τ(x) = τ^tok(x) + τ^pos(x),   τ^tok(x) = tanh(f(x)),   τ^pos(x) = 1 + σ(α) log n,   n: the place of x, from 1 on

An inverse temperature of the query says how sharp its row is, apart from what it looks for: by the token (some need
one word, some all), and by the place, since the longer the context, the thinner a softmax spreads. That of a value
silences tokens that are noise. f shares the attention's own weights, ``f(x) = w · GELU(x W)`` with W that of the tensor
it scales, so that a temperature costs a vector w and a number α.

Cost: as softmax attention; 2 d + 1 parameters for the default temperatures, below 0.5 % of the 4 d² from d = 101 on.

Differences: f, tanh and α are the paper's; the release has the place of queries only, with exp(−exp(β)) for σ(α). α
starts where its β = 1.5 does, w at zero, so that a converted layer starts where it stood but for the place. w is per
head. With ``share_weights=False`` f has a matrix W of its own. Queries have both parts, values the token's and keys
none by default. n counts within a packed sequence, and in cross-attention queries stand at the end of the context.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ALIBI, ATTENTION, RELATIVE, ROTARY, Attention, Position
from regard.nn.conversion import converted
from regard.nn.heads.multi_head import MultiHeadAttention
from regard.ops.checks import one_of
from regard.ops.masks import Mask, Segments, segments_of
from regard.ops.precision import statistics_dtype

Aware = Literal["token", "position", "both"]

START = -math.log(math.exp(math.exp(1.5)) - 1)
"""α with σ(α) = exp(−exp(1.5))."""


class Temperature(nn.Module):
    """τ of one of the three tensors: w per head, α, and W where it is not the attention's own."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, aware: Aware, share_weights: bool, factory: dict[str, Any]
    ) -> None:
        super().__init__()
        of_token, of_place = aware != "position", aware != "token"
        self.token = nn.Parameter(torch.zeros(heads, head_dim, **factory)) if of_token else None
        self.place = nn.Parameter(torch.full((), START, **factory)) if of_place else None
        self.features = None if share_weights or not of_token else nn.Linear(dim, heads * head_dim, **factory)

    def add_token(
        self, heads: Float[Tensor, "batch heads length head_dim"], tokens: Float[Tensor, "batch length dim"]
    ) -> Float[Tensor, "batch once_or_twice_heads length head_dim"]:
        """The heads ``x W``, followed by τ^tok times them where the token counts."""
        if self.token is None:
            return heads
        features, precise = heads, statistics_dtype(heads.dtype)
        if self.features is not None:
            pattern = "batch length (heads width) -> batch heads length width"
            features = rearrange(self.features(tokens), pattern, heads=heads.shape[1])
        score = torch.einsum("bhnd,hd->bhn", F.gelu(features.to(precise)), self.token.to(precise))
        return torch.cat([heads, (score.tanh()[..., None] * heads).to(heads.dtype)], dim=1)

    def add_place(self, heads: Tensor, places: Int[Tensor, "*batch length"]) -> Tensor:
        """``(τ^tok + τ^pos) x W`` from what `add_token` gave; without α the place counts for nothing: τ^pos = 1."""
        plain, by_token = (heads, None) if self.token is None else heads.chunk(2, dim=1)
        if self.place is not None:
            precise = statistics_dtype(heads.dtype)
            tau = 1 + self.place.to(precise).sigmoid() * places.to(precise).log()
            plain = ((tau if tau.ndim == 1 else tau[:, None])[..., None] * plain).to(heads.dtype)
        return plain if by_token is None else plain + by_token


@register(
    "selective_ssa",
    paper="selective_ssa",
    contract=replace(
        ATTENTION,
        exact=True,
        permutation=None,
        options=(
            replace(ROTARY, arguments={**ROTARY.arguments, "key_temperature": "both", "kv_heads": 2}),
            replace(RELATIVE, arguments={**RELATIVE.arguments, "query_temperature": "position"}),
            replace(ALIBI, arguments={**ALIBI.arguments, "share_weights": False, "value_temperature": "both"}),
            OptionSet(
                {"query_temperature": "token", "value_temperature": None, "position": None},
                {"permutation": "equivariant"},
            ),
        ),
    ),
)
class SelectiveSelfAttention(Attention):
    """Softmax attention whose tokens and places set the temperature.

    Args:
        query_temperature, key_temperature, value_temperature: what scales queries, keys and values: ``"token"``,
            ``"position"``, ``"both"`` or None.
        share_weights: whether f uses the projection of what it scales; otherwise one of its own.

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        causal: bool = False,
        position: Position | None = None,
        query_temperature: Aware | None = "both",
        key_temperature: Aware | None = None,
        value_temperature: Aware | None = "token",
        share_weights: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            causal=causal,
            position=position,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        factory = {"device": device, "dtype": dtype}

        def temperature(name: str, heads: int, aware: Aware | None) -> Temperature | None:
            if aware is None:
                return None
            one_of(self._name, f"{name}_temperature", aware, ("token", "position", "both"))
            return Temperature(dim, heads, self.head_dim, aware, share_weights, factory)

        self.query_temperature = temperature("query", self.heads, query_temperature)
        self.key_temperature = temperature("key", self.kv_heads, key_temperature)
        self.value_temperature = temperature("value", self.kv_heads, value_temperature)

    @classmethod
    def from_multi_head(cls, layer: MultiHeadAttention) -> SelectiveSelfAttention:
        """A layer to fine-tune from a trained one, which it equals but for the queries' place, ``0.011 log n``."""
        return converted(cls, layer)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Heads, and behind them τ^tok times them: f must not see rotated ones, and rotary turns both alike."""
        parts = zip(self.own_temperatures(), super().split(x, source), (x, source, source), strict=True)
        query, key, value = (heads if tau is None else tau.add_token(heads, tokens) for tau, heads, tokens in parts)
        return query, key, value

    def own_temperatures(self) -> tuple[Temperature | None, ...]:
        """Those of queries, keys and values."""
        return self.query_temperature, self.key_temperature, self.value_temperature

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None, *, seen: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in `Attention`, with temperatures applied."""
        projected = super().project(x, context, mask, positions, seen=seen)
        queries, keys = projected[0].shape[2], projected[1].shape[2]
        of_keys = torch.arange(seen + 1, seen + keys + 1, device=x.device)
        of_queries = (torch.arange(1, queries + 1, device=x.device) + seen + keys - queries).clamp(min=1)
        if mask is not None:
            mask.validate(x.shape[0], self.heads, queries, keys)
            packed = segments_of(mask)
            if packed is not None:
                of_keys = (packed.places() + 1).to(x.device)
                of_queries = of_keys[..., keys - queries :]
                if packed.query_ids is not None:
                    of_queries = (Segments(packed.query_ids).places() + 1).to(x.device)
        parts = zip(self.own_temperatures(), projected, (of_queries, of_keys, of_keys), strict=True)
        query, key, value = (heads if tau is None else tau.add_place(heads, places) for tau, heads, places in parts)
        return query, key, value
