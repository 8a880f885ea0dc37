"""Linear attention against fused softmax attention, against plain PyTorch chunks, and against its own length."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import Row, gemm_limit, keep_freed_memory, report, threads_argument, times
from regard.ops.linear import linear_attention, linear_attention_step

HEADS, DIM, LENGTH, CHUNK = 8, 64, 16384, 64


def draw(length: int, *, grad: bool = False) -> list[Tensor]:
    return [torch.randn(1, HEADS, length, DIM, requires_grad=grad) for _ in range(3)]


def decays(length: int) -> dict[str, Tensor | None]:
    per_head = -torch.rand(HEADS) * 0.1
    return {"no decay": None, "decay per head": per_head, "decay per token": -torch.rand(1, HEADS, length) * 0.1}


def flops(length: int, *, backward: bool) -> float:
    """Of the products a chunked pass needs: 2 inside chunks and 2 with the state, then 5 and 5 backward."""
    return HEADS * length * (14 if backward else 4) * DIM * (CHUNK + DIM)


def plain(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor | None, size: int) -> Tensor:
    """All chunks at once and autograd through it: running sums of the chunk states, or one product with their decays.

    (The running sum over tokens instead of chunks holds a state per token: 2 GiB here, and is slower still.)
    """
    q, k, v = (tensor.unflatten(2, (-1, size)) for tensor in (query, key, value))
    chunks, token = q.shape[2], torch.arange(size)
    if log_decay is None:
        states = (k.mT @ v).cumsum(2).roll(1, 2)
        states = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, 1:]], 2)
        return (q @ states + (q @ k.mT).tril() @ v).flatten(2, 3)
    rate = log_decay[:, None, None, None]
    within = torch.exp(rate * (token[:, None] - token)).tril()
    chunk = torch.arange(chunks)
    between = torch.exp(log_decay[:, None, None] * size * (chunk[:, None] - chunk - 1)).tril(-1)
    updates = (k * torch.exp(rate * (size - 1 - token)[:, None])).mT @ v
    states = (between @ updates.flatten(3)).unflatten(3, (DIM, DIM))
    read = (q @ states) * torch.exp(rate * (token + 1)[:, None])
    return (read + (q @ k.mT * within) @ v).flatten(2, 3)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, weight)


def verify(out: Tensor, inputs: list[Tensor], log_decay: Tensor | None) -> None:
    """The last 64 queries over all keys, in float64, against the quadratic definition."""
    query, key, value = (tensor.detach().double() for tensor in inputs)
    length = query.shape[2]
    per_token = torch.zeros(1, HEADS, length) if log_decay is None else log_decay.detach()
    per_token = per_token[None, :, None].expand(1, HEADS, length) if per_token.dim() == 1 else per_token
    total = per_token.double().cumsum(-1)
    weights = (total[:, :, -64:, None] - total[:, :, None]).tril(length - 64).exp().tril(length - 64)
    exact = (query[:, :, -64:] @ key.mT * weights) @ value
    error = float((out.detach()[:, :, -64:] - exact).norm() / exact.norm())
    if error > 1e-5:
        raise SystemExit(f"wrong output: relative error {error:.1e}; nothing to report")


def verify_same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        error = float((one - other).detach().norm() / other.detach().norm())
        if error > 1e-4:
            raise SystemExit(f"ours and the peer differ: relative error {error:.1e}; nothing to report")


def against_softmax(limit: float) -> list[Row]:
    inputs = draw(LENGTH)
    calls = {
        name: partial(linear_attention, *inputs, log_decay=log_decay) for name, log_decay in decays(LENGTH).items()
    }
    for call in calls.values():
        verify(call(), inputs, call.keywords["log_decay"])
    softmax = partial(F.scaled_dot_product_attention, *inputs, is_causal=True)
    *ours, peer = times(*calls.values(), softmax, repeats=5)
    work = flops(LENGTH, backward=False)
    return [
        Row(f"forward, N={LENGTH}, {name}", "SDPA is_causal", peer / seconds, ">= 15", peer / seconds >= 15,
            seconds, peer, {"GEMM share": work / seconds / limit})
        for name, seconds in zip(calls, ours, strict=True)
    ]  # fmt: skip


def against_plain(limit: float) -> list[Row]:
    rows = []
    inputs, weight = draw(LENGTH, grad=True), torch.randn(1, HEADS, LENGTH, DIM)
    work = flops(LENGTH, backward=True)
    for name in ("no decay", "decay per head"):
        log_decay = decays(LENGTH)[name]
        ours = partial(with_gradients, partial(linear_attention, log_decay=log_decay), inputs, weight)
        sizes = {
            size: partial(with_gradients, partial(plain, log_decay=log_decay, size=size), inputs, weight)
            for size in (64, 128, 256)
        }
        verify(ours()[0], inputs, log_decay)
        for peer in sizes.values():
            verify_same(ours(), peer())
        seconds, *peers = times(ours, *sizes.values(), repeats=5)
        peer, size = min(zip(peers, sizes, strict=True))
        rows.append(
            Row(f"forward+backward, N={LENGTH}, {name}", f"plain chunks of {size}", peer / seconds, ">= 1.5",
                peer / seconds >= 1.5, seconds, peer, {"GEMM share": work / seconds / limit})
        )  # fmt: skip
    return rows


def time_by_length(*, backward: bool) -> dict[int, float]:
    log_decay = -torch.rand(HEADS) * 0.1
    attend = partial(linear_attention, log_decay=log_decay)
    calls = {}
    for length in (2**power for power in range(13, 17)):
        inputs, weight = draw(length, grad=backward), torch.randn(1, HEADS, length, DIM)
        verify(attend(*inputs), inputs, log_decay)
        calls[length] = partial(with_gradients, attend, inputs, weight) if backward else partial(attend, *inputs)
    return dict(zip(calls, times(*calls.values(), repeats=7), strict=True))


def against_length() -> list[Row]:
    """The growth from each length to its double, in memory that is reused; with fresh pages as a detail."""
    fresh = {backward: time_by_length(backward=backward) for backward in (False, True)}
    keep_freed_memory()
    rows = []
    for backward, slow in fresh.items():
        seconds = time_by_length(backward=backward)
        worst, worst_fresh = (max(b / a for a, b in pairwise(by.values())) for by in (seconds, slow))
        detail = {f"{length // 1024}k ms": value * 1e3 for length, value in seconds.items()}
        case = f"{'forward+backward' if backward else 'forward'}, N doubled, worst of 8k to 64k"
        rows.append(
            Row(case, "itself at N", worst, "<= 2.2", worst <= 2.2, seconds[2**16], seconds[2**13],
                {**detail, "with fresh pages": worst_fresh})
        )  # fmt: skip
    return rows


def step_time() -> Row:
    states = {}
    for length in (1024, 65536):
        _, states[length] = linear_attention(*draw(length), return_state=True)
    token = draw(1)

    def many(state: Tensor) -> Tensor:
        for _ in range(200):
            out, state = linear_attention_step(*token, state)
        return out

    out, _ = linear_attention_step(*token, states[1024])
    exact = token[0].double() @ (states[1024].double() + token[1].double().mT @ token[2].double())
    verify_same((out,), (exact,))
    early, late = (value / 200 for value in times(*(partial(many, state) for state in states.values()), repeats=9))
    return Row("a decode step after 65536 tokens", "after 1024", late / early, "<= 1.2", late <= 1.2 * early, late,
               early, {"us a step": statistics.mean([early, late]) * 1e6})  # fmt: skip


if __name__ == "__main__":
    threads_argument()
    torch.manual_seed(0)
    limit = gemm_limit()
    with torch.no_grad():
        softmax_rows = against_softmax(limit)
    report("linear", [*softmax_rows, *against_plain(limit), *against_length(), step_time()])
