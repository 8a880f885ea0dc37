"""FlashAttention-2's loop over tiles (2023, arXiv 2307.08691) in plain PyTorch, forward and backward.

Any mask, bias and tileable normalizer on any device without a compiler. Tiles that the mask empties are skipped, full
ones never look at it, and keys are walked as views. Extra memory is O(N): one tile of scores at a time. The loop is one
node for torch.compile and export (``regard::tiled_attention``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard.ops.dropout import draw_seed
from regard.ops.engines.call import Call
from regard.ops.engines.loops import loop_for
from regard.ops.precision import exact, statistics_dtype


def refuses(call: Call) -> str | None:
    """Why this engine cannot take `call`, or None."""
    if not call.normalizer.tileable:
        return f"{type(call.normalizer).__name__} needs whole rows of scores"
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
@exact
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
    return loop_for(
        query, key, value, mask_tensors, bias_tensors, seed, mask, bias, normalizer, scale, dropout
    ).forward()


@tiled_attention.register_fake
def _(query, key, value, *arguments):
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=statistics_dtype(query.dtype))


@torch.library.custom_op("regard::tiled_attention_backward", mutates_args=())
@exact
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
    loop = loop_for(query, key, value, mask_tensors, bias_tensors, seed, mask, bias, normalizer, scale, dropout)
    return loop.backward(grad_out, grad_lse, out, lse, train_bias)


@tiled_attention_backward.register_fake
def _(grad_out, grad_lse, out, lse, query, key, value, mask_tensors, bias_tensors, *arguments):
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value, *bias_tensors)
    ]


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
        grad_out,
        grad_lse,
        out,
        lse,
        query,
        key,
        value,
        mask_tensors,
        bias_tensors,
        seed,
        *ctx.constants,
        ctx.train_bias,
    )
    bias_grads = grads[3:] if ctx.train_bias else [None] * len(bias_tensors)
    return *grads[:3], [None] * len(mask_tensors), bias_grads, None, None, None, None, None, None


def _refuse_twice(ctx, *grads):
    raise RuntimeError(
        "attention: backend 'tiled' has no second derivative; use backend='reference' for double backward"
    )


torch.library.register_autograd("regard::tiled_attention", _backward, setup_context=_keep_for_backward)
torch.library.register_autograd("regard::tiled_attention_backward", _refuse_twice)
