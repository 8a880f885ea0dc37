"""Neural attention. "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models", DiGiugno
and Mahmood, 2025, arXiv 2502.17206.

    q', k' = W_q' q + b_q', W_k' k + b_k'                                     narrowed to width d', alike in all heads
    s_ij   = w_3 · ReLU(W_2 ReLU(W_1 [q'_i; k'_j] + b_1) + b_2),      y = softmax(s) V W_o

A feed-forward network of every pair stands in place of the dot product. W_1 of a pair is a part of the query plus a
part of the key, so that only the sum and what follows is done pair by pair, a tile at a time (`NeuralScores`): neither
the n × m × d' hidden values nor the scores are ever kept, forward or backward.

Cost: time O(n m (d + h d'²)), memory O((n + m) d).

Differences: the network is that of the release, the same in its models of text and of images: two hidden layers, of d'
and d'/2, and d' = head_dim / 32, which is 2 for its heads of 64 and our default. The paper's formula, as far as it
could be read, has one, w_aᵀ σ(W_h [q_i; k_j] + b_h) + b_a, which the two contain: a large b_2 makes the second ReLU
the identity. Neither has a factor 1/√d, which the release's dot products do have. w_3 has no bias, where the softmax
takes it off again. W_2 starts non-positive and b_2 non-negative, of the size that torch gives them: with d' = 2 they
end in a single unit, and as the release starts one network in three has a dead one and no gradient at all; this way it
is alive where the first layer is silent. The release has such a layer first in a model, then dot products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, CROSS
from regard.nn.pair_attention import PairAttention
from regard.ops.biases import PairScores
from regard.ops.checks import require
from regard.ops.precision import statistics_dtype


@dataclass(frozen=True, eq=False, repr=False)
class NeuralScores(PairScores):
    """The network's last layers over the sum of a query's part and a key's."""

    weight: Float[Tensor, "narrow hidden"]
    bias: Float[Tensor, " narrow"]
    last: Float[Tensor, " narrow"]

    def pair(self, query: Tensor, key: Tensor, head: Tensor) -> Tensor:
        hidden = torch.relu(query + key)
        return torch.relu(hidden @ self.weight.mT + self.bias) @ self.last


@register(
    "neural_attention",
    paper="neural_attention",
    contract=replace(
        ATTENTION,
        time="n*m*(d + h*projection_dim*projection_dim)",
        options=(OptionSet({"projection_dim": 6, "head_dim": 6, "dropout": 0.1, "bias": True}), CROSS),
    ),
)
class NeuralAttention(PairAttention):
    """A small feed-forward network of query and key in place of their dot product.

    Args:
        projection_dim: d', the width queries and keys are narrowed to.

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        projection_dim: int = 2,
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
        require(projection_dim > 1, self._name, f"projection_dim {projection_dim}", "give at least 2")
        self.projection_dim, factory = projection_dim, {"device": device, "dtype": dtype}
        self.narrow_query = nn.Linear(self.head_dim, projection_dim, **factory)
        self.narrow_key = nn.Linear(self.head_dim, projection_dim, **factory)
        self.first = nn.Linear(2 * projection_dim, projection_dim, **factory)
        self.second = nn.Linear(projection_dim, projection_dim // 2, **factory)
        self.last = nn.Linear(projection_dim // 2, 1, bias=False, **factory)
        with torch.no_grad():
            self.second.weight.abs_().neg_()
            self.second.bias.abs_()

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The query's and the key's part of the first layer, and values."""
        query, key, value = super().split(x, source)
        of_query, of_key = self.first.weight.chunk(2, dim=1)
        query = nn.functional.linear(self.narrow_query(query), of_query, self.first.bias)
        return query, nn.functional.linear(self.narrow_key(key), of_key), value

    @property
    def score_dim(self) -> int:
        return self.projection_dim

    def scores(self, query: Tensor, key: Tensor) -> NeuralScores:
        """The network of each pair, in at least float32."""
        precise = statistics_dtype(query.dtype)
        parts = query, key, self.second.weight, self.second.bias, self.last.weight[0]
        return NeuralScores(*(part.to(precise) for part in parts))
