"""FlashAttention-2's loop over tiles in plain PyTorch ("FlashAttention-2", 2023, arXiv 2307.08691), forward and backward.

Any mask, bias and tileable normalizer on any device without a compiler. Tiles that the mask empties are skipped, full
ones never look at it, and keys are walked as views. Extra memory is O(N): one tile of scores at a time. The loop is one
node for torch.compile and export (``regard::tiled_attention``).

Backward folds the two row statistics into the products, ``[q, −lse] [k, 1]ᵀ`` and ``[dO, −δ] [v, 1]ᵀ``, which leaves two
elementwise passes over each tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.ops.biases import Bias
from regard.ops.dropout import draw_seed, keep_tile
from regard.ops.engines.call import Call, statistics_dtype
from regard.ops.masks import Mask, Tiles, plan
from regard.ops.masks.plan import KeyRange
from regard.ops.normalizers import Normalizer, Pointwise, Softmax

QUERY_TILE = 128
KEY_TILE = 128
MOST_SCORES = 2**20
"""Scores in flight: with their neighbours they should stay in the last cache level."""


def refuses(call: Call) -> str | None:
    """Why this engine cannot take `call`, or None."""
    if not call.normalizer.tileable:
        return f"{call.normalizer!r} needs whole rows of scores"
    return None


def run(call: Call) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (zeros for a normalizer without one)."""
    mask, mask_tensors = call.mask.flatten() if call.mask is not None else ("", [])
    bias, bias_tensors = call.bias.flatten() if call.bias is not None else ("", [])
    seed = draw_seed(call.query.device) if call.dropout > 0 else None
    return tiled_attention(
        call.query,
        call.key,
        call.value,
        mask_tensors,
        bias_tensors,
        seed,
        mask,
        bias,
        call.normalizer.flatten()[0],
        call.scale,
        call.dropout,
    )


@torch.library.custom_op("regard::tiled_attention", mutates_args=())
def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_tensors: list[Tensor],
    bias_tensors: list[Tensor],
    seed: Tensor | None,
    mask: str,
    bias: str,
    normalizer: str,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    loop = _Loop(query, key, value, mask_tensors, bias_tensors, seed, mask, bias, normalizer, scale, dropout)
    return loop.forward()


@tiled_attention.register_fake
def _(query, key, value, *arguments):
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=statistics_dtype(query.dtype))


@torch.library.custom_op("regard::tiled_attention_backward", mutates_args=())
def tiled_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_tensors: list[Tensor],
    bias_tensors: list[Tensor],
    seed: Tensor | None,
    mask: str,
    bias: str,
    normalizer: str,
    scale: float,
    dropout: float,
    train_bias: bool,
) -> list[Tensor]:
    loop = _Loop(query, key, value, mask_tensors, bias_tensors, seed, mask, bias, normalizer, scale, dropout)
    return loop.backward(grad_out, grad_lse, out, lse, train_bias)


@tiled_attention_backward.register_fake
def _(grad_out, grad_lse, out, lse, query, key, value, mask_tensors, bias_tensors, *arguments):
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value, *bias_tensors)]


def _keep_for_backward(ctx, inputs, output) -> None:
    query, key, value, mask_tensors, bias_tensors, seed, *ctx.constants = inputs
    out, lse = output
    ctx.save_for_backward(query, key, value, out, lse, seed, *mask_tensors, *bias_tensors)
    ctx.mask_count = len(mask_tensors)
    ctx.train_bias = any(tensor.requires_grad for tensor in bias_tensors)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, out, lse, seed, *rest = ctx.saved_tensors
    mask_tensors, bias_tensors = rest[: ctx.mask_count], rest[ctx.mask_count :]
    grads = tiled_attention_backward(
        grad_out, grad_lse, out, lse, query, key, value, mask_tensors, bias_tensors, seed, *ctx.constants, ctx.train_bias
    )
    bias_grads = grads[3:] if ctx.train_bias else [None] * len(bias_tensors)
    return *grads[:3], [None] * len(mask_tensors), bias_grads, None, None, None, None, None, None


def _refuse_twice(ctx, *grads):
    raise RuntimeError(
        "attention: backend 'tiled' has no second derivative; use backend='reference' for double backward"
    )


torch.library.register_autograd("regard::tiled_attention", _backward, setup_context=_keep_for_backward)
torch.library.register_autograd("regard::tiled_attention_backward", _refuse_twice)


