"""Attention whose scores are a learned function of each pair of query and key instead of a dot product."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float, Int
from torch import Tensor

from regard.nn.attention import Attention
from regard.ops.attention import attention, attention_weights
from regard.ops.biases import PairScores
from regard.ops.cache import KeyValueCache
from regard.ops.masks import Mask


class PairAttention(Attention, ABC):
    """The softmax grammar with `scores` in place of the scaled dot product.

    A mechanism of it gives in `split` what a pair's score needs of its query and of its key, `score_dim` wide, beside
    the values. The function runs a tile at a time, so that nothing of the size of all pairs is kept.
    """

    @property
    @abstractmethod
    def score_dim(self) -> int:
        """Width of what `split` gives for queries and keys."""

    @abstractmethod
    def scores(
        self, query: Float[Tensor, "batch heads length score_dim"], key: Float[Tensor, "batch heads keys score_dim"]
    ) -> PairScores:
        """The score of each pair, in at least float32."""

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        query, key, value = self.project(x, context, mask, positions)
        dropout = self.dropout if self.training else 0.0
        return self.combine(self.mix(query, key, value, mask, dropout))

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        query, key, value = self.project(x, context, mask, positions)
        weights = attention_weights(
            *_nothing(query, key),
            mask=self.full_mask(mask),
            bias=self.scores(query, key),
            normalizer=self.normalizer,
        )
        return weights.to(value.dtype), value

    def init_state(self, batch: int) -> KeyValueCache:
        weight = self.value.weight
        return KeyValueCache.empty(
            batch, self.heads, self.score_dim, value_dim=self.head_dim, device=weight.device, dtype=weight.dtype
        )

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache]:
        query, key, value = self.project_step(x, state.length, state.key.shape[0])
        state = state.append(key, value)
        return self.combine(self.mix(query, state.key, state.value, None, 0.0)), state

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, dropout: float) -> Tensor:
        """The values, weighted."""
        return attention(
            *_nothing(query, key),
            value,
            mask=self.full_mask(mask),
            bias=self.scores(query, key),
            normalizer=self.normalizer,
            dropout=dropout,
        )


def _nothing(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose dot products are 0: all of the score is what is added to it."""
    return query.new_zeros(*query.shape[:3], 1), key.new_zeros(*key.shape[:3], 1)
