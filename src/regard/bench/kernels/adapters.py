"""What is measured: our engines, torch's attention with a dense mask, and the kernels of libraries that are installed.

A kernel says which cases it refuses, and prepares what its user would prepare once: a dense mask, sequence offsets. The
kernels of other libraries are asked only for the masks they have a word for; whether theirs means the same as ours is
verified like everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.bench.kernels.results import Phase
from regard.ops import attention
from regard.ops.attention import Backend, explain
from regard.ops.engines import ENGINES
from regard.ops.masks import And, Causal, Mask, Segments, Window

MOST_REFERENCE, MOST_DENSE = 2048, 16384
"""Tokens up to which engines that build all scores, or a dense mask, are worth measuring."""

Operator = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Inputs (1, heads, length, dim), the gradient of the output, and the mask."""

    mask: Mask | None
    phase: Phase
    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def length(self) -> int:
        return self.query.shape[2]

    @cached_property
    def dense(self) -> Tensor | None:
        """The mask as booleans."""
        if self.mask is None:
            return None
        device, heads = self.query.device, self.query.shape[1]
        return self.mask.to(device).dense(self.length, self.length, heads=heads, device=device)

    @cached_property
    def documents(self) -> Tensor | None:
        """Where each document of a packed row begins, and the end, if the mask is that and causal."""
        mask = self.mask
        if not (isinstance(mask, And) and isinstance(mask.left, Segments) and mask.right == Causal()):
            return None
        starts = mask.left.starts().nonzero().flatten()
        return F.pad(starts, (0, 1), value=self.length).to(self.query.device, torch.int32)

    def run(self, operator: Operator, weight: Tensor) -> Tensor:
        """One forward, or one forward and backward with the gradient `weight` of the output."""
        if self.phase == "forward":
            with torch.no_grad():
                return operator(*self.inputs)
        self.forget()
        out = operator(*self.inputs)
        torch.autograd.backward(out, weight)
        return out.detach()

    def forget(self) -> None:
        """Free the gradients of the last run."""
        for tensor in self.inputs:
            tensor.grad = None


@dataclass(frozen=True)
class Kernel:
    """Something that computes attention."""

    name: str
    refuses: Callable[[Problem], str | None]
    prepare: Callable[[Problem], Operator]
    package: str = ""
    """What must be installed."""
    kept: Callable[[Problem], int] = lambda problem: 0
    """Bytes that stay from `prepare` to be counted as its memory."""

    @property
    def absent(self) -> str | None:
        """Why it cannot be measured here at all."""
        try:
            return None if not self.package or find_spec(self.package) else f"{self.package} is not installed"
        except (ImportError, ValueError) as error:
            return f"{self.package} cannot be imported: {error}"


def _engine(name: str) -> Kernel:
    backend = cast(Backend, name)

    def refuses(problem: Problem) -> str | None:
        reason = _explained(problem).refusals.get(name)
        if reason is None and name == "reference" and problem.length > MOST_REFERENCE:
            return f"it builds all scores, and is left out above {MOST_REFERENCE} tokens"
        dense = name == "fused" and problem.mask not in (None, Causal())
        if reason is None and dense and problem.length > MOST_DENSE:
            return f"it builds a dense mask, and is left out above {MOST_DENSE} tokens"
        return reason

    def prepare(problem: Problem) -> Operator:
        if name == "flex":
            torch.compiler.reset()  # after eight shapes torch would run it uncompiled, in silence
        return lambda query, key, value: attention(query, key, value, mask=problem.mask, backend=backend)

    return Kernel(name, refuses, prepare)


def _explained(problem: Problem) -> Any:
    with torch.set_grad_enabled(problem.phase == "training"):
        return explain(*problem.inputs, mask=problem.mask)


def auto_engine(problem: Problem) -> str:
    """The engine that ``backend="auto"`` takes."""
    return _explained(problem).engine


def _dense_refuses(problem: Problem) -> str | None:
    if problem.mask is None:
        return "without a mask it is the engine 'fused'"
    return f"left out above {MOST_DENSE} tokens" if problem.length > MOST_DENSE else None


