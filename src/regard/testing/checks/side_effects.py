"""Nothing of the caller's is written to, and no memory is read before it is written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from regard.ops.masks import Mask
from regard.testing.arguments import forward_arguments
from regard.testing.cases import Case
from regard.testing.compare import assert_same, weighted_sum
from regard.testing.outcome import assert_same_outcome, outcome
from regard.testing.proof import proves, told_apart


@proves()
def inputs_stay_unchanged(case: Case) -> None:
    """x, context, masks and positions are as they were after forward and backward, and the output is none of them."""
    module = case.build()
    for name, arguments in forward_arguments(case, case.inputs()).items():
        for leaf in (True, False):
            drawn = case.inputs()
            inputs = drawn.with_gradients() if leaf else drawn
            watched = dict(zip(("x", "context"), inputs.tensors(), strict=False)) | _tensors(arguments)
            before = {key: value.detach().clone() for key, value in watched.items()}
            with told_apart(name):
                out = case.run(module, inputs, **arguments)
                shared = [key for key, value in watched.items() if _storage(value) == _storage(out)]
                assert not shared, f"the output shares memory with {', '.join(shared)}"
                if out.requires_grad:
                    weighted_sum(out).backward()
                for key, value in watched.items():
                    assert_same(value.detach(), before[key], f"{key} after forward and backward")


@proves(lambda case: case.steps)
def step_leaves_its_input(case: Case) -> None:
    """A step does not write to its tokens."""
    module: Any = case.build()
    x = case.inputs(3).x
    before = x.clone()
    module.step(x, module.init_state(x.shape[0]))
    assert_same(x, before, "x after a step")


@proves()
def no_uninitialised_memory_is_read(case: Case) -> None:
    """With every new buffer filled with NaN, outputs and gradients are what they are without."""
    module = case.build()
    for name, arguments in forward_arguments(case, case.inputs()).items():
        clean = outcome(case, module, arguments)
        with _poisoned():
            poisoned = outcome(case, module, arguments)
        with told_apart(name):
            assert_same_outcome(poisoned, clean, "with new memory full of NaN")
    if case.steps:
        x = case.inputs().x
        clean = _decoded(module, x)
        with _poisoned(), torch.no_grad():
            assert_same(_decoded(module, x), clean, "outputs of steps with new memory full of NaN")


@proves()
def inference_mode_changes_nothing(case: Case) -> None:
    """Outputs under no_grad and inference_mode are those of a call that records gradients."""
    module, inputs = case.build(), case.inputs()
    for name, arguments in forward_arguments(case, case.inputs()).items():
        recorded = case.run(module, inputs.with_gradients(), **arguments)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode(), told_apart(name):
                assert_same(case.run(module, inputs, **arguments), recorded, f"output under {mode.__name__}")
    again = case.run(module, inputs.with_gradients())
    weighted_sum(again).backward()  # what inference mode left behind would fail here


def _tensors(arguments: dict[str, Any]) -> dict[str, Tensor]:
    found = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    for name, value in arguments.items():
        if isinstance(value, Mask):
            found |= {f"{name} tensor {index}": tensor for index, tensor in enumerate(value.flatten()[1])}
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _decoded(module: Any, x: Tensor) -> Tensor:
    first, state = module.step(x[:, :3], module.init_state(x.shape[0]))
    second, _ = module.step(x[:, 3:], state)
    return torch.cat([first, second], dim=1)


@contextmanager
def _poisoned() -> Iterator[None]:
    """New memory is full of NaN (largest integers), as torch does it for deterministic algorithms."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = filled
