"""One call of attention on its way through the door: what was asked, what has been changed, what comes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.ops.precision import statistics_dtype, without_autocast
from regard.sites.site import Site
from regard.sites.tokens import Tokens

TILE = 128
"""Rows of weights that are in memory at a time."""

MASKED = -3e4
"""Logits below are those of masked keys: hosts write the least number of their type in place of −∞."""

Heads = Sequence[int] | None

Change = Callable[[Tensor, slice, Heads], Tensor]
"""(values (B, h, n, M), the rows they are, the heads they are) → changed values."""


@dataclass(frozen=True)
class RowChange:
    """A change of logits or weights that needs whole rows, and the rows it touches."""

    rows: Bool[Tensor, " queries"]
    change: Change


@dataclass(frozen=True)
class AttentionCall:
    """What a site was asked to attend to, by its host; instruments read it and return it, changed or not.

    Attributes:
        site: where it happens.
        query, key: (B, H, N, D) and (B, Hk, M, D), positions applied; None where the host shows its scores only.
        value: (B, Hk, M, Dv).
        scores: the host's logits for rows (and heads), scaled, biased and masked: at least float32, (B, h, n, M). Where
            the host's kernel is causal, a third argument asks for that many of the first keys only.
        normalize: logits → weights, as the host does it.
        attend: the host's own attention with a bias (broadcast to (B, H, N, M)) added to its logits → (B, H, N, Dv).
        query_start, key_start: the sequence position of the first query and of the first key.
        step: the model's forward pass since the door was attached, from 0.
        tokens: which token is which, where that was said.
        causal: whether the host's kernel, without a mask, shows row i the keys 0 … i only.
    """

    site: Site
    query: Float[Tensor, "batch heads queries head_dim"] | None
    key: Float[Tensor, "batch key_heads keys head_dim"] | None
    value: Float[Tensor, "batch key_heads keys value_dim"]
    queries: int
    scores: Callable[..., Tensor]
    normalize: Callable[[Tensor, Heads], Tensor]
    attend: Callable[[Tensor | None], Tensor]
    query_start: int | Tensor
    key_start: int | Tensor
    step: int = 0
    tokens: Tokens | None = None
    causal: bool = False
    bias: Tensor | None = None
    logit_changes: tuple[RowChange, ...] = ()
    weight_changes: tuple[RowChange, ...] = ()
    output_changes: tuple[Callable[[Tensor], Tensor], ...] = ()

    @property
    def batch(self) -> int:
        return self.value.shape[0]

    @property
    def heads(self) -> int:
        return self.site.heads if self.query is None else self.query.shape[1]

    @property
    def keys(self) -> int:
        return self.value.shape[2]

    @property
    def fused(self) -> bool:
        """Whether the host's own kernel computes the output, with at most a bias added to its logits."""
        return len(self.logit_changes) + len(self.weight_changes) == 0

    def add(self, bias: Float[Tensor, "#batch #heads #queries keys"]) -> AttentionCall:
        """The call with `bias` added to its logits."""
        if self.logit_changes:

            def change(logits: Tensor, rows: slice, heads: Heads) -> Tensor:
                return logits + part(bias, rows, heads)

            every = torch.ones(self.queries, dtype=torch.bool, device=self.value.device)
            return self.change_logits(RowChange(every, change))
        return replace(self, bias=bias if self.bias is None else self.bias + bias)

    def change_logits(self, change: RowChange) -> AttentionCall:
        """The call with logits changed row by row, off the fused kernel for these rows."""
        return replace(self, logit_changes=(*self.logit_changes, change))

    def change_weights(self, change: RowChange) -> AttentionCall:
        """The call with weights changed row by row, off the fused kernel for these rows."""
        return replace(self, weight_changes=(*self.weight_changes, change))

    def change_output(self, change: Callable[[Tensor], Tensor]) -> AttentionCall:
        """The call with its output (B, H, N, Dv) changed."""
        return replace(self, output_changes=(*self.output_changes, change))

    def reach(self, rows: slice) -> int:
        """How many of the first keys hold all that these rows may see: the others need not be computed."""
        return min(rows.stop, self.keys) if self.causal and self.fused else self.keys

    def logits(
        self, rows: slice, heads: Heads = None, keys: int | None = None
    ) -> Float[Tensor, "batch heads rows keys"]:
        """The logits of some rows (and heads), with the changes made so far; −inf or very low where masked.

        With ``keys``, those of that many first keys; `reach` says how many are enough.
        """
        few = keys is not None and self.causal and not self.logit_changes
        values = self.scores(rows, heads, keys) if few else self.scores(rows, heads)
        if self.bias is not None:
            values = values + part(self.bias, rows, heads)[..., : values.shape[-1]]
        for each in self.logit_changes:
            values = each.change(values, rows, heads)
        return values[..., :keys]

    def weights(
        self, rows: slice, heads: Heads = None, keys: int | None = None
    ) -> Float[Tensor, "batch heads rows keys"]:
        """The weights of some rows (and heads), with the changes made so far; ``keys`` as in `logits`, from `reach`."""
        values = self.normalize(self.logits(rows, heads, keys), heads)
        for each in self.weight_changes:
            values = each.change(values, rows, heads)
        return values

    def tiles(self, size: int = TILE) -> list[slice]:
        """The rows of the call in pieces."""
        return [slice(start, min(start + size, self.queries)) for start in range(0, self.queries, size)]

    def output(self) -> Float[Tensor, "batch heads queries value_dim"]:
        """What the site answers."""
        out = self.attend(self.bias) if self.fused else self._mixed()
        for change in self.output_changes:
            out = change(out)
        return out

    def _mixed(self) -> Tensor:
        """The rows that were changed by their weights, the others by the host's kernel."""
        touched = torch.stack([each.rows for each in (*self.logit_changes, *self.weight_changes)]).any(0)
        # A graph cannot ask a tensor which rows are touched.
        if torch.compiler.is_compiling() or bool(touched.all()):
            return torch.cat([mix(self.weights(rows), self.value) for rows in self.tiles()], dim=2)
        out = self.attend(self.bias)
        pieces = [
            torch.where(touched[rows, None], mix(self.weights(rows), self.value), out[:, :, rows])
            if bool(touched[rows].any())
            else out[:, :, rows]
            for rows in self.tiles()
        ]
        return torch.cat(pieces, dim=2)


