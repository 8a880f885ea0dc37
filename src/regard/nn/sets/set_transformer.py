"""Set attention. "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural Networks", Lee et al.,
2018, arXiv 1810.00825.

    Multihead(X, Y) = [softmax(X W_j^Q (Y W_j^K)ᵀ / √d) Y W_j^V]_j W^O        of width d / h each, but scaled by √d
    MAB(X, Y)       = LayerNorm(H + rFF(H)),  H = LayerNorm(X + Multihead(X, Y))
    SAB(X)          = MAB(X, X)
    ISAB_m(X)       = MAB(X, MAB(I, X))              I ∈ R^(m×d): learned inducing points
    PMA_k(Z)        = MAB(S, rFF(Z))                 S ∈ R^(k×d): learned seeds
    rFF(X)          = max(X W + b, 0)                on every row alone

`SetAttention` is MAB, and SAB without a context; `InducedSetAttention` is ISAB, `AttentionPooling` PMA. MAB is
equivariant in X and invariant in Y: so SAB and ISAB permute their outputs with their tokens, and PMA does not care.
`regard.models.sets` has the whole Set Transformer. These are blocks: residuals and feed-forward are inside.

Cost: SAB time O(n² d), ISAB O(n m d), PMA O(n k d), beside O(n d²) for the projections; memory O(n d).

Differences: none from the paper, which leaves rFF open: it is the authors' single rectified layer. Their release adds
the projected query X W^Q in place of X, has no W^O, no rFF in PMA, biases in the projections (``bias=True``), and no
LayerNorm unless told (``norm=False``). I and S start as they do there, other weights as everywhere in this library.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalogue import Contract, OptionSet, register
from regard.nn.heads.multi_head import MultiHeadAttention
from regard.nn.mechanism import Mechanism
from regard.ops.checks import require
from regard.ops.masks import Mask, Padding


class FullWidthAttention(MultiHeadAttention):
    """Multi-head attention with scores scaled by the width of all heads together."""

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().split(x, source)
        return query * math.sqrt(self.head_dim / self.dim), key, value


class RowFeedForward(nn.Module):
    """One rectified linear layer on every row."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        return torch.relu(self.linear(x))


@register(
    "set_attention",
    paper="set_transformer",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self", "noncausal cross"),
        time="n*m*d + (n+m)*d*d",
        memory="(n+m)*d",
        padding=True,
        packed=True,
        any_mask=True,
        exact=True,
        permutation="equivariant",
        options=(
            # A key's bias adds the same to every score of a row, which softmax takes off again.
            OptionSet({"bias": True, "norm": False}, {"frozen": ("attention.key.bias",)}),
        ),
    ),
)
class SetAttention(Mechanism):
    """A set attends to itself or to another, with residuals and a feed-forward layer: MAB and SAB.

    Args:
        dim: width of the tokens.
        heads: number of heads, a divisor of `dim`.
        norm: whether there are the two LayerNorms.
        bias: whether the projections of the attention have biases.

    `attention` is the multi-head attention inside, with its ``attention_map``.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        norm: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dim = dim
        self.attention = FullWidthAttention(dim, heads=heads, bias=bias, **factory)
        self.feed = RowFeedForward(dim, **factory)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, **factory) if norm else nn.Identity() for _ in range(2))

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Tensor | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself, or to `context`. Raises ValueError for positions."""
        self.check_tokens(x, context, mask, positions, takes_positions=False)
        self.check_width(x, self.dim)
        hidden = self.norms[0](x + self.attention(x, context, mask=mask))
        return self.norms[1](hidden + self.feed(hidden))


@register(
    "set_transformer",
    paper="set_transformer",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self",),
        time="n*inducing*d + n*d*d",
        memory="(n + inducing)*d",
        padding=True,
        permutation="equivariant",
        options=(
            OptionSet({"inducing": 3}),
            OptionSet(
                {"inducing": 1, "bias": True, "norm": False},
                # With one point to read there is nothing to choose, by queries or by keys.
                {
                    "frozen": (
                        "gather.attention.key.bias",
                        "read.attention.query.weight",
                        "read.attention.query.bias",
                        "read.attention.key.weight",
                        "read.attention.key.bias",
                    )
                },
            ),
        ),
    ),
)
class InducedSetAttention(Mechanism):
    """Learned inducing points sum up the set, and its tokens read the summary: ISAB.

    Args:
        dim: width of the tokens.
        heads: number of heads, a divisor of `dim`.
        inducing: number m of inducing points.
        norm, bias: those of `SetAttention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        inducing: int = 32,
        norm: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        require(inducing > 0, self._name, f"inducing {inducing}", "give a positive number of points")
        self.dim, self.inducing = dim, inducing
        self.gather, self.read = (SetAttention(dim, heads=heads, norm=norm, bias=bias, **factory) for _ in range(2))
        self.points = learned_points(inducing, dim, **factory)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Tensor | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself; `mask` may be a ``Padding``. Raises ValueError for anything else."""
        self.check_tokens(x, context, mask, positions, takes_positions=False)
        self.check_width(x, self.dim)
        return self.read(x, self.gather(self.points.expand(x.shape[0], -1, -1), x, mask=mask))


class AttentionPooling(Mechanism):
    """Learned seeds attend to a set of any size and become its `seeds` outputs: PMA.

    Args:
        dim: width of the tokens.
        heads: number of heads, a divisor of `dim`.
        seeds: number k of outputs.
        norm, bias: those of `SetAttention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        seeds: int = 1,
        norm: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        require(seeds > 0, self._name, f"seeds {seeds}", "give a positive number of outputs")
        self.dim = dim
        self.block = SetAttention(dim, heads=heads, norm=norm, bias=bias, **factory)
        self.feed = RowFeedForward(dim, **factory)
        self.seeds = learned_points(seeds, dim, **factory)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Padding | None = None
    ) -> Float[Tensor, "batch seeds dim"]:
        """The outputs of each set; `mask` may be a ``Padding``."""
        self.check_shape(x, "(batch, length, dim)", 3)
        self.check_width(x, self.dim)
        require(
            mask is None or isinstance(mask, Padding),
            self._name,
            lambda: f"mask {type(mask).__name__}",
            "it takes padding: seeds have no place among the tokens",
        )
        return self.block(self.seeds.expand(x.shape[0], -1, -1), self.feed(x), mask=mask)


def learned_points(
    count: int, dim: int, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    """Vectors that stand for no token, uniform to ±√(6 / ((count + 1) dim)) as the authors draw them."""
    points = torch.empty(1, count, dim, device=device, dtype=dtype)
    return nn.Parameter(nn.init.xavier_uniform_(points))
