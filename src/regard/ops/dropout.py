"""Dropout on attention weights whose pattern depends on (seed, sample, head, query, key) only.

So every engine, tile size and recomputation in a backward drops the same weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def draw_seed(device: torch.device) -> Int[Tensor, ""]:
    """A seed from torch's own generator: `torch.manual_seed` makes the pattern reproducible."""
    return torch.randint(2**31 - 1, (), device=device)


def keep_tile(
    seed: Int[Tensor, ""],
    probability: float,
    batch: Int[Tensor, ...],
    head: Int[Tensor, ...],
    query: Int[Tensor, ...],
    key: Int[Tensor, ...],
) -> Float[Tensor, ...]:
    """``1 / (1 − probability)`` where a weight is kept and 0 where it is dropped, over index tensors that broadcast."""
    stream = _mix(seed.to(torch.int32) ^ _mix(_mix(batch.to(torch.int32)) ^ head.to(torch.int32)))
    bits = _mix(_mix(stream ^ query.to(torch.int32)) ^ _mix(key.to(torch.int32)))
    kept = (bits & 0x7FFFFFFF) >= int(probability * 2**31)
    return kept.to(torch.float32) / (1.0 - probability)


def _mix(value: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 over 32-bit integers (wrapping products, logical shifts)."""
    value = (value ^ ((value >> 16) & 0xFFFF)) * -2048144789
    value = (value ^ ((value >> 13) & 0x7FFFF)) * -1028477387
    return value ^ ((value >> 16) & 0xFFFF)
