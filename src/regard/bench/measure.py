"""What is measured of a call, and the limits of the machine it runs on."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from regard.bench.flops import flops
from regard.testing.checks.memory import peak_recorded

GEMM_SIZE, COPY_BYTES = 1024, 2**27


@dataclass(frozen=True)
class Work:
    """What one call does: floating-point operations in matrix products, and the most bytes of its own it holds.

    The bytes are None on a device whose allocator does not tell.
    """

    flops: float
    peak_bytes: int | None


def synchronize(device: torch.device) -> None:
    """Wait for what was started on `device`; nothing to wait for on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def times(
    calls: Sequence[Callable[[], object]],
    *,
    device: torch.device,
    seconds: float = 0.25,
    fewest: int = 3,
    most: int = 15,
) -> list[list[float]]:
    """Seconds of every run of each call, in rounds in which each has its turn: drift of the machine meets all alike.

    A call is warmed up once, then run for about `seconds`, but at least `fewest` and at most `most` times.
    """
    repeats = []
    for call in calls:
        once = _seconds(call, device)
        repeats.append(min(most, max(fewest, ceil(seconds / min(once, _seconds(call, device))))))
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(max(repeats, default=0)):
        for kept, call, count in zip(samples, calls, repeats, strict=True):
            if turn < count:
                kept.append(_seconds(call, device))
    return samples


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def gemm(dtype: torch.dtype, device: torch.device, size: int = GEMM_SIZE) -> tuple[Callable[[], object], float]:
    """A square matrix product, and its floating-point operations."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right, 2.0 * size**3


def copy(device: torch.device, size: int = COPY_BYTES) -> tuple[Callable[[], object], float]:
    """A copy larger than the caches, and the bytes it reads and writes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * size


def gemm_limit() -> float:
    """FLOP/s that the CPU reaches on a square float32 matrix product."""
    device = torch.device("cpu")
    call, flops = gemm(torch.float32, device, 2048)
    return flops / statistics.median(times([call], device=device, fewest=9)[0])


def work(call: Callable[[], object], device: torch.device) -> Work:
    """What `call` does, by torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise writes lines of its own to stderr
    on_cuda, before = device.type == "cuda", 0
    if on_cuda:
        gc.collect(1)  # what the call frees that was there before would count as room
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, record_shapes=True) as recorded:
        call()
        synchronize(device)
    peak = None
    if on_cuda:
        peak = torch.cuda.max_memory_allocated(device) - before
    elif device.type == "cpu":
        peak = peak_recorded(recorded)
    return Work(flops(recorded.events() or ()), peak)


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
