"""Keys and values of the tokens seen so far, for decoding step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class KeyValueCache:
    """A value: `append` returns a new cache and leaves this one usable, so that decoding may branch.

    Caches that follow each other share one buffer that doubles when full; a branch from an old one copies it first.
    """

    key_buffer: Float[Tensor, "batch key_heads capacity head_dim"]
    value_buffer: Float[Tensor, "batch key_heads capacity value_dim"]
    length: int = 0
    # How far the shared buffer is written, by whichever cache went furthest.
    _written: list[int] = field(default_factory=lambda: [0])

    @classmethod
    def empty(
        cls,
        batch: int,
        key_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> KeyValueCache:
        """A cache of no tokens."""
        key = torch.empty(batch, key_heads, 0, head_dim, device=device, dtype=dtype)
        return cls(key, key.new_empty(batch, key_heads, 0, head_dim if value_dim is None else value_dim))

    @property
    def key(self) -> Float[Tensor, "batch key_heads length head_dim"]:
        return self.key_buffer[:, :, : self.length]

    @property
    def value(self) -> Float[Tensor, "batch key_heads length value_dim"]:
        return self.value_buffer[:, :, : self.length]

    def append(
        self,
        key: Float[Tensor, "batch key_heads new head_dim"],
        value: Float[Tensor, "batch key_heads new value_dim"],
    ) -> KeyValueCache:
        """The cache with `new` more tokens."""
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (key, value, self.key_buffer, self.value_buffer)
        ):
            # Autograd must not see a buffer overwritten.
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
            return KeyValueCache(key, value, key.shape[2], [key.shape[2]])
        end = self.length + key.shape[2]
        cache = self
        if end > self.key_buffer.shape[2] or self._written[0] != self.length:
            cache = self._moved(max(16, 1 << (end - 1).bit_length()))
        cache.key_buffer[:, :, self.length : end] = key
        cache.value_buffer[:, :, self.length : end] = value
        cache._written[0] = end
        return KeyValueCache(cache.key_buffer, cache.value_buffer, end, cache._written)

    def _moved(self, capacity: int) -> KeyValueCache:
        def copied(buffer: Tensor) -> Tensor:
            larger = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
            larger[:, :, : self.length] = buffer[:, :, : self.length]
            return larger

        return KeyValueCache(copied(self.key_buffer), copied(self.value_buffer), self.length, [self.length])
