"""State dict, copies, pickles, devices and types: the whole function travels."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import safetensors.torch
import torch
from torch import Tensor, nn

from regard.testing.cases import Case
from regard.testing.compare import assert_same
from regard.testing.proof import proves


@proves()
def state_dict_restores_the_function(case: Case) -> None:
    """A state dict saved with safetensors makes another instance, drawn from another seed, the same function."""
    inputs = case.inputs()
    original, other = case.build(seed=1), case.build(seed=2)
    expected = case.run(original, inputs)
    saved = safetensors.torch.save({name: value.clone() for name, value in original.state_dict().items()})
    restored = safetensors.torch.load(saved)
    other.load_state_dict(restored)
    assert_same(case.run(other, inputs), expected, "output after loading the state dict")
    assert_same(case.run(original, inputs), expected, "output of the instance that was saved")


@proves()
def tensors_are_parameters_or_buffers(case: Case) -> None:
    """No tensor is kept as a plain attribute, where neither state dict nor `.to` reaches it."""
    module = case.build()
    case.run(module, case.inputs())
    found = [f"{path}.{name}".lstrip(".") for path, part in module.named_modules() for name in _plain_tensors(part)]
    assert not found, f"tensors kept as plain attributes: {', '.join(found)}; register them as parameters or buffers"


@proves()
def constructor_takes_device_and_dtype(case: Case) -> None:
    """Every parameter and buffer is made on the `device` asked for, floating ones in the `dtype` asked for."""
    for dtype in case.contract.dtypes:
        module = case.build({"device": "meta", "dtype": dtype})
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            assert value.device.type == "meta", f"{name} is on {value.device} with device='meta'"
            fits = value.dtype == dtype or not isinstance(value, nn.Parameter)
            assert fits, f"{name} is {value.dtype} with dtype={dtype}"


@proves()
def copies_are_equal_and_independent(case: Case) -> None:
    """Deep copies and pickles give the same output, and changing one leaves the other."""
    module, inputs = case.build(), case.inputs()
    expected = case.run(module, inputs)
    for name, copied in {
        "deep copy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "deep copy of a used module": copy.deepcopy(_used(case, module)),
    }.items():
        assert_same(case.run(copied, inputs), expected, f"output of a {name}")
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert_same(case.run(module, inputs), expected, f"output after changing a {name}")


def _used(case: Case, module: nn.Module) -> nn.Module:
    case.run(module, case.inputs().with_gradients()).sum().backward()
    return module


def _plain_tensors(module: nn.Module) -> Iterator[str]:
    registries = ("_parameters", "_buffers", "_modules")
    for name, value in vars(module).items():
        if name not in registries and _holds_tensor(value):
            yield name


def _holds_tensor(value: object) -> bool:
    if isinstance(value, dict):
        return any(_holds_tensor(item) for item in value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor)
