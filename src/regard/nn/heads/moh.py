"""Mixture-of-head attention. "MoH: Multi-Head Attention as Mixture-of-Head Attention", Jin et al., 2024, arXiv
2410.11842.

    y   = Σ_i g_i head_i W_i^O                          multi-head attention has g_i = 1 for every head
    g_i = α_1 h_s softmax(W_s x)_i                      for the h_s shared heads, which are always on
    g_i = α_2 k p_i / Σ_{j on} p_j,  p = softmax(W_r x) for the k routed heads that are on for this token, else 0
    [α_1, α_2] = 2 softmax(W_h x)                       the balance of both kinds (1 where there is one kind only)

    balance loss = E Σ_i P_i f_i        P_i: mean of p_i over the tokens, f_i: share of tokens that turn head i on,
                                        E: number of routed heads; the paper weighs it by 0.01

A pretrained layer becomes a mixture with `MixtureOfHeadAttention.from_multi_head`. ``router="query_norm"`` is the
paper's router for that: it has no parameters. p = softmax(‖q_i‖ / std_j ‖q_j‖), heads that are on weigh 1, and p learns
by passing the gradient of the weights straight through.

Cost: time O(n m d), memory O((n + m) d): as in the release all heads are computed, and those off weigh nothing.

Differences: the constants h_s, k, 2 and the division by the sum over heads that are on are those of the release, not in
the paper's equation: they let uniform routers weigh every head 1. The loss too has the release's factor E, so that it
is k for uniform routing. The straight-through gradient is taken in training; in eval mode gradients are the exact ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ALIBI, ATTENTION, RELATIVE, ROTARY, Attention, Position
from regard.nn.conversion import converted
from regard.nn.heads.multi_head import MultiHeadAttention
from regard.ops.attention import attention
from regard.ops.cache import KeyValueCache
from regard.ops.checks import one_of, require
from regard.ops.masks import Mask
from regard.ops.precision import statistics_dtype, without_autocast

Router = Literal["learned", "query_norm"]


class Routing(NamedTuple):
    """Which heads are on for a token, and what they weigh."""

    weights: Float[Tensor, "batch length heads"]
    probabilities: Float[Tensor, "batch length routed_heads"]
    chosen: Bool[Tensor, "batch length routed_heads"]


def balance_loss(
    probabilities: Float[Tensor, "batch length experts"],
    chosen: Bool[Tensor, "batch length experts"],
    tokens: Bool[Tensor, "batch length"] | None = None,
) -> Float[Tensor, ""]:
    """``E Σ_e P_e f_e``, the mean probability and the load of each expert over the `tokens` that count (all).

    With k experts on for each token it is k where routing is uniform, and up to E where all choose the same.
    """
    if tokens is None:
        tokens = torch.ones_like(chosen[..., 0])
    share = tokens.to(probabilities.dtype) / tokens.sum().clamp(min=1)
    mean, load = (torch.einsum("bn,bne->e", share, of.to(share.dtype)) for of in (probabilities, chosen))
    return probabilities.shape[-1] * (mean * load).sum()


@register(
    "moh",
    paper="moh",
    contract=replace(
        ATTENTION,
        exact=False,
        options=(
            replace(ROTARY, arguments={**ROTARY.arguments, "router": "query_norm"}),
            replace(ALIBI, arguments={**ALIBI.arguments, "shared_heads": 2, "active_heads": 4}),
            replace(RELATIVE, arguments={**RELATIVE.arguments, "shared_heads": 0}),
            OptionSet({"shared_heads": 4, "active_heads": 4, "head_dim": 6, "dropout": 0.1}),
        ),
    ),
)
class MixtureOfHeadAttention(Attention):
    """A router turns heads on per token and weighs them; some heads are always on.

    Args:
        shared_heads: the first heads, always on; a quarter of them by default.
        active_heads: heads on for each token, shared ones included; three quarters of them by default. With a single
            routed head on, which then weighs 1, a learned router learns from the balance loss alone.
        router: ``"learned"`` or ``"query_norm"``, which has no parameters and weighs heads 0 or 1.

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        shared_heads: int | None = None,
        active_heads: int | None = None,
        router: Router = "learned",
        head_dim: int | None = None,
        causal: bool = False,
        position: Position | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            head_dim=head_dim,
            causal=causal,
            position=position,
            bias=bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.shared_heads = heads // 4 if shared_heads is None else shared_heads
        self.active_heads = -(-3 * heads // 4) if active_heads is None else active_heads
        self.routed_heads = heads - self.shared_heads
        one_of(self._name, "router", router, ("learned", "query_norm"))
        require(
            0 <= self.shared_heads <= heads,
            self._name,
            f"shared_heads {self.shared_heads} of heads {heads}",
            "give a number from 0 to heads",
        )
        require(
            min(self.shared_heads + 1, heads) <= self.active_heads <= heads,
            self._name,
            f"active_heads {self.active_heads} with shared_heads {self.shared_heads} of heads {heads}",
            "give more than shared_heads, and no more than heads",
        )
        require(
            router == "learned" or self.routed_heads > 1,
            self._name,
            f"router 'query_norm' for {self.routed_heads} routed heads",
            "it compares norms: leave two heads or more to it, or use router='learned'",
        )
        self.by_norm = router == "query_norm"
        both = min(self.shared_heads, self.routed_heads) > 0
        factory = {"device": device, "dtype": dtype}
        self.router = self._router(self.routed_heads, **factory)
        self.shared_router = self._router(self.shared_heads if self.shared_heads > 1 else 0, **factory)
        self.balance_router = self._router(2 if both else 0, **factory)

    def _router(self, outputs: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Linear | None:
        if self.by_norm or not outputs:
            return None
        router = nn.Linear(self.dim, outputs, bias=False, device=device, dtype=dtype)
        nn.init.xavier_uniform_(router.weight)
        return router

    @classmethod
    def from_multi_head(
        cls,
        layer: MultiHeadAttention,
        *,
        shared_heads: int | None = None,
        active_heads: int | None = None,
        router: Router = "query_norm",
    ) -> MixtureOfHeadAttention:
        """A mixture of the heads of `layer`, whose output it has while all heads are on (``active_heads=heads``).

        Learned routers start at zero, where all heads that are on weigh 1 and ties decide which. Raises ValueError for
        a `layer` whose context has another width than its tokens.
        """
        mixture = converted(cls, layer, shared_heads=shared_heads, active_heads=active_heads, router=router)
        with torch.no_grad():
            for name, parameter in mixture.named_parameters():
                if "router" in name:
                    parameter.zero_()
        return mixture

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        query, key, value = self.project(x, context, mask, positions)
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, value, mask=self.full_mask(mask), bias=self.score_bias(), dropout=dropout)
        return self.combine(mixed * self.gates(x, query))

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        """Weights times those of the heads, and values: ``combine(weights @ value)`` is the output in eval mode."""
        weights, value = super().attention_map(x, context, mask=mask, positions=positions)
        return weights * self.gates(x), value

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache]:
        query, key, value = self.project_step(x, state.length, state.key.shape[0])
        state = state.append(key, value)
        mixed = attention(query, state.key, state.value, mask=self.full_mask(None), bias=self.score_bias())
        return self.combine(mixed * self.gates(x, query)), state

    def gates(self, x: Tensor, query: Tensor | None = None) -> Float[Tensor, "batch heads length 1"]:
        """g as a factor on what the heads read."""
        return rearrange(self.routing(x, query).weights, "batch length heads -> batch heads length 1").to(x.dtype)

    def routing(
        self,
        x: Float[Tensor, "batch length dim"],
        query: Float[Tensor, "batch heads length head_dim"] | None = None,
    ) -> Routing:
        """The heads of the tokens `x`, in at least float32; `query` saves projecting the queries a second time.

        ``balance_loss(routing.probabilities, routing.chosen)`` is the loss to add.
        """
        with without_autocast(x.device):
            scores = self._scores_by_norm(x, query) if self.by_norm else self._logits(self.router, x)
            probabilities = scores.softmax(-1)
            indices = probabilities.topk(self.active_heads - self.shared_heads, dim=-1).indices
            chosen = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, indices, True)
            on = chosen.to(probabilities.dtype)
            if self.by_norm:
                weights = on + (probabilities - probabilities.detach()) if self.training else on
                return Routing(F.pad(weights, (self.shared_heads, 0), value=1.0), probabilities, chosen)
            kept = probabilities * on
            routed = indices.shape[-1] * kept / kept.sum(-1, keepdim=True)
            shared = probabilities.new_ones(*x.shape[:2], self.shared_heads)
            if self.shared_router is not None:
                shared = self.shared_heads * self._logits(self.shared_router, x).softmax(-1)
            if self.balance_router is not None:
                first, second = (2 * self._logits(self.balance_router, x).softmax(-1)).split(1, dim=-1)
                shared, routed = first * shared, second * routed
            return Routing(torch.cat([shared, routed], dim=-1), probabilities, chosen)

    def _scores_by_norm(self, x: Tensor, query: Tensor | None) -> Tensor:
        if query is None:
            query = rearrange(self.query(x), "batch length (heads width) -> batch heads length width", heads=self.heads)
        norms = query[:, self.shared_heads :].to(statistics_dtype(x.dtype)).norm(dim=-1).transpose(1, 2)
        return norms / norms.std(-1, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)

    def _logits(self, router: nn.Linear | None, x: Tensor) -> Tensor:
        dtype = statistics_dtype(x.dtype)
        if router is None:
            return x.new_zeros(*x.shape[:2], 0, dtype=dtype)
        return F.linear(x.to(dtype), router.weight.to(dtype))
