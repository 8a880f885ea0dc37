"""Sharded attention (S2-Attention) against dense causal attention at 16 384 tokens, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import Row, report, threads_argument, times
from regard.nn import S2Attention
from regard.ops import attention

HEADS, WIDTH, LENGTH, CHECKED = 8, 64, 16384, 2048
AT_LEAST = 6


def inputs(length: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, length, WIDTH, requires_grad=True) for _ in range(3)]


def forward_backward(function, tensors):
    seed = torch.randn_like(tensors[0])

    def run() -> list[Tensor]:
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, seed)]

    return run


def verify(layer: S2Attention) -> None:
    """No speed of a wrong result: the dense definition at a length it can be built for, the plain mask at the other."""
    for length, backend in ((CHECKED, "reference"), (LENGTH, "tiled")):
        tensors = inputs(length)
        seed = torch.randn_like(tensors[0])
        outs = (layer.attend(*tensors), attention(*tensors, mask=layer.full_mask(None), backend=backend))
        found, wanted = ([out, *torch.autograd.grad(out, tensors, seed)] for out in outs)
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def pairs(layer: S2Attention) -> float:
    """How many scores a head has on average, as a share of the full matrix."""
    mask, step = layer.full_mask(None), 1024
    count = 0
    for start in range(0, LENGTH, step):
        index = torch.arange(start, start + step)
        allowed = mask.allows(torch.tensor(0), torch.arange(HEADS)[:, None, None], index[:, None], torch.arange(LENGTH))
        count += int(allowed.sum())
    return count / HEADS / LENGTH**2


def compare(case: str, stride: int) -> Row:
    layer = S2Attention(HEADS * WIDTH, heads=HEADS, block_size=64, local_blocks=1, vertical_stride=stride)
    verify(layer)
    tensors = inputs(LENGTH)
    ours = forward_backward(layer.attend, tensors)
    peer = forward_backward(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), tensors)
    ours_seconds, peer_seconds = times(ours, peer, repeats=3)
    ratio, share = peer_seconds / ours_seconds, pairs(layer)
    detail: dict[str, float | str] = {"scores of the full matrix": share, "fewer scores": 0.5 / share}
    target = f"≥ {AT_LEAST}×"
    return Row(case, "SDPA is_causal", ratio, target, ratio >= AT_LEAST, ours_seconds, peer_seconds, detail)


if __name__ == "__main__":
    threads_argument()
    where = f"N={LENGTH}, forward+backward"
    rows = [
        compare(f"8 shards, 1/16 of the full matrix, {where}", 8),
        # Eight heads hold only half of sixteen shards.
        compare(f"16 shards, 1/16 of the causal half, {where}", 16),
    ]
    report("s2_attention", rows)
