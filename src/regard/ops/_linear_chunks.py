"""Causal linear attention in chunks: forward and backward as operators of their own.

The C tokens of a chunk meet in a masked, decayed C×C matrix, chunks in the (head_dim, value_dim) state. That takes
O(N (C + D) Dv) time. The forward pass keeps the state of every few chunks, from which the backward pass computes
the others again, so that memory beyond inputs and outputs is a small fraction of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.ops.precision import exact, statistics_dtype

# Chunks are computed together until their queries have this many elements: enough work per call, few enough for
# the cache.
_ELEMENTS_PER_STEP = 2**17
_CHUNKS_PER_CHECKPOINT = 16
# exp(-_VANISHES) is zero in every dtype.
_VANISHES = 1e4


def causal_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Output, in the dtype of `value`, and final state of checked inputs; see `linear_attention`."""
    out, checkpoints = _forward(query, key, value, log_decay, initial_state, chunk_size)
    return out, checkpoints[-1].clone()


@dataclass(frozen=True)
class _Step:
    """Neighbouring chunks of one size that are computed together."""

    start: int
    chunks: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.chunks * self.size


@dataclass(frozen=True)
class _Decay:
    """What decay multiplies in a step; leading axes (chunks, batch, heads) broadcast, None means ones."""

    within: Tensor
    """(..., groups * size, size): from token j to token i of a chunk, 0 where j > i."""
    across: Tensor
    """(..., 1, 1): over the whole chunk."""
    entering: Tensor | None = None
    """(..., groups * size, 1): from the state before the chunk to token i."""
    leaving: Tensor | None = None
    """(..., size, 1): from token j to the end of the chunk."""


