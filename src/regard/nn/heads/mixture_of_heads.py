"""Mixture of attention heads. "Mixture of Attention Heads: Selecting Attention Heads Per Token", Zhang et al., 2022,
arXiv 2210.05144.

    p   = softmax(x W_g)                                          the router, over all E heads
    w_e = p_e / detach(Σ_{j in G} p_j)                            G: the k heads of largest p, chosen for each token
    y   = Σ_{e in G} w_e softmax(x W_e^q (c W^k)ᵀ / √d_h) c W^v W_e^o        heads share W^k and W^v

    balance loss  E Σ_e P_e f_e / k         P_e: mean of p_e over the tokens, f_e: share of tokens that choose e
    z loss        mean of (log Σ_e exp(x W_g)_e)²        the paper weighs them by 0.01 and 0.001

Only the k chosen heads are computed: pairs of token and head are sorted by head and multiplied in blocks that belong to
one head each, and attention has k query heads for one key head. The decoding state is that of one head.

Cost: time O(n d d_h k + n m k d_h), memory O(n k d).

Differences: in training the sum passes no gradient, as in the paper; in eval mode gradients are the exact ones. The
release leaves the division out: ``renormalize=False``. Its further balance loss by coefficient of variation, noise on
the router and sampled heads are not in the paper. The paper has d_h free of d: `head_dim`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, CROSS, Attention
from regard.nn.heads.moh import balance_loss as unscaled_balance_loss
from regard.ops.attention import attention
from regard.ops.cache import KeyValueCache
from regard.ops.checks import require
from regard.ops.masks import Mask
from regard.ops.precision import statistics_dtype, without_autocast

LARGEST_BLOCK = 64
"""Pairs a block: large enough that reading a head's weights costs little, small enough to leave little of it empty."""


class Routing(NamedTuple):
    """Which heads a token chooses and what they weigh, beside what the losses need."""

    chosen: Int[Tensor, "batch length active_heads"]
    weights: Float[Tensor, "batch length active_heads"]
    logits: Float[Tensor, "batch length heads"]


def balance_loss(routing: Routing, tokens: Bool[Tensor, "batch length"] | None = None) -> Float[Tensor, ""]:
    """How unevenly the `tokens` that count (all) use the heads: 1 where routing is uniform."""
    used = torch.zeros_like(routing.logits, dtype=torch.bool).scatter(-1, routing.chosen, True)
    return unscaled_balance_loss(routing.logits.softmax(-1), used, tokens) / routing.chosen.shape[-1]


def z_loss(routing: Routing, tokens: Bool[Tensor, "batch length"] | None = None) -> Float[Tensor, ""]:
    """How large the router's logits are, over the `tokens` that count (all)."""
    squares = routing.logits.logsumexp(-1).square()
    return squares.mean() if tokens is None else (squares * tokens).sum() / tokens.sum().clamp(min=1)


