"""FlexAttention under torch.compile, with block masks made from our plan instead of by evaluating N×N."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from regard.ops.engines.call import Call
from regard.ops.masks import Tiles, plan
from regard.ops.masks.base import FULL, PARTIAL

BLOCK = 128


def refuses(call: Call) -> str | None:
    """Why this engine cannot take `call`, or None."""
    device = call.query.device.type
    if not call.is_softmax:
        return f"FlexAttention has no {type(call.normalizer).__name__}"
    if call.dropout > 0:
        return "FlexAttention has no dropout"
    if device not in ("cpu", "cuda"):
        return f"FlexAttention does not run on {device}"
    if device == "cpu" and call.needs_grad:
        return "FlexAttention has no backward on CPU; use backend='tiled' or torch.no_grad()"
    if device == "cpu" and call.needs_lse:
        return "FlexAttention does not return the log-sum-exp on CPU"
    if call.query.dtype == torch.float64:
        return "FlexAttention does not take float64"
    if call.bias is not None and any(tensor.requires_grad for tensor in call.bias.flatten()[1]) and call.needs_grad:
        return "FlexAttention's gradients to captured bias tables are not relied on here; use backend='tiled'"
    return None


def run(call: Call) -> tuple[Tensor, Tensor | None]:
    """Output, and on CUDA the log-sum-exp in float32."""
    arguments: dict[str, Any] = {
        "block_mask": _block_mask(call),
        "score_mod": _score_mod(call),
        "scale": call.scale,
        "enable_gqa": call.heads != call.key_heads,
    }
    tensors = call.query, call.key, call.value
    if not call.needs_grad:
        # On CPU it refuses what requires grad even under no_grad.
        tensors = tuple(tensor.detach() for tensor in tensors)
    if call.needs_lse:
        from torch.nn.attention.flex_attention import AuxRequest

        out, more = _compiled()(*tensors, return_aux=AuxRequest(lse=True), **arguments)
        return out, more.lse
    return _compiled()(*tensors, **arguments), None


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _block_mask(call: Call) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    if call.mask is None:
        return None
    tiles = Tiles(call.batch, call.heads, call.queries, call.keys, BLOCK, BLOCK)
    states = plan(call.mask, tiles).states.to(call.query.device)

    def listed(wanted: int) -> tuple[Tensor, Tensor]:
        chosen = states == wanted
        order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32)

    return BlockMask.from_kv_blocks(
        *listed(PARTIAL),
        *listed(FULL),
        BLOCK_SIZE=BLOCK,
        mask_mod=call.mask.flex(call.queries, call.keys),
        seq_lengths=(call.queries, call.keys),
    )


def _score_mod(call: Call) -> Any:
    if call.bias is None:
        return None
    bias, offset = call.bias, call.keys - call.queries

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias.score(batch, head, query + offset, key)

    return score_mod
