"""Index tensors over (batch, head, query, key), which masks, biases and dropout are asked about."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

Span = tuple[int, int]


def index_grid(
    batch: Span, heads: Span, queries: Span, keys: Span, device: torch.device | None
) -> tuple[Int[Tensor, "b 1 1 1"], Int[Tensor, "h 1 1"], Int[Tensor, "q 1"], Int[Tensor, " k"]]:
    """Four ranges that broadcast together to (batch, heads, queries, keys)."""
    return (
        torch.arange(*batch, device=device).view(-1, 1, 1, 1),
        torch.arange(*heads, device=device).view(-1, 1, 1),
        torch.arange(*queries, device=device).view(-1, 1),
        torch.arange(*keys, device=device),
    )


def full_tile(answer: Tensor, queries: Span, keys: Span) -> Tensor:
    """An answer over such a grid as (batch or 1, heads or 1, queries, keys)."""
    shape = queries[1] - queries[0], keys[1] - keys[0]
    answer = answer.expand(*answer.shape[:-2], *shape)
    return answer.view(*(1,) * (4 - answer.ndim), *answer.shape) if answer.ndim < 4 else answer


def hiding(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where allowed, −∞ elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, -torch.inf)
