"""Fastmax attention. "FAST: Factorizable Attention for Speeding up Transformers", Gerami, Hoover et al., 2024, arXiv
2402.07901.

    a_ij = f(q̂_i · k̂_j) / Σ_n f(q̂_i · k̂_n),     f(x) = Σ_{l ≤ p} x^l / l!,     q̂ = (q − mean(q)) / std(q),  k̂ likewise
    o_i  = Σ_j a_ij v_j

f is the exponential's series to order p = 1 or 2. A polynomial of a product factorises, f(q̂ · k̂) = φ(q̂) · φ(k̂) with
φ(x) = (1, x, x_a x_b for a < b, x_a² / √2), so that this is attention over all tokens, without approximation of a, and
yet linear: Σ_j φ(k̂_j) v_jᵀ is summed up once. Of order 2, f is at least 1/2: every token keeps some weight, and no
gradient of o by a score exceeds 2 max |v| / √n, where softmax reaches |v| / 2 at any length. Of order 1, f(x) = 1 + x
is negative below −1 and a sum of it may vanish: ``temperature=head_dim`` keeps |x| ≤ 1.

Dropout is applied to the factors, not to a: to the products x_a x_b of both sides (order 2), or to x (order 1). Where
it takes squares away, a sum of order 2 may come near zero as well; a higher temperature prevents it.

Cost: time O(n d (d / h)^p), memory O(n d) and φ of one segment of tokens, forward and backward: longer sequences are
computed in segments, and their φ once more for the gradient. The decoding state is d (d / h)^p numbers.

Differences: mean and std are those of a token over the width of its head, with 1e-5 beside the variance: that is how a
summary of the paper reads, whose body was not at hand. The release
takes the mean off and divides by the largest norm of all tokens instead, which lets no weight be negative but shows a
causal token the future. ``temperature`` divides x as in the release; 1 is the formula above. There x_a x_b and x_b x_a
are two factors, which dropout may part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from regard.catalogue import Contract, OptionSet, register
from regard.nn.attention import ROTARY, Attention
from regard.ops.checks import require
from regard.ops.linear import linear_attention
from regard.ops.masks import Padding
from regard.ops.precision import statistics_dtype

SEGMENT = 1024
"""Tokens whose features exist at once."""


@dataclass(frozen=True)
class FastMaxState:
    """Σ φ(k̂) (v, 1)ᵀ over the tokens seen, and how many those are."""

    sums: Float[Tensor, "batch heads features head_dim_and_1"]
    seen: int


@register(
    "fast_attention",
    paper="fast_attention",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self", "causal self", "noncausal cross"),
        time="(n+m)*d*(d/h)**2",
        memory="(n+m)*d",
        padding=True,
        step=True,
        state="constant",
        attention_map=True,
        permutation="equivariant",
        options=(
            OptionSet({"order": 1, "temperature": 8.0}, {"time": "(n+m)*d*d/h"}),
            replace(ROTARY, arguments={"position": "rotary", "head_dim": 6, "bias": True}),
            OptionSet(
                {"context_dim": 24, "temperature": 3.0},
                {"patterns": ("noncausal cross",), "step": False, "state": None},
            ),
        ),
    ),
)
class FastMaxAttention(Attention):
    """Softmax with the exponential's series to order 1 or 2, which factorises, in linear time.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        head_dim: width of a head; ``dim / heads`` by default.
        order: p, 1 or 2.
        temperature: what q̂ · k̂ is divided by.
        causal: whether a token sees only itself and what came before.
        position: ``"rotary"`` turns queries and keys before they are normalised.
        bias: whether the projections have biases.
        dropout: probability of dropping a factor in training.
        context_dim: width of `context`; `dim` by default.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        order: Literal[1, 2] = 2,
        temperature: float = 1.0,
        causal: bool = False,
        position: Literal["rotary"] | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require(order in (1, 2), self._name, f"order {order}", "give 1 or 2")
        require(temperature > 0, self._name, f"temperature {temperature}", "give a positive number")
        require(
            position in (None, "rotary"), self._name, f"position {position!r}", "give 'rotary', or None: a has no bias"
        )
        super().__init__(
            dim,
            heads=heads,
            head_dim=head_dim,
            causal=causal,
            position=position,
            bias=bias,
            dropout=dropout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )
        self.order: Literal[1, 2] = order
        self.temperature = temperature

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Padding | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself or, where not causal, to `context`; `mask` may be a ``Padding`` of what is seen."""
        query, key, value = self.project(x, context, mask, positions)
        mixed, _ = self._mix(query, key, value, self._real(key, query.shape[2], mask), None)
        return self.combine(mixed.to(x.dtype))

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Padding | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        """a and the values: ``combine(a @ value)`` is the output in eval mode. This one is n × n."""
        query, key, value = self.project(x, context, mask, positions)
        scores = query @ key.mT
        weights = 1 + scores if self.order == 1 else 1 + scores + scores.square() / 2
        weights = weights.masked_fill(~self._real(key, query.shape[2], mask).mT, 0.0)
        weights = weights.tril() if self.causal else weights
        total = weights.sum(-1, keepdim=True)
        return (weights / total.masked_fill(total == 0, torch.inf)).to(x.dtype), value.to(x.dtype)

    def init_state(self, batch: int) -> FastMaxState:
        """The state before the first token."""
        weight, width = self.key.weight, self.head_dim
        features = 1 + width if self.order == 1 else 1 + width + width * (width + 1) // 2
        shape = (batch, self.heads, features, width + 1)
        return FastMaxState(torch.zeros(shape, device=weight.device, dtype=statistics_dtype(weight.dtype)), 0)

    def step(self, x: Float[Tensor, "batch new dim"], state: FastMaxState) -> tuple[Tensor, FastMaxState]:
        """The outputs of one or more further tokens, and the state after them. Causal self-attention only."""
        query, key, value = self.project_step(x, state.seen, state.sums.shape[0])
        mixed, sums = self._mix(query, key, value, self._real(key, query.shape[2], None), state.sums)
        return self.combine(mixed.to(x.dtype)), FastMaxState(sums, state.seen + x.shape[1])

    def project(
        self, x: Tensor, context: Tensor | None, mask: Any, positions: Tensor | None, *, seen: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Checked arguments as q̂ / temperature, k̂ and v in heads, at least float32."""
        require(
            context is None or not self.causal,
            self._name,
            "context given with causal=True",
            "build with causal=False to attend to a context",
        )
        heads = super().project(x, context, mask, positions, seen=seen)
        query, key, value = (part.to(statistics_dtype(x.dtype)) for part in heads)
        query, key = (F.layer_norm(part, (self.head_dim,)) for part in (query, key))
        return query / self.temperature, key, value

    def _real(self, key: Tensor, queries: int, mask: Padding | None) -> Tensor:
        """Which keys are no padding, (batch or 1, 1, keys, 1)."""
        batch, _, keys, _ = key.shape
        if mask is None:
            return torch.ones(1, 1, keys, 1, dtype=torch.bool, device=key.device)
        mask.validate(batch, self.heads, queries, keys)
        return mask.real(keys).to(key.device)[:, None, :, None]

    def _mix(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor, sums: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs, and the sums after the last key."""
        if max(query.shape[2], key.shape[2]) <= SEGMENT:
            return self._all(query, key, value, real, sums)
        sources = zip(*(part.split(SEGMENT, dim=2) for part in (key, value, real)), strict=True)
        mixed = []
        if self.causal:
            for part, source in zip(query.split(SEGMENT, dim=2), sources, strict=True):
                out, sums = _again_for_gradient(self._all, part, *source, sums)
                mixed.append(out)
        else:
            # Queries and keys of zeros: the first read nothing worth keeping, the second add nothing.
            nothing = [torch.zeros_like(part[:, :, :1]) for part in (key, value, real)]
            for source in sources:
                _, sums = _again_for_gradient(self._all, nothing[0], *source, sums)
            for part in query.split(SEGMENT, dim=2):
                mixed.append(_again_for_gradient(self._all, part, *nothing, sums)[0])
        assert sums is not None
        return torch.cat(mixed, dim=2), sums

    def _all(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor, sums: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dropout = self.dropout if self.training else 0.0
        features = factors(key, self.order, dropout).masked_fill(~real, 0.0)
        return linear_attention(
            factors(query, self.order, dropout),
            features,
            value,
            causal=self.causal,
            normalize=True,
            initial_state=sums,
            return_state=True,
        )


def factors(
    x: Float[Tensor, "batch heads length width"], order: Literal[1, 2], dropout: float = 0.0
) -> Float[Tensor, "batch heads length features"]:
    """φ: its products are those of x to `order` of the exponential's series."""
    ones = torch.ones_like(x[..., :1])
    if order == 1:
        return torch.cat([ones, F.dropout(x, dropout)], dim=-1)
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    # x_a x_b stands for x_b x_a too, which the half of the series takes off again.
    share = 1 - (1 - 0.5**0.5) * (first == second).to(x.dtype)
    return torch.cat([ones, x, F.dropout(x[..., first] * x[..., second] * share, dropout)], dim=-1)


def _again_for_gradient(function: Callable[..., Any], *arguments: Tensor | None) -> Any:
    """What `function` gives, keeping nothing but its arguments for the gradient."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)
