"""The gate of SeerAttention: queries and keys pooled over blocks, projected, compared."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.ops.precision import exact, statistics_dtype


class AttnGate(nn.Module):
    """W_q and W_k of pooled queries and keys, for each query head."""

    def __init__(
        self,
        heads: int,
        head_dim: int,
        gate_dim: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(heads, head_dim, gate_dim, device=device, dtype=dtype))
        self.key = nn.Parameter(torch.empty(heads, 3 * head_dim, gate_dim, device=device, dtype=dtype))
        for weight in (self.query, self.key):
            bound = (6 / (weight.shape[1] + gate_dim)) ** 0.5
            nn.init.uniform_(weight, -bound, bound)

    def queries(self, query: Tensor, size: int, real: Tensor) -> Float[Tensor, "batch heads rows gate_dim"]:
        """Means of `size` consecutive queries, projected; in at least float32."""
        tokens, real = _blocks(query, size, real)
        return _projected(_mean(tokens, real), self.query)

    def keys(self, key: Tensor, size: int, real: Tensor) -> Float[Tensor, "batch heads blocks gate_dim"]:
        """Largest, smallest and mean features of `size` consecutive keys, projected; in at least float32."""
        tokens, real = _blocks(key, size, real)
        tokens, empty = tokens.to(statistics_dtype(key.dtype)), ~real.any(-2)
        highest = tokens.masked_fill(~real, -torch.inf).amax(-2).masked_fill(empty, 0.0)
        lowest = tokens.masked_fill(~real, torch.inf).amin(-2).masked_fill(empty, 0.0)
        pooled = torch.cat([highest, lowest, _mean(tokens, real)], -1)
        return _projected(pooled.repeat_interleave(self.key.shape[0] // key.shape[1], dim=1), self.key)


@exact
def gate_logits(query: Tensor, key: Tensor) -> Float[Tensor, "batch heads rows blocks"]:
    """Scaled products of the gate's queries and keys."""
    return query @ key.mT * query.shape[-1] ** -0.5


def known_log_softmax(logits: Tensor, known: Tensor) -> Tensor:
    """Over what is known; −∞ elsewhere, and everywhere in a row that knows nothing."""
    kept = known | ~known.any(-1, keepdim=True)
    return logits.masked_fill(~kept, -torch.inf).log_softmax(-1).masked_fill(~known, -torch.inf)


def _blocks(x: Tensor, size: int, real: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens as (batch, heads, blocks, size, width), and which are tokens and no padding, as they broadcast."""
    missing = -x.shape[2] % size
    tokens = F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, size))
    return tokens, F.pad(real, (0, missing)).unflatten(-1, (-1, size))[:, None, ..., None]


@exact
def _mean(tokens: Tensor, real: Tensor) -> Tensor:
    total = tokens.to(statistics_dtype(tokens.dtype)).masked_fill(~real, 0.0).sum(-2)
    return total / real.sum(-2).clamp(min=1)


@exact
def _projected(pooled: Tensor, weight: Tensor) -> Tensor:
    return pooled @ weight.to(pooled.dtype)
