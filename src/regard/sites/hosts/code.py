"""What a module's code mentions and what its attributes say, read without running anything."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from regard.sites.hosts.host import Description
from regard.sites.site import Kind

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads")
HEAD_DIM = ("head_dim", "attention_head_size", "dim_head", "head_size", "d_head", "d_kv")
WIDTH = ("inner_dim", "all_head_size", "embed_dim", "hidden_size", "d_model", "dim", "n_embd")
CROSS = ("cross", "encdec", "encoder_attn", "multihead_attn", "attn2")
"""Parts of the names of modules that attend to another sequence."""


@cache
def mentions(function: Any, owner: type | None = None) -> frozenset[object]:
    """The names that a function mentions and the functions they are, followed into its class and its package.

    The operator ``@`` counts as a name.
    """
    found: set[object] = set()
    seen: set[CodeType] = set()

    def visit(function: Any, depth: int) -> None:
        function = inspect.unwrap(function)
        if not isinstance(function, FunctionType) or function.__code__ in seen:
            return
        seen.add(function.__code__)
        package = function.__module__.partition(".")[0]
        names = set(_names(function.__code__))
        found.update(names)
        for name in names:
            for method in _methods(owner, name)[: None if "super" in names else 1]:
                visit(method, depth)
            target = function.__globals__.get(name)
            if isinstance(target, FunctionType):
                found.add(target)
                if depth and target.__module__.partition(".")[0] == package:
                    visit(target, depth - 1)

    visit(function, 4)
    return frozenset(found)


def describe(name: str, module: nn.Module, kind: Kind | None = None) -> Description:
    """A module by the attributes that attention modules commonly have, of itself or of its config."""
    heads = first(module, *HEADS)
    key_heads = first(module, *KEY_HEADS) or heads
    head_dim = first(module, *HEAD_DIM)
    if not head_dim and heads:
        head_dim = first(module, *WIDTH) // heads
    causal = any(getattr(module, each, False) is True for each in ("is_causal", "causal"))
    return Description(kind or kind_of(name, module), heads, key_heads, head_dim, causal)


def kind_of(name: str, module: nn.Module) -> Kind:
    """Cross-attention by the module's own word or by its name."""
    crosses = getattr(module, "is_cross_attention", None)
    if crosses is None:
        last = f"{'.'.join(name.split('.')[-2:])} {type(module).__name__}".lower()
        crosses = any(part in last for part in CROSS)
    return "cross" if crosses else "self"


def first(module: nn.Module, *names: str) -> int:
    """The first of these attributes that is a positive number; 0 if none is."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def _methods(owner: type | None, name: str) -> list[FunctionType]:
    """What a class and those it derives from define by a name, but for torch's own modules."""
    defined = (
        vars(each).get(name) for each in getattr(owner, "__mro__", ()) if not each.__module__.startswith("torch.")
    )
    return [each for each in defined if isinstance(each, FunctionType)]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    if any(each.opname == "BINARY_OP" and each.argrepr == "@" for each in dis.get_instructions(code)):
        yield "@"
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)
