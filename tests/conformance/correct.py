"""A small correct mechanism to break: plain multi-head attention through the door, and the means to declare one.

Each stage is a method, so that a defect is a few lines. Nothing here enters the register.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalogue import Card, Contract
from regard.ops.attention import attention, attention_weights
from regard.ops.checks import require
from regard.ops.masks import Causal, Mask

CONTRACT = Contract(
    input="tokens",
    patterns=("noncausal self", "causal self"),
    memory="n*d",
    padding=True,
    packed=True,
    any_mask=True,
    step=True,
    state="linear",
    attention_map=True,
    exact=True,
    permutation="equivariant",
)


def declares(contract: Contract) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Give a class a card of its own, outside the register."""

    def give(cls: type[nn.Module]) -> type[nn.Module]:
        cls.card = Card(cls.__name__, cls, (), contract)
        return cls

    return give


@declares(CONTRACT)
class Correct(nn.Module):
    """Multi-head attention."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 4,
        causal: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        require(dim > 0 and heads > 0, name, f"dim {dim} with heads {heads}", "give positive sizes")
        require(dim % heads == 0, name, f"heads {heads} for dim {dim}", "give a divisor")
        require(0.0 <= dropout < 1.0, name, f"dropout {dropout}", "give a probability in [0, 1)")
        self.dim, self.heads, self.causal, self.dropout = dim, heads, causal, dropout
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.output = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.extend(device=device, dtype=dtype)

    def extend(self, **factory: Any) -> None:
        """Anything more that a derived class holds."""

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None) -> Tensor:
        query, key, value = self.heads_of(x, context, mask)
        return self.combine(self.mix(query, key, value, self.full_mask(mask)))

    def heads_of(self, x: Tensor, context: Tensor | None, mask: Mask | None) -> tuple[Tensor, Tensor, Tensor]:
        name = type(self).__name__
        given = f"x of shape {tuple(x.shape)} and dtype {x.dtype}"
        fits = x.ndim == 3 and x.shape[-1] == self.dim and x.is_floating_point()
        require(fits, name, given, f"give floats of width {self.dim}")
        require(context is None, name, "context for a self-attention", "leave it out")
        taken = mask is None or isinstance(mask, Mask)
        require(taken, name, f"mask is a {type(mask).__name__}", "wrap it in Dense")
        return self.project(x)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def full_mask(self, mask: Mask | None) -> Mask | None:
        if not self.causal:
            return mask
        return Causal() if mask is None else Causal() & mask

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        return attention(query, key, value, mask=mask, dropout=self.dropout if self.training else 0.0)

    def combine(self, mixed: Tensor) -> Tensor:
        return self.output(mixed.transpose(1, 2).flatten(2))

    def attention_map(
        self, x: Tensor, context: Tensor | None = None, *, mask: Mask | None = None
    ) -> tuple[Tensor, Tensor]:
        query, key, value = self.heads_of(x, context, mask)
        return attention_weights(query, key, mask=self.full_mask(mask)).to(value.dtype), value

    def init_state(self, batch: int) -> tuple[Tensor, Tensor]:
        empty = self.qkv.weight.new_zeros(batch, self.heads, 0, self.dim // self.heads)
        return empty, empty

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        require(self.causal, type(self).__name__, "step with causal=False", "build with causal=True")
        query, key, value = self.heads_of(x, None, None)
        fits = x.shape[0] == state[0].shape[0]
        require(fits, type(self).__name__, f"x has batch {x.shape[0]}, the state another", "keep the batch")
        key, value = (torch.cat(pair, dim=2) for pair in zip(state, (key, value), strict=True))
        return self.combine(self.mix(query, key, value, Causal())), (key, value)