class Dispatch(NamedTuple):
    """Pairs (of token and head) laid out in blocks of one head each."""

    head: Int[Tensor, " blocks"]
    pair: Int[Tensor, " blocks_times_size"]
    slot: Int[Tensor, " pairs"]

    @classmethod
    def of(cls, heads_of_pairs: Int[Tensor, " pairs"], heads: int) -> Dispatch:
        """As many blocks as the pairs may need at most, however they are spread. What is left empty repeats pair 0."""
        pairs, device = heads_of_pairs.shape[0], heads_of_pairs.device
        size = max(1, min(LARGEST_BLOCK, pairs // (4 * heads)))
        blocks = (pairs + min(heads, pairs) * (size - 1)) // size
        order = heads_of_pairs.argsort(stable=True)
        counts = torch.zeros(heads, dtype=torch.long, device=device).index_add(
            0, heads_of_pairs, torch.ones_like(heads_of_pairs)
        )
        ends = ((counts + size - 1) // size).cumsum(0)
        # By how much a head's pairs move back when the heads before it are filled up to whole blocks.
        moved = size * F.pad(ends, (1, -1)) - F.pad(counts.cumsum(0), (1, -1))
        slots = torch.arange(pairs, device=device) + moved[heads_of_pairs[order]]
        head = torch.searchsorted(ends, torch.arange(blocks, device=device), right=True).clamp(max=heads - 1)
        pair = torch.zeros(blocks * size, dtype=torch.long, device=device).scatter(0, slots, order)
        return cls(head, pair, torch.zeros_like(order).scatter(0, order, slots))

    def multiply(
        self, rows: Float[Tensor, "slots width"], weights: Float[Tensor, "heads out width"]
    ) -> Float[Tensor, "slots out"]:
        """Each slot's row times the weights of its block's head, given as `nn.Linear` has them."""
        blocks = rows.unflatten(0, (self.head.shape[0], -1))
        return torch.bmm(blocks, weights.index_select(0, self.head).mT).flatten(0, 1)


@register(
    "mixture_of_heads",
    paper="mixture_of_heads",
    contract=replace(
        ATTENTION,
        exact=False,
        options=(
            OptionSet({"active_heads": 3, "renormalize": False}),
            OptionSet({"active_heads": 4, "head_dim": 6, "dropout": 0.1}),
            CROSS,
        ),
    ),
)
class MixtureOfAttentionHeads(Attention):
    """A router picks the heads of each token; heads have their own query and output, and share key and value.

    Args:
        heads: number E of heads to choose from.
        active_heads: number k of heads each token chooses; half of them by default. With one, whose weight is then 1,
            the router learns in training only.
        renormalize: whether the weights of the chosen heads sum to 1; otherwise they are the router's probabilities.

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        active_heads: int | None = None,
        head_dim: int | None = None,
        renormalize: bool = True,
        causal: bool = False,
        dropout: float = 0.0,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            kv_heads=1,
            head_dim=head_dim,
            causal=causal,
            dropout=dropout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )
        self.active_heads, self.renormalize = -(-heads // 2) if active_heads is None else active_heads, renormalize
        require(
            0 < self.active_heads <= heads,
            self._name,
            f"active_heads {self.active_heads} of heads {heads}",
            "give a number from 1 to heads",
        )
        self.router = nn.Linear(dim, heads, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.router.weight)

    def reset_parameters(self) -> None:
        """Glorot-uniform for each head's projections, smaller by √2 for the shared ones; the router starts at zero."""
        bound = (6 / (self.dim + self.head_dim)) ** 0.5
        for own in (self.query, self.output):
            nn.init.uniform_(own.weight, -bound, bound)
        for shared in (self.key, self.value):
            nn.init.xavier_uniform_(shared.weight, gain=2**-0.5)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        source = self.checked_source(x, context, mask, positions)
        return self.mix(x, self.key(source)[:, None], self.value(source)[:, None], self.full_mask(mask))

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        """The weights of all heads times w, 0 where a token does not choose the head, and the values."""
        weights, value = super().attention_map(x, context, mask=mask, positions=positions)
        routing = self.routing(x)
        of_heads = torch.zeros_like(routing.logits).scatter(-1, routing.chosen, routing.weights).to(weights.dtype)
        return weights * rearrange(of_heads, "batch length heads -> batch heads length 1"), value

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache]:
        self.check_step(x, self.dim, state.key.shape[0])
        source = self.checked_source(x, None, None, None)
        state = state.append(self.key(source)[:, None], self.value(source)[:, None])
        return self.mix(x, state.key, state.value, self.full_mask(None)), state

    def mix(self, x: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Float[Tensor, "batch length dim"]:
        """What the chosen heads of each token read and write."""
        routing = self.routing(x)
        plan = Dispatch.of(routing.chosen.flatten(), self.heads)
        queries = self.query.weight.unflatten(0, (self.heads, self.head_dim))
        outputs = rearrange(self.output.weight, "dim (heads width) -> heads dim width", heads=self.heads)
        tokens = plan.pair // self.active_heads
        query = plan.multiply(x.flatten(0, 1).index_select(0, tokens), queries).index_select(0, plan.slot)
        query = query.view(*routing.chosen.shape, self.head_dim).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, value, mask=mask, dropout=dropout).transpose(1, 2)
        weighted = (mixed * routing.weights[..., None].to(mixed.dtype)).flatten(0, 2)
        # Slots left empty add nothing to their token. One tensor of a row per slot, and none of a row per pair.
        filled = torch.zeros_like(plan.pair, dtype=torch.bool).index_fill(0, plan.slot, True)
        rows = weighted.index_select(0, plan.pair) * filled[:, None]
        made = plan.multiply(rows, outputs)
        return torch.zeros_like(x.flatten(0, 1), dtype=made.dtype).index_add(0, tokens, made).view_as(x)

    def routing(self, x: Float[Tensor, "batch length dim"]) -> Routing:
        """The heads of the tokens `x`, in at least float32; `balance_loss` and `z_loss` take it."""
        dtype = statistics_dtype(x.dtype)
        with without_autocast(x.device):
            logits = F.linear(x.to(dtype), self.router.weight.to(dtype))
            weights, chosen = logits.softmax(-1).topk(self.active_heads, dim=-1)
            if self.renormalize:
                total = weights.sum(-1, keepdim=True)
                weights = weights / (total.detach() if self.training else total)
            return Routing(chosen, weights, logits)

    def checked_source(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None
    ) -> Float[Tensor, "batch keys context_dim"]:
        """What keys and values are made of."""
        self.check_tokens(x, context, mask, positions, takes_positions=False)
        self.check_width(x, self.dim)
        require(
            context is not None or self.context_dim == self.dim,
            self._name,
            f"no context, built with context_dim {self.context_dim} beside dim {self.dim}",
            "give a context, or build without context_dim",
        )
        source = x if context is None else context
        self.check_width(source, self.context_dim, name="x" if context is None else "context")
        return source
