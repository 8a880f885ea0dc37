"""Sharded attention (S2-Attention) with 1/16 of the scores of dense causal attention, which it is timed against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import Row, report, threads_argument, times
from regard.nn import S2Attention
from regard.ops import attention

SHARDS, WIDTH, LENGTH, CHECKED = 16, 64, 16384, 2048
AT_LEAST = 6


def inputs(length: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, SHARDS, length, WIDTH, requires_grad=True) for _ in range(3)]


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
        allowed = mask.allows(
            torch.tensor(0), torch.arange(SHARDS)[:, None, None], index[:, None], torch.arange(LENGTH)
        )
        count += int(allowed.sum())
    return count / SHARDS / LENGTH**2


def compare() -> Row:
    """One head for each shard: together they see the whole context."""
    layer = S2Attention(SHARDS * WIDTH, heads=SHARDS, block_size=64, local_blocks=1, vertical_stride=SHARDS)
    verify(layer)
    tensors = inputs(LENGTH)
    ours = forward_backward(layer.attend, tensors)
    peer = forward_backward(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), tensors)
    ours_seconds, peer_seconds = times(ours, peer, repeats=3)
    ratio, share = peer_seconds / ours_seconds, 2 * pairs(layer)
    detail: dict[str, float | str] = {"scores of causal attention": share, "fewer scores": 1 / share}
    case = f"{SHARDS} shards for {SHARDS} heads, N={LENGTH}, forward+backward"
    reached = ratio >= AT_LEAST
    return Row(case, "SDPA is_causal", ratio, f"≥ {AT_LEAST}×", reached, ours_seconds, peer_seconds, detail)


if __name__ == "__main__":
    threads_argument()
    report("s2_attention", [compare()])
