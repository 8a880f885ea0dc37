"""One attention call, checked and described: what every engine receives and what `auto` decides by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.ops.biases import Bias
from regard.ops.masks import Mask
from regard.ops.normalizers import Normalizer, Softmax


@dataclass(frozen=True)
class Call:
    """The arguments of `attention`, validated; tensors of mask and bias are on the query's device."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None
    bias: Bias | None
    normalizer: Normalizer
    scale: float
    dropout: float
    needs_lse: bool

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        return self.key.shape[1]

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def needs_grad(self) -> bool:
        tensors = [
            self.query,
            self.key,
            self.value,
            *(self.bias.flatten()[1] if self.bias is not None else ()),
        ]
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    @property
    def is_softmax(self) -> bool:
        return isinstance(self.normalizer, Softmax)

    def dense_mask(self) -> Tensor | None:
        """The mask as booleans (B or 1, H or 1, Nq, Nk), or None."""
        if self.mask is None:
            return None
        return self.mask.dense(self.queries, self.keys, batch=self.batch, heads=self.heads, device=self.query.device)

    def dense_bias(self) -> Tensor | None:
        """The bias as numbers (B or 1, H or 1, Nq, Nk), or None."""
        if self.bias is None:
            return None
        return self.bias.dense(self.queries, self.keys, batch=self.batch, heads=self.heads, device=self.query.device)
