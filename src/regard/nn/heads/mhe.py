"""Head-embedding attention. "Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient
Multi-head Attention", Xue & Aletras, 2023, arXiv 2310.07911.

    Q, K, V = x W^Q, c W^K, c W^V                   one projection to the width d of a head, shared by all n heads
    Q_h = ψ(Q, e_h^Q),  K_h = ψ(K, e_h^K),  V_h = ψ(V, e_h^V)
    head_h = softmax(Q_h K_hᵀ / √d) V_h,  y = [head_1, …, head_n] W^O

    MHE-MUL   ψ(A, e) = A ⊙ (e + 1)                  ``embedding="multiply"``
    MHE-ADD   ψ(A, e) = A + e                        ``embedding="add"``

Beside a single head of width d this takes 3 n d further parameters for queries, keys and values; multi-head attention
of width n d takes (3 n² − 3 n) d² − 3 n d more than that.

Cost: time O(n m d) and state as multi-head.

Differences: embeddings start normal with deviation 0.02, as what else is embedded in the models the paper trains.
Positions other than none are options the paper does not discuss. With ``"add"`` and no rotary positions e^K adds the
same to all scores of a row, which softmax takes off again: it is kept, since the paper counts it, and never learns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, CROSS, Attention, Position
from regard.ops.checks import one_of


@register(
    "mhe",
    paper="mhe",
    contract=replace(
        ATTENTION,
        options=(
            OptionSet({"position": "rotary"}, {"positions": True, "permutation": None}),
            OptionSet({"position": "rotary", "embedding": "add"}, {"positions": True, "permutation": None}),
            OptionSet({"position": "alibi", "embedding": "add"}, {"permutation": None, "frozen": ("key_embedding",)}),
            # A key's bias, too, adds the same to every score of a row.
            OptionSet(
                {"position": "relative", "head_dim": 6, "dropout": 0.1, "bias": True},
                {"permutation": None, "frozen": ("key.bias",)},
            ),
            CROSS,
        ),
    ),
)
class HeadEmbeddingAttention(Attention):
    """All heads share one projection and differ by a learned vector each for queries, keys and values.

    Args:
        embedding: ``"multiply"`` scales the shared features by one plus the head's vector, ``"add"`` shifts them by it.

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        position: Position | None = None,
        embedding: Literal["multiply", "add"] = "multiply",
        bias: bool = False,
        dropout: float = 0.0,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        one_of(self._name, "embedding", embedding, ("multiply", "add"))
        super().__init__(
            dim,
            heads=heads,
            kv_heads=1,
            head_dim=head_dim,
            causal=causal,
            position=position,
            bias=bias,
            dropout=dropout,
            context_dim=context_dim,
            device=device,
            dtype=dtype,
        )
        # Projected once, but every head has keys and values of its own.
        self.kv_heads = heads
        self.embedding = embedding
        factory = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, self.head_dim, bias=bias, **factory)
        self.query_embedding = nn.Parameter(torch.empty(heads, self.head_dim, **factory))
        self.key_embedding = nn.Parameter(torch.empty(heads, self.head_dim, **factory))
        self.value_embedding = nn.Parameter(torch.empty(heads, self.head_dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Projections and positions as in `Attention`, small normal head embeddings."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith("_embedding"):
                nn.init.normal_(parameter, std=0.02)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.embed(self.query(x), self.query_embedding),
            self.embed(self.key(source), self.key_embedding),
            self.embed(self.value(source), self.value_embedding),
        )

    def embed(
        self, shared: Float[Tensor, "batch length head_dim"], embedding: Float[Tensor, "heads head_dim"]
    ) -> Float[Tensor, "batch heads length head_dim"]:
        """ψ: the shared features as each head has them."""
        shared, embedding = shared[:, None], embedding[:, None]
        return shared * (embedding + 1) if self.embedding == "multiply" else shared + embedding