class _Chunks:
    """Cuts (batch, heads * groups, length, width) into a matrix per chunk and head, and joins it again."""

    def __init__(self, query: Tensor, key: Tensor, log_decay: Tensor | None, dtype: torch.dtype, size: int):
        self.heads, self.length = key.shape[1:3]
        self.groups = query.shape[1] // self.heads
        self.dtype, self.size = dtype, size
        self.chunks_per_step = max(1, _ELEMENTS_PER_STEP // max(1, query[:, :, 0].numel() * size))
        self._log_decay, self._device = log_decay, query.device
        self._same_for_all_chunks: dict[int, _Decay] = {}

    def segments(self) -> list[list[_Step]]:
        """Steps from each checkpoint to the next. All chunks but the last one have the full size."""
        span = self.size * _CHUNKS_PER_CHECKPOINT
        return [list(self._steps(start, start + span)) for start in range(0, self.length, span)]

    def _steps(self, start: int, stop: int) -> Iterator[_Step]:
        stop = min(stop, self.length)
        while start < stop:
            whole = min((stop - start) // self.size, self.chunks_per_step)
            step = _Step(start, whole, self.size) if whole else _Step(start, 1, stop - start)
            yield step
            start = step.stop

    def cut(self, tensor: Tensor, step: _Step) -> Tensor:
        """(chunks, batch, heads, groups * size, width) in the computing dtype, as one batch of matrices."""
        batch, heads, _, width = tensor.shape
        groups = heads // self.heads
        part = tensor[:, :, step.start : step.stop].to(self.dtype)
        part = part.reshape(batch, self.heads, groups, step.chunks, step.size, width).permute(3, 0, 1, 2, 4, 5)
        # Merging the leading axes copies if strides ask for it: here once, not in every product.
        part = part.reshape(step.chunks * batch * self.heads, groups * step.size, width)
        return part.unflatten(0, (step.chunks, batch, self.heads))

    def join(self, tensor: Tensor, step: _Step, part: Tensor) -> None:
        """Write to `tensor` what `cut` would read."""
        cut = tensor[:, :, step.start : step.stop]
        cut = cut.unflatten(1, (self.heads, -1)).unflatten(3, (step.chunks, step.size))
        cut.copy_(part.unflatten(3, (-1, step.size)).permute(1, 2, 3, 0, 4, 5))

    def decay(self, step: _Step) -> _Decay:
        if self._log_decay is not None and self._log_decay.dim() == 3:
            return _decay(self.cut(self._log_decay.unsqueeze(-1), step).squeeze(-1), self.groups)
        if step.size not in self._same_for_all_chunks:
            self._same_for_all_chunks[step.size] = self._decay_of_any_chunk(step.size)
        return self._same_for_all_chunks[step.size]

    def _decay_of_any_chunk(self, size: int) -> _Decay:
        if self._log_decay is None:
            ones = torch.ones(1, 1, 1, size, size, dtype=self.dtype, device=self._device)
            return _Decay(ones.tril().repeat(1, 1, 1, self.groups, 1), across=ones[..., :1, :1])
        return _decay(self._log_decay.unsqueeze(-1).expand(1, 1, -1, size), self.groups)


def _decay(log_decay: Tensor, groups: int) -> _Decay:
    """The factors for log-decays (chunks, batch, heads, size).

    They come from differences of running sums, which −inf would make NaN and huge numbers inexact. A decay
    that underflows to zero is therefore left out of the sums; it opens a section that does not see earlier ones.
    """
    resets = log_decay.exp() == 0
    section = resets.to(log_decay.dtype).cumsum(-1)
    total = log_decay.masked_fill(resets, 0).cumsum(-1)
    within = _differences(total).sub_(_differences(section), alpha=_VANISHES)
    # What lies above the diagonal grows without bound: it is zero before exp as well as after.
    within = within.tril_().exp_().tril_()
    entering = (total - _VANISHES * section).exp_().unsqueeze(-1)
    return _Decay(
        within=within.repeat(1, 1, 1, groups, 1) if groups > 1 else within,
        across=entering[..., -1:, :],
        entering=entering.repeat(1, 1, 1, groups, 1),
        leaving=within[..., -1, :].unsqueeze(-1),
    )


def _differences(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(-1) - tensor.unsqueeze(-2)


def _times(tensor: Tensor, factor: Tensor | None) -> Tensor:
    return tensor if factor is None else tensor * factor


def _times_(tensor: Tensor, factor: Tensor | None) -> Tensor:
    return tensor if factor is None else tensor.mul_(factor)


def _add_product_(target: Tensor, left: Tensor, right: Tensor) -> Tensor:
    target.flatten(0, 2).baddbmm_(left.flatten(0, 2), right.flatten(0, 2))
    return target


def _running(updates: Tensor, start: Tensor, across: Tensor, *, reverse: bool = False) -> Tensor:
    """`start`, decayed and updated chunk by chunk: (chunks + 1, batch, heads, head_dim, value_dim)."""
    order = -1 if reverse else 1
    states = updates.new_empty(len(updates) + 1, *updates.shape[1:])
    borders = states.unbind()[::order]
    factors = across.expand(len(updates), *across.shape[1:]).unbind()[::order]
    borders[0].copy_(start)
    for update, factor, before, after in zip(updates.unbind()[::order], factors, borders, borders[1:], strict=False):
        torch.addcmul(update, before, factor, out=after)
    return states


def _states(k: Tensor, v: Tensor, start: Tensor, decay: _Decay) -> Tensor:
    """The state before each chunk of a step and after the last."""
    return _running(_times(k, decay.leaving).mT @ v, start, decay.across)


@torch.library.custom_op("regard::linear_attention", mutates_args=())
@exact
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Output, and the state before each segment and after the last."""
    chunks = _Chunks(query, key, log_decay, statistics_dtype(value.dtype), chunk_size)
    out, checkpoints = _empty_outputs(query, key, value, log_decay, initial_state, chunk_size)
    checkpoints[0] = 0 if initial_state is None else initial_state
    for segment, state, checkpoint in zip(chunks.segments(), checkpoints[:-1], checkpoints[1:], strict=True):
        for step in segment:
            q, k, v = (chunks.cut(tensor, step) for tensor in (query, key, value))
            decay = chunks.decay(step)
            states = _states(k, v, state, decay)
            scores = (q @ k.mT).mul_(decay.within)
            chunks.join(out, step, _add_product_(_times_(q @ states[:-1], decay.entering), scores, v))
            state = states[-1]
        checkpoint.copy_(state)
    return out, checkpoints


@_forward.register_fake
def _empty_outputs(query, key, value, log_decay, initial_state, chunk_size):
    batch, heads, length, head_dim = key.shape
    segments = -(-length // (chunk_size * _CHUNKS_PER_CHECKPOINT))
    out = value.new_empty(batch, query.shape[1], length, value.shape[3])
    states = (segments + 1, batch, heads, head_dim, value.shape[3])
    return out, value.new_empty(states, dtype=statistics_dtype(value.dtype))


@torch.library.custom_op("regard::linear_attention_backward", mutates_args=())
@exact
def _backward(
    grad_out: Tensor,
    grad_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    checkpoints: Tensor,
    chunk_size: int,
    with_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, initial state and, per token and only if `with_decay`, log-decay."""
    chunks = _Chunks(query, key, log_decay, statistics_dtype(value.dtype), chunk_size)
    grads = _empty_gradients(grad_out, grad_state, query, key, value, log_decay, checkpoints, chunk_size, with_decay)
    for segment, state in zip(reversed(chunks.segments()), reversed(checkpoints[:-1].unbind()), strict=True):
        kept = []
        for step in segment:
            decay = chunks.decay(step)
            states = _states(chunks.cut(key, step), chunks.cut(value, step), state, decay)
            kept.append((step, decay, states))
            state = states[-1]
        for step, decay, states in reversed(kept):
            q, k, v, grad = (chunks.cut(tensor, step) for tensor in (query, key, value, grad_out))
            grad_q, grad_k, grad_v, grad_states = _step_backward(q, k, v, grad, states, grad_state, decay)
            grad_state = grad_states[0]
            for whole, part in zip(grads[:3], (grad_q, grad_k, grad_v), strict=True):
                chunks.join(whole, step, part)
            if with_decay:
                crossing = _crossing(q * grad_q, k * grad_k, states[1:] * grad_states[1:])
                chunks.join(grads[4].unsqueeze(-1), step, crossing.unsqueeze(-1))
    grads[3].copy_(grad_state)
    return grads


@_backward.register_fake
def _empty_gradients(grad_out, grad_state, query, key, value, log_decay, checkpoints, chunk_size, with_decay):
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
        checkpoints.new_empty(checkpoints.shape[1:]),
        checkpoints.new_empty(key.shape[:3] if with_decay else (0,)),
    )


def _step_backward(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, states: Tensor, grad_state: Tensor, decay: _Decay
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a step's queries, keys, values, and states."""
    scores = (q @ k.mT).mul_(decay.within)
    grad_scores = (grad @ v.mT).mul_(decay.within)
    grad_read = _times(grad, decay.entering)
    grad_states = _running(q.mT @ grad_read, grad_state, decay.across, reverse=True)
    before, after = states[:-1], grad_states[1:]
    grad_q = _add_product_(grad_read @ before.mT, grad_scores, k)
    grad_k = _add_product_(_times_(v @ after.mT, decay.leaving), grad_scores.mT, q)
    grad_v = _add_product_(_times(k, decay.leaving) @ after, scores.mT, grad)
    return grad_q, grad_k, grad_v, grad_states


def _crossing(ending: Tensor, beginning: Tensor, leaving: Tensor) -> Tensor:
    """Gradient of each token's log-decay, (chunks, batch, heads, size), from values times gradients.

    Token t decays every path from an earlier token to t or a later one: of the paths in its chunk those that end
    at t or later, less those that begin there, plus all that leave the chunk.
    """
    beginning = beginning.sum(-1)
    ending = ending.sum(-1).unflatten(-1, (-1, beginning.shape[-1])).sum(-2)
    return (ending - beginning).flip(-1).cumsum(-1).flip(-1) + leaving.sum((-2, -1)).unsqueeze(-1)


def _save(ctx, inputs, output):
    *tensors, _, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx, grad_out, grad_checkpoints):
    query, key, value, log_decay, checkpoints = ctx.saved_tensors
    with_decay, with_state = ctx.needs_input_grad[3:5]
    *grads, grad_initial, grad_decay = _backward(
        grad_out, grad_checkpoints[-1], query, key, value, log_decay, checkpoints, ctx.chunk_size, with_decay
    )
    if with_decay:
        grad_decay = grad_decay if log_decay.dim() == 3 else grad_decay.sum((0, 2))
        grad_decay = grad_decay.masked_fill(log_decay.exp() == 0, 0)
    return *grads, grad_decay if with_decay else None, grad_initial if with_state else None, None


def _refuse(ctx, *grads):
    raise RuntimeError(
        "linear_attention: a causal or decayed call has no second derivative; differentiate it once only"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