@dataclass(frozen=True)
class _Step:
    """One row of tiles for some samples and key heads: ``rows`` of the folded (batch · key heads) axis."""

    batch: slice
    heads: slice
    rows: slice
    queries: tuple[int, int]
    ranges: list[KeyRange]


class _Loop:
    """The arguments of one call in the shapes the loop works on.

    Samples and key heads are folded into rows and the query heads of a key head into the query axis of a tile, so that
    every product is one batched product without a copy of the keys.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask_tensors: list[Tensor],
        bias_tensors: list[Tensor],
        seed: Tensor | None,
        mask: str,
        bias: str,
        normalizer: str,
        scale: float,
        dropout: float,
    ) -> None:
        self.batch, self.heads, self.queries = query.shape[:3]
        self.key_heads, self.keys = key.shape[1:3]
        self.group = self.heads // self.key_heads
        self.dtype = statistics_dtype(query.dtype)
        self.query = query.reshape(self.batch * self.key_heads, self.group, self.queries, query.shape[3])
        self.key, self.value = key.flatten(0, 1), value.flatten(0, 1)
        self.mask = Mask.unflatten(mask, mask_tensors) if mask else None
        self.bias = Bias.unflatten(bias, bias_tensors) if bias else None
        self.bias_tensors = bias_tensors
        self.normalizer = Normalizer.unflatten(normalizer, [])
        self.seed, self.scale, self.dropout = seed, scale, dropout
        tiles = Tiles(self.batch, self.heads, self.queries, self.keys, QUERY_TILE, KEY_TILE)
        self.plan = plan(self.mask, tiles)
        self._scratch: dict[str, Tensor] = {}

    def steps(self) -> Iterator[_Step]:
        """Rows of tiles with something to compute."""
        for unit in self.plan.units(self.key_heads):
            widest = max((r.stop - r.start for row in unit.rows for r in row), default=1)
            most_rows = max(1, MOST_SCORES // (self.group * QUERY_TILE * widest))
            for batch, heads in _pieces(unit.batch, unit.heads, self.key_heads, most_rows):
                first = batch.start * self.key_heads + heads.start
                rows = slice(first, first + (batch.stop - batch.start) * (heads.stop - heads.start))
                for index, ranges in enumerate(unit.rows):
                    if ranges:
                        start = index * QUERY_TILE
                        yield _Step(batch, heads, rows, (start, min(start + QUERY_TILE, self.queries)), ranges)

    def forward(self) -> tuple[Tensor, Tensor]:
        out = self.query.new_zeros(*self.query.shape[:3], self.value.shape[-1])
        fill = -torch.inf if isinstance(self.normalizer, Softmax) else 0.0
        lse = torch.full(self.query.shape[:3], fill, dtype=self.dtype, device=self.query.device)
        for step in self.steps():
            place = (step.rows, slice(None), slice(*step.queries))
            if isinstance(self.normalizer, Softmax):
                mixed, total = self._softmax_rows(step)
                lse[place] = total.view(lse[place].shape)
            else:
                mixed = self._pointwise_rows(step)
            out[place] = mixed.view(out[place].shape).to(out.dtype)
        shape = (self.batch, self.heads, self.queries)
        return out.view(*shape, -1), lse.view(shape)

    def _softmax_rows(self, step: _Step) -> tuple[Tensor, Tensor]:
        query = self._query_tile(step) * self.scale
        top = total = mixed = None
        for keys in step.ranges:
            scores = self._scores(query, self._keys(self.key, step, keys), step, keys)
            # −inf rows get a finite maximum: −inf minus itself would be NaN.
            highest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(self.dtype).min)
            if top is not None:
                highest = torch.maximum(highest, top)
            weights = scores.sub_(highest).exp_()
            mass = weights.sum(-1, keepdim=True)
            self._drop(weights, step, keys)
            value = self._keys(self.value, step, keys)
            if top is None:
                mixed, total = torch.bmm(weights, value), mass
            else:
                fade = (top - highest).exp_()
                mixed, total = mixed.mul_(fade).baddbmm_(weights, value), total.mul_(fade).add_(mass)
            top = highest
        return mixed.div_(total.masked_fill(total == 0, 1.0)), top + total.log()

    def _pointwise_rows(self, step: _Step) -> Tensor:
        query, counts = self._query_tile(step) * self.scale, self._counts(step)
        mixed = query.new_zeros(*query.shape[:2], self.value.shape[-1])
        for keys in step.ranges:
            scores = self._scores(query, self._keys(self.key, step, keys), step, keys)
            weights = self.normalizer.weights(scores, counts)
            self._drop(weights, step, keys)
            mixed.baddbmm_(weights, self._keys(self.value, step, keys))
        return mixed

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, train_bias: bool
    ) -> list[Tensor]:
        shape = self.query.shape
        grad_out = grad_out.reshape(*shape[:3], -1)
        # δ: what a weight's gradient loses to the row's normalisation.
        delta = torch.linalg.vecdot(grad_out.to(self.dtype), out.view(grad_out.shape).to(self.dtype))
        delta = delta.sub_(grad_lse.reshape(shape[:3]))
        lse = lse.view(shape[:3])
        grad_query = torch.zeros(shape, dtype=self.dtype, device=grad_out.device)
        grad_key = torch.zeros(self.key.shape, dtype=self.dtype, device=grad_out.device)
        grad_value = torch.zeros(self.value.shape, dtype=self.dtype, device=grad_out.device)
        softmax = isinstance(self.normalizer, Softmax)
        key_one = _append_one(self.key, self.dtype) if softmax else self.key
        value_one = _append_one(self.value, self.dtype) if softmax else self.value
        bias_grads = [torch.zeros_like(tensor, dtype=self.dtype) for tensor in self.bias_tensors]
        for step in self.steps():
            place = (step.rows, slice(None), slice(*step.queries))
            query = self._query_tile(step) * self.scale
            grad = grad_out[place].to(self.dtype).flatten(1, 2)
            counts = None if softmax else self._counts(step)
            query_stat, grad_stat = query, grad
            if softmax:
                level = lse[place].masked_fill(lse[place] == -torch.inf, 0.0)
                query_stat = torch.cat([query, -level.flatten(1, 2)[..., None]], dim=-1)
                grad_stat = torch.cat([grad, -delta[place].flatten(1, 2)[..., None]], dim=-1)
            grad_query_tile = torch.zeros_like(query)
            for keys in step.ranges:
                weights = self._scores(query_stat, self._keys(key_one, step, keys), step, keys)
                weights = weights.exp_() if softmax else self.normalizer.weights(weights, counts)
                grad_scores = self._product("grad", grad_stat, self._keys(value_one, step, keys).mT)
                kept = self._kept(step, keys)
                if kept is not None:
                    # The −δ that rides in the product must not be dropped with the weight.
                    shift = delta[place].flatten(1, 2)[..., None] if softmax else 0.0
                    grad_scores.add_(shift).mul_(kept).sub_(shift)
                grad_scores.mul_(weights if softmax else self.normalizer.slope(weights, counts))
                if kept is not None:
                    weights.mul_(kept)
                span = (step.rows, slice(keys.start, keys.stop))
                grad_value[span].baddbmm_(weights.mT, grad)
                grad_key[span].baddbmm_(grad_scores.mT, query)
                grad_query_tile.baddbmm_(grad_scores, self._keys(self.key, step, keys))
                if train_bias:
                    self._bias_backward(bias_grads, grad_scores, step, keys)
            grad_query[place] = grad_query_tile.mul_(self.scale).view(grad_query[place].shape)
        shapes = (self.batch, self.heads), (self.batch, self.key_heads), (self.batch, self.key_heads)
        grads = [
            grad.to(grad_out.dtype).view(*two, grad.shape[-2], grad.shape[-1])
            for grad, two in zip((grad_query, grad_key, grad_value), shapes, strict=True)
        ]
        return grads + [grad.to(tensor.dtype) for grad, tensor in zip(bias_grads, self.bias_tensors, strict=True)]

    def _query_tile(self, step: _Step) -> Tensor:
        return self.query[step.rows, :, slice(*step.queries)].to(self.dtype).flatten(1, 2)

    def _keys(self, tensor: Tensor, step: _Step, keys: KeyRange) -> Tensor:
        return tensor[step.rows, keys.start : keys.stop].to(self.dtype)

    def _product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Batched product into memory used again for every tile."""
        shape = (a.shape[0], a.shape[1], b.shape[2])
        size = shape[0] * shape[1] * shape[2]
        if name not in self._scratch or self._scratch[name].numel() < size:
            self._scratch[name] = a.new_empty(size)
        return torch.bmm(a, b, out=self._scratch[name][:size].view(shape))

    def _per_head(self, tile: Tensor, step: _Step) -> Tensor:
        """View (rows, group · queries, keys) as (batch, heads, queries, keys)."""
        samples = step.batch.stop - step.batch.start
        return tile.view(samples, -1, step.queries[1] - step.queries[0], tile.shape[-1])

    def _query_heads(self, step: _Step) -> slice:
        return slice(step.heads.start * self.group, step.heads.stop * self.group)

    def _scores(self, query: Tensor, key: Tensor, step: _Step, keys: KeyRange) -> Tensor:
        """Scaled scores with bias, −inf where the mask forbids."""
        scores = self._product("scores", query, key.mT)
        by_head = self._per_head(scores, step)
        if self.bias is not None:
            by_head.add_(self._bias_tile(self.bias, step, keys))
        for part in keys.partial:
            assert self.mask is not None
            tile = self.plan.additive(self.mask, scores, step.batch, self._query_heads(step), step.queries, part)
            by_head[..., part[0] - keys.start : part[1] - keys.start].add_(tile)
        return scores

    def _bias_tile(self, bias: Bias, step: _Step, keys: KeyRange) -> Tensor:
        offset = self.keys - self.queries
        queries = (step.queries[0] + offset, step.queries[1] + offset)
        return bias.tile(step.batch, self._query_heads(step), queries, keys[:2], self.query.device)

    def _bias_backward(self, grads: list[Tensor], grad_scores: Tensor, step: _Step, keys: KeyRange) -> None:
        assert self.bias is not None
        with _autograd_inside_operator():
            leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in self.bias_tensors]
            tile = self._bias_tile(Bias.unflatten(self.bias.flatten()[0], leaves), step, keys)
            reduced = self._per_head(grad_scores, step).sum_to_size(tile.shape).to(tile.dtype)
            found = torch.autograd.grad(tile, [leaf for leaf in leaves if leaf.requires_grad], reduced)
        trained = [total for total, leaf in zip(grads, leaves, strict=True) if leaf.requires_grad]
        for total, grad in zip(trained, found, strict=True):
            total.add_(grad)

    def _kept(self, step: _Step, keys: KeyRange) -> Tensor | None:
        """Dropout factors of a tile in the shape of its scores, or None without dropout."""
        if self.seed is None:
            return None
        index = {"device": self.query.device}
        heads, offset = self._query_heads(step), self.keys - self.queries
        kept = keep_tile(
            self.seed,
            self.dropout,
            torch.arange(step.batch.start, step.batch.stop, **index).view(-1, 1, 1, 1),
            torch.arange(heads.start, heads.stop, **index).view(-1, 1, 1),
            torch.arange(step.queries[0] + offset, step.queries[1] + offset, **index).view(-1, 1),
            torch.arange(keys.start, keys.stop, **index),
        )
        return kept.to(self.dtype).view(step.rows.stop - step.rows.start, -1, keys.stop - keys.start)

    def _drop(self, weights: Tensor, step: _Step, keys: KeyRange) -> None:
        kept = self._kept(step, keys)
        if kept is not None:
            weights.mul_(kept)

    def _counts(self, step: _Step) -> Tensor:
        """How many keys each query of a row of tiles may attend, in the shape (rows, group · queries, 1)."""
        shape = (step.rows.stop - step.rows.start, self.group * (step.queries[1] - step.queries[0]), 1)
        full = sum(keys.stop - keys.start - sum(b - a for a, b in keys.partial) for keys in step.ranges)
        counts = torch.full(shape, full, device=self.query.device)
        for keys in step.ranges:
            for part in keys.partial:
                assert self.mask is not None
                like = self.query.new_empty((), dtype=self.dtype)
                tile = self.plan.additive(self.mask, like, step.batch, self._query_heads(step), step.queries, part)
                self._per_head(counts, step).add_((tile == 0).sum(-1, keepdim=True))
        return counts


@contextmanager
def _autograd_inside_operator() -> Iterator[None]:
    """Autograd for the biases' own gradients: the dispatcher takes it away inside a custom operator."""
    excluded = torch._C._dispatch_tls_local_exclude_set().remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


def _append_one(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat([tensor.to(dtype), tensor.new_ones(*tensor.shape[:-1], 1, dtype=dtype)], dim=-1)


def _pieces(batch: slice, heads: slice, key_heads: int, most_rows: int) -> Iterator[tuple[slice, slice]]:
    """Cut samples × key heads into pieces of at most `most_rows` rows that stay contiguous when folded."""
    width = heads.stop - heads.start
    if width <= most_rows and width == key_heads:
        samples = most_rows // width
        for start in range(batch.start, batch.stop, samples):
            yield slice(start, min(start + samples, batch.stop)), heads
        return
    for sample in range(batch.start, batch.stop):
        for start in range(heads.start, heads.stop, most_rows):
            yield slice(sample, sample + 1), slice(start, min(start + most_rows, heads.stop))
