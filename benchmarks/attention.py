"""`regard.ops.attention` against torch's own: causal, a sliding window, the window against compiled FlexAttention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import Row, gemm_limit, report, threads_argument, times
from regard.ops import attention
from regard.ops.masks import Causal, Mask, Window
from regard.testing.checks.memory import peak_bytes

HEADS, WIDTH = 8, 64


def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, HEADS, length, WIDTH, requires_grad=True) for _ in range(3))
    return query, key, value


def forward(function, tensors):
    def run() -> Tensor:
        with torch.no_grad():
            return function(*tensors)

    return run


def forward_backward(function, tensors):
    torch.manual_seed(1)
    seed = torch.randn_like(tensors[0])

    def run() -> list[Tensor]:
        out = function(*tensors)
        return [out, *torch.autograd.grad(out, tensors, seed)]

    return run


def verify(ours, peer) -> None:
    """No speed of a wrong result."""
    found, wanted = ours(), peer()
    for a, b in zip(*([x] if isinstance(x, Tensor) else x for x in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def compare(case: str, peer_name: str, ours, peer, at_least: float, flops: float, limit: float, memory=False) -> Row:
    verify(ours, peer)
    ours_seconds, peer_seconds = times(ours, peer)
    ratio = peer_seconds / ours_seconds
    detail: dict[str, float | str] = {"share of GEMM limit": flops / ours_seconds / limit}
    reached = ratio >= at_least
    if memory:
        # Extra: beyond the results themselves, which are the same for both.
        results = sum(tensor.numel() * tensor.element_size() for tensor in ours())
        ours_bytes, peer_bytes = peak_bytes(ours) - results, peak_bytes(peer) - results
        detail |= {"extra MB": ours_bytes / 2**20, "peer's MB": peer_bytes / 2**20}
        reached &= ours_bytes * 8 <= peer_bytes
    target = f"≥ {at_least:.3g}×" + (", extra memory ≤ 1/8" if memory else "")
    return Row(case, peer_name, ratio, target, reached, ours_seconds, peer_seconds, detail)


def tiled(mask: Mask):
    return lambda query, key, value: attention(query, key, value, mask=mask, backend="tiled")


def causal_rows(limit: float) -> list[Row]:
    length = 4096
    tensors = inputs(length)

    def peer(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    pairs = HEADS * length * (length + 1) / 2
    run, peer_run = forward_backward(tiled(Causal()), tensors), forward_backward(peer, tensors)
    case = f"causal, N={length}, forward+backward"
    return [compare(case, "SDPA is_causal", run, peer_run, 1 / 1.3, pairs * WIDTH * 2 * 7, limit)]


def window_rows(limit: float) -> list[Row]:
    length, mask = 8192, Causal() & Window(255)
    tensors = inputs(length)
    dense = mask.dense(length, length)

    def peer(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=dense)

    def flex(query, key, value):
        return attention(query, key, value, mask=mask, backend="flex")

    flops = HEADS * length * 256 * WIDTH * 2
    ours, case = tiled(mask), f"window 256, N={length}"
    both = forward_backward(ours, tensors), forward_backward(peer, tensors)
    alone = forward(ours, tensors), forward(peer, tensors)
    return [
        compare(f"{case}, forward+backward", "SDPA, mask tensor", *both, 16, flops * 7, limit, memory=True),
        compare(f"{case}, forward", "SDPA, mask tensor", *alone, 14, flops * 2, limit),
        compare(
            f"{case}, forward", "FlexAttention, compiled", alone[0], forward(flex, tensors), 1 / 1.5, flops * 2, limit
        ),
    ]


if __name__ == "__main__":
    threads_argument()
    limit = gemm_limit()
    report("attention", [*causal_rows(limit), *window_rows(limit)])
