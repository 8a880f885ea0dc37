"""One case: every kernel is verified against the reference, and those that pass are timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from regard.bench.kernels.adapters import Kernel, Operator, Problem, auto_engine
from regard.bench.kernels.patterns import PATTERNS, count_pairs
from regard.bench.kernels.results import Auto, KernelCase, KernelTiming, Phase, Verified
from regard.bench.measure import gemm, times, work
from regard.bench.timing import quartiles
from regard.ops import attention
from regard.ops.engines import COMPILED, ENGINES
from regard.ops.masks import Dense

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Of an error against the norm of its row: at least four times what rounding makes of it.

One key of 1024 left out is an error of 0.2.
"""

MOST_SCORES = 2**21
"""Scores of a head that the reference is asked for: all queries up to 1448 tokens, so many of longer sequences."""

FLOPS = {"forward": 4, "training": 14}
"""Per pair and channel: two products, and five more going back."""


def make_problem(
    pattern: str,
    length: int,
    phase: Phase,
    *,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> Problem:
    """Random inputs, the same for every kernel."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value, weight = (
        torch.randn(1, heads, length, dim, generator=generator).to(device, dtype) for _ in range(4)
    )
    for tensor in (query, key, value):
        tensor.requires_grad_(phase == "training")
    mask = PATTERNS[pattern](length, heads)
    return Problem(None if mask is None else mask.to(device), phase, query, key, value, weight)


def measure_case(problem: Problem, pattern: str, kernels: Sequence[Kernel]) -> KernelCase:
    """The case with a time for each kernel that takes it and is right."""
    expected = Expected(problem)
    heads, dim = problem.query.shape[1], problem.query.shape[-1]
    device, dtype = problem.query.device, problem.query.dtype
    right: dict[Kernel, tuple[Operator, Verified]] = {}
    first, wrong, failed, refused = {}, {}, {}, {}
    for kernel in kernels:
        reason = kernel.refuses(problem)
        if reason is not None:
            refused[kernel.name] = reason
            continue
        try:
            operator, started = kernel.prepare(problem), time.perf_counter()
            problem.run(operator, problem.weight)
            first[kernel] = time.perf_counter() - started
            error = expected.error(operator)
            if error <= TOLERANCE[dtype]:
                right[kernel] = operator, Verified(queries=len(expected.rows), error=error)
            else:
                wrong[kernel.name] = f"rows of output or gradients are off by up to {error:.2g} of their norm"
        except Exception as error:  # a library's kernel may raise anything; the others are still to be measured
            failed[kernel.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    pairs = count_pairs(problem.mask, heads, problem.length)
    flops = float(FLOPS[problem.phase] * dim * pairs)
    product, product_flops = gemm(dtype, device)
    calls = [lambda operator=operator: problem.run(operator, problem.weight) for operator, _ in right.values()]
    gemm_samples, *samples = times([product, *calls], device=device)
    gemm_flops = product_flops / statistics.median(gemm_samples)
    timings = {}
    for (kernel, (_, verified)), call, runs in zip(right.items(), calls, samples, strict=True):
        problem.forget()
        seconds, peak = quartiles(runs), work(call, device).peak_bytes
        timings[kernel.name] = KernelTiming(
            verified=verified,
            seconds=seconds,
            first_seconds=first[kernel],
            peak_bytes=None if peak is None else peak + kernel.kept(problem),
            share=flops / gemm_flops / seconds.median,
        )
    return KernelCase(
        pattern=pattern,
        length=problem.length,
        phase=problem.phase,
        pairs=pairs,
        flops=flops,
        gemm_flops=gemm_flops,
        auto=judge_auto(auto_engine(problem), timings),
        timings=timings,
        wrong=wrong,
        failed=failed,
        refused=refused,
    )


def judge_auto(engine: str, timings: Mapping[str, KernelTiming]) -> Auto:
    """Against the engines that were timed, so are right, and need no compiling: those it could have picked."""
    could = [name for name in ENGINES if name in timings and name not in COMPILED]
    medians = {name: timings[name].seconds.median for name in could}
    if engine not in medians:
        return Auto(engine=engine, behind=None, best=None)
    best = min(medians, key=medians.__getitem__)
    return Auto(engine=engine, behind=medians[engine] / medians[best], best=best)


class Expected:
    """What a problem's output and gradients must be, from the reference engine in double precision.

    Long sequences are asked for some of their queries: the gradient of the output is zero at all others, so that
    gradients of keys and values can be compared whole.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, length, device = problem, problem.length, problem.query.device
        count = min(length, MOST_SCORES // length)
        chosen = torch.randperm(length, generator=torch.Generator().manual_seed(length))[:count].sort().values
        self.rows = chosen.to(device)
        self.weight = torch.zeros_like(problem.weight)
        self.weight[:, :, self.rows] = problem.weight[:, :, self.rows]
        exact = torch.float32 if device.type == "mps" else torch.float64
        query, key, value = (tensor.detach().to(exact) for tensor in problem.inputs)
        query = query[:, :, self.rows]
        for tensor in (query, key, value):
            tensor.requires_grad_(problem.phase == "training")
        with torch.set_grad_enabled(problem.phase == "training"):
            out = attention(query, key, value, mask=self._mask(), backend="reference")
        self.tensors = [out.detach()]
        if problem.phase == "training":
            torch.autograd.backward(out, self.weight[:, :, self.rows].to(exact))
            self.tensors += [_gradient(tensor) for tensor in (query, key, value)]

    def error(self, operator: Operator) -> float:
        """The largest error of a row of output or gradients."""
        problem = self.problem
        found = [problem.run(operator, self.weight)[:, :, self.rows]]
        if problem.phase == "training":
            query, key, value = (_gradient(tensor) for tensor in problem.inputs)
            found += [query[:, :, self.rows], key, value]
        return max(_row_error(one, other) for one, other in zip(found, self.tensors, strict=True))

    def _mask(self) -> Dense | None:
        """The chosen rows of the mask."""
        mask, heads, keys = self.problem.mask, self.problem.query.shape[1], self.problem.length
        if mask is None:
            return None
        device = self.rows.device
        zero, head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device), torch.arange(heads, device=device)
        allowed = mask.allows(zero, head.view(-1, 1, 1), self.rows[:, None], torch.arange(keys, device=device))
        allowed = allowed.expand(*allowed.shape[:-2], len(self.rows), keys)
        return Dense(allowed if allowed.ndim == 4 else allowed.view(1, -1, *allowed.shape[-2:]))


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _row_error(found: Tensor, expected: Tensor) -> float:
    """The largest error of a row, against its own norm and that of a row on average; infinite for what is no number."""
    norm = expected.norm(dim=-1)
    error = ((found.to(expected.dtype) - expected).norm(dim=-1) / (norm + norm.mean()).clamp(min=1e-30)).max()
    return float(error) if bool(error.isfinite()) else float("inf")
