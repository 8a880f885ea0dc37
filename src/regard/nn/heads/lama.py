"""Low-rank attention to a global context (LAMA). "Low Rank Factorization for Compact Multi-Head Self-Attention", Mehta,
Rangwala & Ramakrishnan, 2019, arXiv 1912.00835.

    u_t = tanh(W h_t + b)                      h_t: the tokens, d wide
    g_t = tanh(Pᵀ c ∘ Qᵀ u_t)                  c: the global context; P, Q: d × m, one column for each distribution
    a_i = softmax over t of (g_t / ‖g_t‖₂)_i   m distributions over the tokens
    s_i = Σ_t a_ti h_t                         the columns of the structured sentence embedding
    y   = [s_1, …, s_m] W^O                    the same for every token

The affinity cᵀ W_i u_t of each head is factorised to rank one, W_i = p_i q_iᵀ, so that all m of them take 2 d m
parameters instead of m d². Nothing is compared pair by pair: one context asks all tokens. It is learned, or the mean of
the tokens (the paper's LAMA + ctx).

Cost: time O(n (d² + m d)), memory O(n (d + m)).

Differences: the paper classifies documents by the m vectors; `pool` gives them. So that it can stand where attention
stands, `forward` hands their projection to every token. The transformation that the paper calls an MLP has one layer,
and ``transform=False`` leaves it out. The norm is over the heads of a token, wherefore there are two at least.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.mechanism import Mechanism
from regard.ops.attention import attention_weights
from regard.ops.checks import one_of, require
from regard.ops.masks import Padding


@register(
    "lama",
    paper="lama",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self",),
        time="n*d*d + n*d*rank",
        memory="n*d + n*rank",
        padding=True,
        attention_map=True,
        exact=True,
        permutation="invariant",
        options=(OptionSet({"rank": 5, "global_context": "mean", "transform": False}),),
    ),
)
class LowRankGlobalAttention(Mechanism):
    """Several distributions over the tokens by rank-one products with one global context.

    Args:
        dim: width of the tokens.
        rank: number m of distributions, the rank of the factorisation: free of `dim`, 2 or more.
        global_context: ``"learned"`` or ``"mean"``, what the tokens are compared with.
        transform: whether tokens pass a layer with tanh before they are scored.
    """

    def __init__(
        self,
        dim: int,
        *,
        rank: int = 8,
        global_context: Literal["learned", "mean"] = "learned",
        transform: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(dim > 0, self._name, f"dim {dim}", "give a positive width")
        require(rank > 1, self._name, f"rank {rank}", "give 2 or more: the norm leaves of a single score its sign")
        one_of(self._name, "global_context", global_context, ("learned", "mean"))
        self.dim, self.rank = dim, rank
        factory = {"device": device, "dtype": dtype}
        self.global_context = nn.Parameter(torch.empty(dim, **factory)) if global_context == "learned" else None
        self.transform = nn.Sequential(nn.Linear(dim, dim, **factory), nn.Tanh()) if transform else nn.Identity()
        self.context_factor = nn.Linear(dim, rank, bias=False, **factory)
        self.token_factor = nn.Linear(dim, rank, bias=False, **factory)
        self.output = nn.Linear(rank * dim, dim, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform weights, zero biases, a normal context."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.global_context is not None:
            nn.init.normal_(self.global_context)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Tensor | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """The projected embedding of the sequence, for every token of it; `mask` may be a ``Padding``."""
        self.check_arguments(x, context, mask, positions)
        return self.output(self.pool(x, mask).flatten(1))[:, None].repeat(1, x.shape[1], 1)

    def pool(
        self, x: Float[Tensor, "batch length dim"], mask: Padding | None = None
    ) -> Float[Tensor, "batch rank dim"]:
        """The structured sentence embedding s: what each distribution takes from the tokens."""
        self.check_arguments(x, None, mask, None)
        return self.weights(x, mask).squeeze(2) @ _real(x, mask)

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch rank length length"], Float[Tensor, "batch rank length dim"]]:
        """The distributions, the same for every token that looks, and the tokens they mix."""
        self.check_arguments(x, context, mask, positions)
        weights = self.weights(x, mask).expand(-1, -1, x.shape[1], -1)
        return weights, _real(x, mask)[:, None].expand(-1, self.rank, -1, -1)

    def combine(self, mixed: Float[Tensor, "batch rank length dim"]) -> Float[Tensor, "batch length dim"]:
        """Concatenate the distributions' vectors and project."""
        return self.output(mixed.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, mask: Padding | None) -> Float[Tensor, "batch rank 1 length"]:
        """The distributions a over the tokens that are not padding."""
        context = self.context_factor(_mean(x, mask) if self.global_context is None else self.global_context[None])
        scores = torch.tanh(context[:, None] * self.token_factor(self.transform(x)))
        # As keys of width one, asked by ones.
        keys = F.normalize(scores, dim=-1, eps=1e-6).mT[..., None]
        return attention_weights(torch.ones_like(keys[:, :, :1]), keys, mask=mask, scale=1.0).to(x.dtype)

    def check_arguments(
        self, x: Tensor, context: Tensor | None, mask: Padding | None, positions: Tensor | None
    ) -> None:
        """Raise ValueError for what the contract does not declare."""
        self.check_tokens(x, context, mask, positions, takes_positions=False)
        self.check_width(x, self.dim)
        if mask is not None:
            mask.validate(x.shape[0], self.rank, x.shape[1], x.shape[1])


def _real(x: Tensor, mask: Padding | None) -> Tensor:
    """Zeros for padding, which no weight of zero would make of what is not finite."""
    return x if mask is None else x.masked_fill(~mask.to(x.device).real(x.shape[1])[..., None], 0.0)


def _mean(x: Tensor, mask: Padding | None) -> Tensor:
    """The mean of the tokens that are not padding."""
    if mask is None:
        return x.mean(1)
    return _real(x, mask).sum(1) / mask.to(x.device).lengths.clamp(1, x.shape[1])[:, None].to(x.dtype)
