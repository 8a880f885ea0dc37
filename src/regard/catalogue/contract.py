"""What a mechanism promises. `regard.testing.check` proves every line of it; what is not declared here raises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

import torch

from regard.ops.checks import one_of, require

Input = Literal["tokens", "grid", "feature_map"]
Pattern = Literal["noncausal self", "causal self", "noncausal cross", "causal cross"]
State = Literal["constant", "linear"]
Permutation = Literal["equivariant", "invariant"]

_FORMULA_FUNCTIONS = {"log2": math.log2, "sqrt": math.sqrt, "min": min, "max": max, "ceil": math.ceil}


@dataclass(frozen=True)
class OptionSet:
    """Constructor arguments to prove, and the contract fields that differ under them."""

    arguments: Mapping[str, object] = field(default_factory=dict)
    changes: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.arguments.items()) or "default"


@dataclass(frozen=True)
class Contract:
    """The declared abilities of one mechanism.

    Fields:
        input: ``tokens`` (B, N, C), ``grid`` (B, *grid, C) or ``feature_map`` (B, C, H, W).
        patterns: the attention patterns it has; empty for gates over feature maps. A causal pattern is built with
            ``causal=True`` where the constructor has that argument; on a grid it goes by row-major order.
        time, memory: floating-point operations of a forward, and elements allocated beyond input, output and
            parameters, up to a constant factor: formulas in ``n`` (queries), ``m`` (keys), ``d`` (width), ``h`` (heads)
            and the integer constructor arguments by name.
        padding: `forward` takes a ``Padding`` mask; what stands beyond a length changes nothing before it, and a padded
            sequence gives what it gives alone.
        packed: `forward` takes ``Segments``; several sequences in one row give what each gives alone. (In
            cross-attention that is causal or has positions, queries stand at the end of the whole context, so that
            padding and packing promise isolation only.)
        any_mask: `forward` takes every mask expression (which includes the two above).
        positions: `forward` takes ``positions``.
        step: has ``init_state(batch)`` and ``step(x, state) -> (y, state)`` for further tokens (causal self).
        state: how the bytes of that state grow with the tokens seen; required with `step`.
        attention_map: has ``attention_map(x, ...) -> (weights, value)`` with weights (B, H, N, M), value (B, H, M, Dv)
            and ``combine(weights @ value)`` equal to the output.
        exact: softmax attention over the allowed keys, computed exactly; the weights are a distribution per query.
        permutation: what permuting the tokens does to the output without a mask, if anything can be said.
        grid_dims: for ``grid``, the numbers of axes it takes, e.g. ``(1, 2, 3)``; the constructor may depend on it by
            an `OptionSet` whose changes narrow it.
        dtypes: floating-point types it runs in.
        frozen: names of parameters that receive no gradient by design.
        steep: the function itself has slopes so steep that rounding parameters and inputs moves its gradients by more
            than roundoff; those of float32 are promised to ten times that only.
        minimum: the smallest sizes it works at, by the names ``dim``, ``heads``, ``length`` (per axis for grids).
        options: the option sets proved beside the default one.
    """

    input: Input
    patterns: tuple[Pattern, ...] = ()
    time: str = "n*m*d"
    memory: str = "n*d"
    padding: bool = False
    packed: bool = False
    any_mask: bool = False
    positions: bool = False
    step: bool = False
    state: State | None = None
    attention_map: bool = False
    exact: bool = False
    permutation: Permutation | None = None
    grid_dims: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float64)
    frozen: tuple[str, ...] = ()
    steep: bool = False
    minimum: Mapping[str, int] = field(default_factory=lambda: {"length": 1})
    options: tuple[OptionSet, ...] = ()

    def __post_init__(self) -> None:
        one_of("Contract", "input", self.input, get_args(Input))
        for pattern in self.patterns:
            one_of("Contract", "patterns", pattern, get_args(Pattern))
        require(
            self.step == (self.state is not None),
            "Contract",
            f"step={self.step} with state={self.state!r}",
            "declare how the state grows exactly when there is a step",
        )
        require(
            not self.step or "causal self" in self.patterns,
            "Contract",
            f"step without 'causal self' among patterns {self.patterns}",
            "only causal self-attention can be decoded step by step",
        )
        require(
            (self.input == "grid") == bool(self.grid_dims),
            "Contract",
            f"input {self.input!r} with grid_dims {self.grid_dims}",
            "grid mechanisms, and only they, say how many axes they take",
        )

        for name in ("padding", "packed", "any_mask", "positions", "step"):
            require(
                self.input == "tokens" or not getattr(self, name),
                "Contract",
                f"{name} declared for input {self.input!r}",
                "it means something for tokens only",
            )

    def under(self, option_set: OptionSet) -> Contract:
        """The contract that holds when the mechanism is built with `option_set`."""
        known = {item.name for item in fields(self)}
        for name in option_set.changes:
            one_of("OptionSet", "changes", name, known)
        return replace(self, options=(), **option_set.changes)  # pyright: ignore[reportArgumentType] names checked above

    def cost(self, which: Literal["time", "memory"], **sizes: int) -> float:
        """Evaluate a formula; `sizes` are n, m, d, h and the constructor's integer arguments."""
        formula = {"time": self.time, "memory": self.memory}[which]
        names = {**_FORMULA_FUNCTIONS, **sizes}
        return float(eval(formula, {"__builtins__": {}}, names))
