"""A model away from where it starts, and which of its parameters learn there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from regard.testing.compare import weighted_sum

Model = TypeVar("Model", bound=nn.Module)


def moved(model: Model, seed: int = 0) -> Model:
    """With its parameters moved a little: what starts at zero hides what stands behind it."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random, dtype=parameter.dtype))
    return model


def never_learning(build: Callable[[], nn.Module], x: Tensor) -> set[str]:
    """Parameters without a gradient wherever the model is moved: a rectifier may be dead in one place."""
    still = None
    for seed in range(8):
        model = moved(build(), seed)
        weighted_sum(model(x)).backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        sizes = {name: 0.0 if grad is None else float(grad.abs().max()) for name, grad in grads.items()}
        here = {name for name, size in sizes.items() if size < 1e-10 * max(sizes.values())}
        still = here if still is None else still & here
        if not still:
            break
    return still or set()
