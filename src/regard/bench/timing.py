"""Layers side by side at one length: forward, training, a decode step, memory, share of the machine's limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.bench.measure import copy, gemm, times, work
from regard.bench.results import LayerTiming, Seconds, TimingCell
from regard.bench.variant import Variant
from regard.catalogue import Pattern
from regard.testing.checks.decoding import state_bytes

STEPS = 16
"""Decode steps in one timed run."""


@dataclass
class Layer:
    """A mechanism ready to be timed."""

    module: Any
    x: Tensor
    weight: Tensor
    state: Any = field(default=None)
    context: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.x,) if self.context is None else (self.x, self.context)

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.module(*self.inputs)

    def clear(self) -> None:
        """Free the gradients of the parameters."""
        self.module.zero_grad(set_to_none=True)

    def train(self) -> None:
        self.clear()
        torch.autograd.backward(self.module(*(tensor.requires_grad_() for tensor in self.inputs)), self.weight)
        for tensor in self.inputs:
            tensor.grad = None

    def decode(self) -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                _, self.state = self.module.step(self.x[:, -1:], self.state)

    def bytes_moved(self) -> int:
        """Input and output, each once: of parameters a short sequence may not need all."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.inputs, self.weight))


def time_layers(
    variants: Sequence[Variant],
    pattern: Pattern,
    length: int,
    *,
    dim: int,
    heads: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> tuple[TimingCell, dict[str, str]]:
    """The measurements, and for each variant that could not be measured the reason.

    A context is as long as the sequence.
    """
    layers: dict[str, Layer] = {}
    failures: dict[str, str] = {}
    for variant in variants:
        torch.manual_seed(seed)
        try:
            module = variant.build(dim, heads, pattern, dtype=dtype, device=device)
            x = variant.input(length, dim, dtype, device)
            layer = Layer(module, x, torch.randn_like(x))
            if pattern.endswith("cross"):
                layer.context = torch.randn(1, length, dim, dtype=dtype, device=device)
            layer.train()
            if pattern == "causal self" and variant.card.contract.step:
                with torch.no_grad():
                    _, layer.state = module.step(x, module.init_state(1))
            layers[str(variant)] = layer
        except (RuntimeError, ValueError, NotImplementedError) as error:
            failures[str(variant)] = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    product, product_flops = gemm(dtype, device)
    copying, copied = copy(device)
    states = {name: state_bytes(layer.state) for name, layer in layers.items() if layer.state is not None}
    calls = {
        ("machine", "gemm"): product,
        ("machine", "copy"): copying,
        **{(name, phase): call for name, layer in layers.items() for phase, call in _phases(layer).items()},
    }
    samples = dict(zip(calls, times([*calls.values()], device=device), strict=True))
    gemm_flops = product_flops / statistics.median(samples["machine", "gemm"])
    copy_bytes = copied / statistics.median(samples["machine", "copy"])

    measured = {}
    for name, layer in layers.items():
        forward, training = (quartiles(samples[name, phase]) for phase in ("forward", "training"))
        layer.clear()  # else the gradients of the last run, freed in this one, would count as room
        # Training first: it makes anew what other layers drove out of the caches of plans, which forward then finds.
        both, once = work(layer.train, device), work(layer.forward, device)
        moved = layer.bytes_moved()
        measured[name] = LayerTiming(
            forward=forward,
            training=training,
            step=quartiles([run / STEPS for run in samples[name, "step"]]) if name in states else None,
            forward_flops=once.flops,
            training_flops=both.flops,
            forward_share=max(once.flops / gemm_flops, moved / copy_bytes) / forward.median,
            training_share=max(both.flops / gemm_flops, 2 * moved / copy_bytes) / training.median,
            forward_peak_bytes=once.peak_bytes,
            training_peak_bytes=both.peak_bytes,
            state_bytes=states.get(name),
        )
    cell = TimingCell(pattern=pattern, length=length, gemm_flops=gemm_flops, copy_bytes=copy_bytes, layers=measured)
    return cell, failures


def _phases(layer: Layer) -> dict[str, Callable[[], object]]:
    phases: dict[str, Callable[[], object]] = {"forward": layer.forward, "training": layer.train}
    if layer.state is not None:
        phases["step"] = layer.decode
    return phases


def quartiles(samples: Sequence[float]) -> Seconds:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Seconds(median=median, low=low, high=high, runs=len(samples))
