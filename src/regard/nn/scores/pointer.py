"""Pointer attention. "Pointer Networks", Vinyals et al., 2015, arXiv 1506.03134.

    u_ij = vᵀ tanh(W_1 e_j + W_2 d_i)
    p(C_i = j | C_1 … C_(i−1), P) = softmax(u_i)_j

e_j are the inputs (`context`), d_i the decoder's states (`x`). The distribution over inputs is itself the output: there
are as many classes as there are inputs, however many these are. `log_distribution` gives it; `forward` mixes the inputs
by it, which is the content-based attention that the paper starts from. `regard.models.pointer` has the whole network.

Cost: time O(n m d), memory O((n + m) d) for the mix and O(n m) for the distribution.

Differences: several heads, of which the paper has one, each have a v and their W_1, W_2; the distribution is then their
mean. What is mixed passes the value and output projections that every mechanism here has.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, CROSS
from regard.nn.pair_attention import PairAttention
from regard.ops.biases import AdditiveScores
from regard.ops.checks import require
from regard.ops.masks import Mask
from regard.ops.precision import statistics_dtype

INITIAL = 0.08
"""The paper draws every weight uniformly from −0.08 to 0.08."""


@register(
    "pointer",
    paper="pointer",
    contract=replace(
        ATTENTION,
        options=(
            OptionSet({"heads": 2, "hidden_dim": 6, "head_dim": 5, "dropout": 0.1, "bias": True}),
            CROSS,
        ),
    ),
)
class PointerAttention(PairAttention):
    """Additive attention whose weights are the answer: a distribution over the inputs.

    Args:
        heads: number of pointers, whose mean is the distribution.
        hidden_dim: width of v; that of a head by default.

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
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
        self.hidden_dim = self.head_dim if hidden_dim is None else hidden_dim
        require(self.hidden_dim > 0, self._name, f"hidden_dim {hidden_dim}", "give a positive width")
        factory = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, heads * self.hidden_dim, bias=bias, **factory)
        # A bias here would be that of the queries once more.
        self.key = nn.Linear(self.context_dim, heads * self.hidden_dim, bias=False, **factory)
        self.vector = nn.Parameter(torch.empty(heads, self.hidden_dim, **factory))
        for weight in (self.query.weight, self.key.weight, self.vector):
            nn.init.uniform_(weight, -INITIAL, INITIAL)
        if bias:
            nn.init.zeros_(self.query.bias)

    @property
    def score_dim(self) -> int:
        return self.hidden_dim

    def scores(self, query: Tensor, key: Tensor) -> AdditiveScores:
        """u of each pair, in at least float32."""
        precise = statistics_dtype(query.dtype)
        return AdditiveScores(query.to(precise), key.to(precise), self.vector.to(precise))

    def log_distribution(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length keys"]:
        """log p over the inputs, for each query, in at least float32; −∞ for what the mask forbids.

        Inputs that have been chosen are left out by ``mask=~Dense(chosen)``; what remains sums to 1 again. Where
        nothing remains all of it is −∞.
        """
        query, key, _ = self.project(x, context, mask, positions)
        (batch, heads, queries), keys = query.shape[:3], key.shape[2]
        scores = self.scores(query, key).dense(queries, keys, batch=batch, heads=heads, device=x.device)
        full = self.full_mask(mask)
        if full is None:
            return _mean_over_heads(scores.log_softmax(-1))
        full.validate(batch, heads, queries, keys)
        forbidden = ~full.to(x.device).dense(queries, keys, batch=batch, heads=heads, device=x.device)
        nothing = forbidden.all(-1, keepdim=True)
        scores = scores.masked_fill(forbidden, -torch.inf).masked_fill(nothing, 0.0)
        return _mean_over_heads(scores.log_softmax(-1).masked_fill(forbidden, -torch.inf))


def _mean_over_heads(log_weights: Float[Tensor, "batch heads length keys"]) -> Float[Tensor, "batch length keys"]:
    heads = log_weights.shape[1]
    return log_weights[:, 0] if heads == 1 else log_weights.logsumexp(1) - math.log(heads)
