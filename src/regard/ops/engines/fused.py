"""torch's own `scaled_dot_product_attention`, for the calls it can take."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.engines.call import Call
from regard.ops.masks import Causal


def refuses(call: Call) -> str | None:
    """Why this engine cannot take `call`, or None."""
    if not call.is_softmax:
        return f"scaled_dot_product_attention has no {type(call.normalizer).__name__}"
    if call.needs_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp"
    if call.dropout > 0:
        return "the dropout pattern of scaled_dot_product_attention is its own and cannot be reproduced"
    return None


def needs_no_dense(call: Call) -> bool:
    """Whether the call runs without an N×N mask or bias tensor."""
    if call.bias is not None:
        return False
    causal = call.mask is not None and call.mask == Causal()
    return call.mask is None or (causal and (call.queries == call.keys or call.queries == 1))


def run(call: Call) -> tuple[Tensor, None]:
    """Output; SDPA gives no log-sum-exp."""
    mask, empty, is_causal = None, None, False
    query, key, value = call.query, call.key, call.value
    if needs_no_dense(call):
        # Of one width: torch's CPU kernel for others builds all scores.
        width = max(query.shape[-1], value.shape[-1])
        query, key, value = (_filled(heads, width) for heads in (query, key, value))
        # One query stands at the last key, where causal masks nothing. A branch, since a compiled length is no integer.
        if call.mask is not None and call.queries > 1:
            is_causal = True
    else:
        allowed, bias = call.dense_mask(), call.dense_bias()
        if allowed is not None:
            # What SDPA does with an empty row differs between its kernels: give it a full one, and zeros after.
            empty = ~allowed.any(-1, keepdim=True)
            allowed = allowed | empty
        mask = allowed
        if bias is not None:
            mask = bias.to(call.query.dtype)
            mask = mask if allowed is None else mask.masked_fill(~allowed, -torch.inf)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_causal,
        scale=call.scale,
        enable_gqa=call.heads != call.key_heads,
    )
    out = out[..., : call.value.shape[-1]]
    return (out if empty is None else out.masked_fill(empty, 0.0)), None


def _filled(heads: Tensor, width: int) -> Tensor:
    """`heads` with zeros up to a width, which change neither a score nor the values before them."""
    return heads if heads.shape[-1] == width else F.pad(heads, (0, width - heads.shape[-1]))
