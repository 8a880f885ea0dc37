"""Optimised, efficient and super attention. "You Need to Pay Better Attention: Rethinking the Mathematics of Attention
Mechanism", Hosseini & Hosseini, 2024, arXiv 2403.01643.

    standard     head_h = softmax(Q W_h^Q (K W_h^K)ᵀ / √d_h) V W_h^V,   y = [head_1, …, head_H] W^O
    optimised    V W_h^V becomes V_h, the h-th slice of V's features: two linear maps in a row, W^V and W^O, are one
    efficient    K W_h^K becomes K_h as well: W^Q and W^K are one in the scores; a single head by default
    super        efficient with values that W^A mixes along the length first, V' = W^A V, one W^A (ℓ × ℓ) for all heads;
                 lower triangular in causal use

Parameters: 3 d² (optimised), 2 d² (efficient) and 2 d² + ℓ² (super) where standard attention has 4 d².

Cost: time O(n m d), memory O(n d); super O(m² d) more for the alignment, memory O(n d + ℓ²). Super attention is for
sequences of one length: it takes shorter ones, which the first rows and columns of W^A align, and refuses longer ones.

With more heads than one, efficient and super attention slice keys and values like optimised attention.

Differences: padding is left out of the alignment, and packed sequences are aligned each by itself. Positions other than
none are options of the first two that the paper does not discuss.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, ROTARY, Attention, Position
from regard.ops.attention import attention
from regard.ops.cache import KeyValueCache
from regard.ops.checks import require
from regard.ops.masks import Mask, Padding, Segments

_UNLIKE = {"permutation": None}


@register(
    "optimised_attention",
    paper="super_attention",
    contract=replace(
        ATTENTION,
        options=(
            ROTARY,
            OptionSet({"position": "alibi", "dropout": 0.1}, _UNLIKE),
            # A key's bias adds the same to every score of a row, which softmax takes off again.
            OptionSet({"position": "relative", "bias": True}, {**_UNLIKE, "frozen": ("key.bias",)}),
        ),
    ),
)
class OptimisedAttention(Attention):
    """Multi-head attention without a value projection: heads mix slices of the tokens themselves."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        position: Position | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            causal=causal,
            position=position,
            bias=bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.value = nn.Identity()

    def reset_parameters(self) -> None:
        """Those of `Attention`, for the projections that are left."""
        for projection in self.children():
            if isinstance(projection, nn.Linear):
                nn.init.xavier_uniform_(projection.weight)
                if projection.bias is not None:
                    nn.init.zeros_(projection.bias)
        if self.position == "relative":
            nn.init.normal_(self.relative, std=self.dim**-0.5)


@register(
    "efficient_head",
    paper="super_attention",
    contract=replace(
        ATTENTION,
        options=(
            replace(ROTARY, arguments={"position": "rotary", "heads": 1}),
            OptionSet({"position": "alibi", "dropout": 0.1}, _UNLIKE),
            OptionSet({"position": "relative", "bias": True}, _UNLIKE),
        ),
    ),
)
class EfficientHeadAttention(OptimisedAttention):
    """Attention with one projection of queries and one of outputs: keys and values are the tokens themselves."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        causal: bool = False,
        position: Position | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            causal=causal,
            position=position,
            bias=bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.key = nn.Identity()

    def init_state(self, batch: int) -> KeyValueCache:
        weight = self.query.weight
        return KeyValueCache.empty(batch, self.heads, self.head_dim, device=weight.device, dtype=weight.dtype)


@register(
    "super_attention",
    paper="super_attention",
    contract=replace(
        ATTENTION,
        memory="max((n+m)*d, m*m)",
        any_mask=False,
        permutation=None,
        options=(OptionSet({"heads": 1, "max_length": 2100, "dropout": 0.1, "bias": True}),),
    ),
)
class SuperAttention(EfficientHeadAttention):
    """Efficient attention whose values a learned matrix mixes along the length first.

    Args:
        max_length: the longest sequence it takes (of the context in cross-attention), the side ℓ of W^A.
        bias: whether queries, outputs and the alignment (one number a position) have biases.

    The other arguments are those of `EfficientHeadAttention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        max_length: int = 2048,
        causal: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            causal=causal,
            bias=bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        require(max_length > 0, self._name, f"max_length {max_length}", "give a positive number of tokens")
        self.max_length = max_length
        self.alignment = nn.Linear(max_length, max_length, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None, *, seen: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x, context, mask, positions, seen=seen)
        keys = value.shape[2]
        self._check_length(keys)
        if mask is not None:
            mask.validate(x.shape[0], self.heads, x.shape[1], keys)
            mask = mask.to(value.device)
        if isinstance(mask, Padding):
            value = value.masked_fill(~mask.real(keys)[:, None, :, None], 0.0)
        packed = mask if isinstance(mask, Segments) else None
        return query, key, self.align(value, packed)

    def align(self, value: Float[Tensor, "batch heads keys head_dim"], packed: Segments | None) -> Tensor:
        """W^A V; each of several packed sequences by itself."""
        keys = value.shape[2]
        alignment, bias = self.alignment.weight[:keys, :keys], self.alignment.bias
        shift = None if bias is None else bias[:keys, None]
        if packed is not None:
            places, runs = packed.places(), packed.starts().cumsum(-1)
            alignment = self.alignment.weight[places[..., :, None], places[..., None, :]]
            alignment = alignment.masked_fill(runs[..., :, None] != runs[..., None, :], 0.0)
            # A head axis, where there is one row of ids per sample.
            alignment = alignment.unsqueeze(-3)
            shift = None if bias is None else bias[places][..., None].unsqueeze(-3)
        aligned = (alignment.tril() if self.causal else alignment) @ value
        return aligned if shift is None else aligned + shift

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache]:
        self.check_step(x, self.dim, state.key.shape[0])
        seen, end = state.length, state.length + x.shape[1]
        self._check_length(end)
        query, key, value = self.split(x, x)
        rows = self.alignment.weight[seen:end]
        # The keys kept are the tokens as they are, which is what the alignment takes.
        aligned = rows[:, :seen] @ state.key + rows[:, seen:end].tril() @ value
        if self.alignment.bias is not None:
            aligned = aligned + self.alignment.bias[seen:end, None]
        state = state.append(key, aligned)
        return self.combine(attention(query, state.key, state.value, mask=self.own_mask())), state

    def _check_length(self, length: int) -> None:
        require(
            length <= self.max_length,
            self._name,
            lambda: f"{length} tokens, built for max_length {self.max_length}",
            "give fewer, or build with a larger max_length",
        )
