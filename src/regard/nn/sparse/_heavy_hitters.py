"""The cache of H2O. "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", Zhang et
al., 2023, arXiv 2306.14048.

    F_i(j)  = Σ_{t ≤ i} softmax_j(q_t · k_S / √d_h)         the attention that a kept key has had, in each head
    S_i     = the last k − k/2 keys, and the k/2 of the other kept ones with the largest F_i

k is `budget`, half of it for heavy hitters and half for recent tokens as in the paper. What is evicted is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from regard.ops.attention import attention_with_lse
from regard.ops.checks import require
from regard.ops.masks import Causal, Window
from regard.ops.precision import statistics_dtype


@dataclass(frozen=True)
class HeavyHitterCache:
    """Keys and values that are kept, in their order, the attention each has had, and how many tokens were seen.

    Every sample and key head keeps its own; the attention of the query heads of a key head adds up.
    """

    key: Float[Tensor, "batch key_heads kept head_dim"]
    value: Float[Tensor, "batch key_heads kept value_dim"]
    mass: Float[Tensor, "batch key_heads kept"]
    budget: int
    length: int = 0

    @classmethod
    def empty(
        cls,
        batch: int,
        key_heads: int,
        head_dim: int,
        budget: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A cache of no tokens that will keep `budget` of them; raises ValueError unless that is positive."""
        require(budget > 0, "HeavyHitterCache", f"budget {budget}", "keep one token or more")
        none = torch.empty(batch, key_heads, 0, head_dim, device=device, dtype=dtype)
        return cls(none, none, none[..., 0].to(statistics_dtype(none.dtype)), budget)

    def attend(
        self,
        query: Float[Tensor, "batch heads new head_dim"],
        key: Float[Tensor, "batch key_heads new head_dim"],
        value: Float[Tensor, "batch key_heads new value_dim"],
    ) -> tuple[Float[Tensor, "batch heads new value_dim"], HeavyHitterCache]:
        """Causal attention of further tokens to what is kept and to themselves, and the cache after evicting.

        Tokens given at once are a prompt: they see each other whatever the budget, and are then evicted together.
        """
        key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        mixed, lse = attention_with_lse(query, key, value, mask=Causal())
        with torch.no_grad():
            mass = _received(query, key, lse)
            mass[..., : self.mass.shape[2]] += self.mass
        return mixed, self._evict(key, value, mass, self.length + query.shape[2])

    def _evict(self, key: Tensor, value: Tensor, mass: Tensor, length: int) -> HeavyHitterCache:
        count, heavy = mass.shape[2], self.budget // 2
        if count <= self.budget:
            return HeavyHitterCache(key, value, mass, self.budget, length)
        older = count - (self.budget - heavy)
        hitters = mass[..., :older].topk(heavy).indices.sort().values
        recent = torch.arange(older, count, device=mass.device).expand(*mass.shape[:2], -1)
        kept = torch.cat([hitters, recent], dim=-1)
        key, value = (tokens.gather(2, kept[..., None].expand(-1, -1, -1, tokens.shape[3])) for tokens in (key, value))
        return HeavyHitterCache(key, value, mass.gather(2, kept), self.budget, length)


def _received(query: Tensor, key: Tensor, lse: Tensor) -> Float[Tensor, "batch key_heads keys"]:
    """The attention that each key gets from all queries together, without a matrix of weights.

    ``Σ_i exp(s_ij − lse_i)`` is the exponential of a log-sum-exp over queries: attention the other way round, with lse
    as one more feature.
    """
    dtype, heads, keys = statistics_dtype(query.dtype), query.shape[1], key.shape[2]
    rows = key.to(dtype).repeat_interleave(heads // key.shape[1], dim=1)
    rows = torch.cat([rows, rows.new_ones(*rows.shape[:3], 1)], dim=-1)
    columns = torch.cat([query.to(dtype) * query.shape[3] ** -0.5, -lse[..., None].to(dtype)], dim=-1)
    _, total = attention_with_lse(rows, columns, columns[..., :1], mask=Window(0, keys), scale=1.0)
    return total.exp().unflatten(1, (key.shape[1], -1)).sum(2)
