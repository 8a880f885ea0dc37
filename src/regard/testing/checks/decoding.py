"""Step by step equals all at once; states are values and grow as declared."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.testing.cases import LONG, Case
from regard.testing.compare import assert_same
from regard.testing.proof import proves, told_apart


def _steps(case: Case) -> bool:
    return case.steps


@proves(_steps)
def step_equals_forward(case: Case) -> None:
    """Token by token gives what the whole sequence gives, with and without gradients recorded."""
    module: Any = case.build()
    for length in (None, 40):
        x = case.inputs(length).x
        for recording in (True, False):
            with torch.set_grad_enabled(recording), told_apart(f"{x.shape[1]} tokens, grad mode {recording}"):
                out, _ = _feed(module, x, module.init_state(x.shape[0]), [1] * x.shape[1])
                assert_same(out, module(x), "outputs of the steps")


@proves(_steps)
def segments_equal_forward(case: Case) -> None:
    """Pieces of any lengths give what the whole sequence gives; the first may be a long prompt."""
    module: Any = case.build()
    for lengths in ([40], [1, 39], [23, 1, 1, 1, 14], [2, 3, 5, 7, 11, 12], [16, 16, 8], [64, 1, LONG - 65]):
        x = case.inputs(sum(lengths)).x
        for recording in (True, False):
            with torch.set_grad_enabled(recording), told_apart(f"segments {lengths}, grad mode {recording}"):
                out, _ = _feed(module, x, module.init_state(x.shape[0]), lengths)
                assert_same(out, module(x), "outputs of the segments")


@proves(_steps)
def states_are_values(case: Case) -> None:
    """An old state may be used again: a step changes neither its state nor the module."""
    module: Any = case.build()
    x, other = case.inputs(12).x, case.inputs(12, seed=2).x
    expected = module(x)
    for recording in (True, False):
        with torch.set_grad_enabled(recording), told_apart(f"grad mode {recording}"):
            _, state = _feed(module, x[:, :5], module.init_state(x.shape[0]), [4, 1])
            first, _ = _feed(module, x[:, 5:], state, [1] * 7)
            _feed(module, other[:, 5:], state, [1, 6])
            again, later = _feed(module, x[:, 5:], state, [3, 4])
            assert_same(first, expected[:, 5:], "outputs of the first branch")
            assert_same(again, expected[:, 5:], "outputs of the third branch from one state")
            if not recording:
                copied, _ = _feed(module, other[:, :2], copy.deepcopy(later), [2])
                assert_same(copied, _feed(module, other[:, :2], later, [2])[0], "outputs from a deep copy of a state")
    assert_same(module(x), expected, "forward after decoding")


@proves(_steps)
def samples_step_independently(case: Case) -> None:
    """Decoding a batch gives for each sample what decoding it alone gives."""
    module: Any = case.build()
    x = case.inputs(9).x
    out, _ = _feed(module, x, module.init_state(x.shape[0]), [4, 1, 1, 3])
    for sample in range(x.shape[0]):
        alone, _ = _feed(module, x[sample : sample + 1], module.init_state(1), [4, 1, 1, 3])
        assert_same(out[sample : sample + 1], alone, f"sample {sample}")


@proves(_steps)
def state_grows_as_declared(case: Case) -> None:
    """The bytes a state keeps alive do not grow (constant), or grow in proportion to the tokens (linear)."""
    module: Any = case.build()
    if case.contract.state == "constant":
        full = _window_bound(case)
        for name, segment in {"in pieces of 128": 128, "in one piece": None}.items():
            some, many = (_bytes_after(case, module, tokens, segment or tokens) for tokens in (full, 2 * full))
            what = f"{some} bytes after {full} tokens {name} and {many} after {2 * full}"
            assert many <= some, f"declared constant, but {what}"
        return
    few, many = (_bytes_after(case, module, tokens, 128) for tokens in (128, 1024))
    # Eight times the tokens, and a capacity that doubles when full may be up to twice what is used.
    assert many <= 16 * few, f"declared linear, but {few} bytes after 128 tokens and {many} after 1024"
    assert many > few, f"declared linear, but {few} bytes after 128 tokens and {many} after 1024: declare it constant"


def _window_bound(case: Case) -> int:
    """Tokens after which a window given by integer arguments is full: a multiple of 128, from 512 to 2048."""
    return min(2048, max(512, -(-sum(case.integers().values()) // 128) * 128))


def _bytes_after(case: Case, module: Any, tokens: int, segment: int) -> int:
    x = case.inputs(segment, batch=1).x
    state = module.init_state(1)
    with torch.no_grad():
        for _ in range(tokens // segment):
            _, state = module.step(x, state)
    return state_bytes(state)


def state_bytes(state: object) -> int:
    """Bytes of the storages a state keeps alive: a view keeps all of what it looks into."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(state)}
    return sum(storages.values())


def _feed(module: nn.Module, x: Tensor, state: object, lengths: Iterable[int]) -> tuple[Tensor, object]:
    outputs = []
    for piece in x.split(list(lengths), dim=1):
        out, state = module.step(piece, state)  # pyright: ignore[reportCallIssue] declared by the contract
        assert out.shape == piece.shape, f"step gives shape {tuple(out.shape)} for x of shape {tuple(piece.shape)}"
        outputs.append(out)
    return torch.cat(outputs, dim=1), state


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors reachable in a state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (tensor for item in value.values() for tensor in _tensors(item))
    elif isinstance(value, list | tuple):
        yield from (tensor for item in value for tensor in _tensors(item))
    elif is_dataclass(value):
        yield from (tensor for field in fields(value) for tensor in _tensors(getattr(value, field.name)))
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