def mix(weights: Float[Tensor, "batch heads rows keys"], value: Tensor) -> Float[Tensor, "batch heads rows value_dim"]:
    """``weights @ value`` where several query heads share a value head, in the value's dtype."""
    batch, heads, rows, keys = weights.shape
    shared = weights.to(value.dtype).reshape(batch, value.shape[1], -1, keys)
    return (shared @ value).reshape(batch, heads, rows, value.shape[-1])


def product(query: Tensor, key: Tensor, scale: float, rows: slice, heads: Heads) -> Tensor:
    """``scale · q kᵀ`` for some rows and heads, at least in float32."""
    group = query.shape[1] // key.shape[1]
    if isinstance(heads, range) and heads.step == 1 and not (heads.start % group or heads.stop % group):
        query, key = query[:, heads.start : heads.stop], key[:, heads.start // group : heads.stop // group]
        heads = None
    with without_autocast(query.device):
        dtype = statistics_dtype(query.dtype)
        query = query[:, :, rows].to(dtype) * scale
        if heads is None:
            batch, _, count, width = query.shape
            shared = query.reshape(batch, key.shape[1], group * count, width)
            return (shared @ key.to(dtype).mT).reshape(batch, -1, count, key.shape[2])
        chosen = torch.as_tensor(heads, device=query.device)
        return query[:, chosen] @ key[:, chosen // group].to(dtype).mT


def part(tensor: Tensor, rows: slice, heads: Heads) -> Tensor:
    """Rows and heads of a tensor that broadcasts to (B, H, N, M); axes of size 1 stay."""
    if tensor.shape[-2] > 1:
        tensor = tensor[..., rows, :]
    if heads is not None and tensor.ndim > 2 and tensor.shape[-3] > 1:
        tensor = tensor[..., torch.as_tensor(heads, device=tensor.device), :, :]
    return tensor


def softmax(logits: Tensor) -> Tensor:
    """Softmax over keys; a row that may attend nothing gets zeros."""
    empty = torch.isneginf(logits.amax(-1, keepdim=True))
    if not torch.is_grad_enabled():
        return logits.softmax(-1).masked_fill_(empty, 0.0)
    # Without the first fill, the gradient of an empty row is NaN.
    return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