def _dense(problem: Problem) -> Operator:
    mask = problem.dense
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _dense_bytes(problem: Problem) -> int:
    return 0 if problem.dense is None else problem.dense.numel()


def _natten_refuses(problem: Problem) -> str | None:
    if not (isinstance(problem.mask, Window) and problem.mask.after == 0):
        return "it has windows only, and causal ones alone are the same at the borders"
    if problem.query.device.type == "cpu" and problem.phase == "training":
        return "no backward on CPU"
    return None


def _natten(problem: Problem) -> Operator:
    na1d, size = import_module("natten").na1d, cast(Window, problem.mask).before + 1
    return _tokens_first(lambda query, key, value: na1d(query, key, value, kernel_size=size, is_causal=True))


def _on_cuda(problem: Problem) -> str | None:
    return None if problem.query.device.type == "cuda" else "CUDA only"


def _half_on_cuda(problem: Problem) -> str | None:
    half = problem.query.dtype in (torch.float16, torch.bfloat16)
    return _on_cuda(problem) or (None if half else "half types only")


def _has_word(problem: Problem, *, full: bool = True, window: bool = True) -> str | None:
    mask = problem.mask
    known = mask == Causal() or problem.documents is not None
    known = known or (full and mask is None) or (window and isinstance(mask, Window))
    return None if known else "no word for this mask"


def _fla(problem: Problem) -> Operator:
    parallel, documents = import_module("fla.ops.attn").parallel_attn, problem.documents
    starts = None if documents is None else documents.long()
    return _tokens_first(lambda query, key, value: parallel(query, key, value, cu_seqlens=starts))


def _xformers(problem: Problem) -> Operator:
    operations, biases = import_module("xformers.ops"), import_module("xformers.ops.fmha.attn_bias")
    mask, documents, bias = problem.mask, problem.documents, None
    if documents is not None:
        bias = biases.BlockDiagonalCausalMask.from_seqlens(documents.diff().tolist(), device=documents.device)
    elif isinstance(mask, Window):
        bias = biases.LocalAttentionFromBottomRightMask(window_left=mask.before, window_right=mask.after)
    elif mask is not None:
        bias = biases.LowerTriangularMask()
    attend = operations.memory_efficient_attention
    return _tokens_first(lambda query, key, value: attend(query, key, value, attn_bias=bias))


def _flash_attn(problem: Problem) -> Operator:
    flash, mask, starts = import_module("flash_attn"), problem.mask, problem.documents
    if starts is not None:
        longest = int(starts.diff().max())
        return _tokens_first(
            lambda *inputs: flash.flash_attn_varlen_func(
                *(tensor.squeeze(0) for tensor in inputs), starts, starts, longest, longest, causal=True
            ).unsqueeze(0)
        )
    window = (mask.before, mask.after) if isinstance(mask, Window) else (-1, -1)
    causal = mask == Causal()
    return _tokens_first(lambda *inputs: flash.flash_attn_func(*inputs, causal=causal, window_size=window))


def _tokens_first(operator: Callable[..., Tensor]) -> Operator:
    """For kernels whose layout is (batch, length, heads, dim)."""
    return lambda *inputs: operator(*(tensor.transpose(1, 2).contiguous() for tensor in inputs)).transpose(1, 2)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        *map(_engine, ENGINES),
        Kernel("sdpa_dense_mask", _dense_refuses, _dense, kept=_dense_bytes),
        Kernel("natten", _natten_refuses, _natten, "natten"),
        Kernel("fla", lambda case: _on_cuda(case) or _has_word(case, full=False, window=False), _fla, "fla"),
        Kernel("xformers", lambda case: _on_cuda(case) or _has_word(case), _xformers, "xformers"),
        Kernel("flash_attn", lambda case: _half_on_cuda(case) or _has_word(case), _flash_attn, "flash_attn"),
    )
}
"""By name, engines first."""
