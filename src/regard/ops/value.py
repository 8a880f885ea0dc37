"""Frozen values (masks, biases, normalizers) that print, compare, hash and travel as their constructor.

A custom operator takes tensors and strings only. `flatten` writes a value as its constructor call with the tensors
numbered, ``And(Causal(), Padding($0))`` and ``[lengths]``; `unflatten` reads it back on the other side.
"""

from __future__ import annotations

import ast
from dataclasses import fields
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from regard.ops.checks import one_of

_classes: dict[str, type[Value]] = {}


class Value:
    """Base of frozen dataclasses whose fields are plain constants, tensors, or other values."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A class defined anew (a notebook cell run twice) replaces its former self.
        _classes[cls.__name__] = cls

    def _items(self) -> list[tuple[str, Any]]:
        return [(item.name, getattr(self, item.name)) for item in fields(self)]  # pyright: ignore[reportArgumentType]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._items())})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other) or not isinstance(other, Value):
            return False
        return all(_same(a, b) for (_, a), (_, b) in zip(self._items(), other._items(), strict=True))

    def __hash__(self) -> int:
        # Tensors enter by shape and type only: equal values must hash equal, and reading them would synchronise.
        return hash((type(self).__name__, *(_hashable(value) for _, value in self._items())))

    def flatten(self) -> tuple[str, list[Tensor]]:
        """The constructor call as text with tensors as ``$i``, and those tensors."""
        tensors: list[Tensor] = []
        return self._write(tensors), tensors

    def _write(self, tensors: list[Tensor]) -> str:
        written = []
        for _, value in self._items():
            if isinstance(value, Value):
                written.append(value._write(tensors))
            elif isinstance(value, Tensor):
                written.append(f"${len(tensors)}")
                tensors.append(value)
            else:
                written.append(repr(value))
        return f"{type(self).__name__}({', '.join(written)})"

    @classmethod
    def unflatten(cls, text: str, tensors: list[Tensor]) -> Self:
        """The value that `flatten` wrote."""
        return _build(_parse(text), tensors)  # pyright: ignore[reportReturnType] the text names the class

    def to(self, device: torch.device) -> Self:
        """The same value with its tensors on `device` (itself where they already are)."""
        text, tensors = self.flatten()
        if all(tensor.device == device for tensor in tensors):
            return self
        return type(self).unflatten(text, [tensor.to(device) for tensor in tensors])


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and a == b


def _hashable(value: object) -> object:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


@cache
def _parse(text: str) -> ast.expr:
    return ast.parse(text.replace("$", "_tensor_"), mode="eval").body


def _build(node: ast.expr, tensors: list[Tensor]) -> Any:
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        one_of("regard", "value", name, _classes)
        return _classes[name](*(_build(argument, tensors) for argument in node.args))
    if isinstance(node, ast.Name):
        return tensors[int(node.id.removeprefix("_tensor_"))]
    return ast.literal_eval(node)
