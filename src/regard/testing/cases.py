"""The cases of a mechanism: option set × pattern × number of grid axes, with modules and inputs for each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regard.catalogue import Card, Contract, OptionSet, Pattern, card
from regard.ops.checks import require

DIM, HEADS, BATCH = 32, 4, 3
LENGTHS = {1: (13,), 2: (5, 6), 3: (3, 4, 5)}
CONTEXT_LENGTH = 17
# Odd, and beyond the usual block and chunk sizes.
LONG = 151
_NOISE = 0.1


class Sizes(NamedTuple):
    """Batch, tokens that look and tokens looked at."""

    batch: int
    queries: int
    keys: int


class Inputs(NamedTuple):
    """What `forward` takes by position."""

    x: Tensor
    context: Tensor | None = None

    @property
    def source(self) -> Tensor:
        """What is looked at: the context, or x itself."""
        return self.x if self.context is None else self.context

    def with_source(self, source: Tensor) -> Inputs:
        """The same with something else to look at."""
        return Inputs(source) if self.context is None else Inputs(self.x, source)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors there are."""
        return (self.x,) if self.context is None else (self.x, self.context)

    def with_gradients(self) -> Inputs:
        """Fresh leaves of the same values that collect gradients."""
        return Inputs(*(tensor.detach().clone().requires_grad_() for tensor in self.tensors()))

    def select(self, samples: slice) -> Inputs:
        """Some samples of the batch."""
        return Inputs(*(tensor[samples] for tensor in self.tensors()))

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values in another type."""
        return Inputs(*(tensor.to(dtype) for tensor in self.tensors()))


@dataclass(frozen=True)
class Case:
    """One way of building a mechanism: an option set, a pattern (None for gates) and, for grids, a number of axes."""

    card: Card
    option_set: OptionSet
    pattern: Pattern | None = None
    axes: int | None = None

    def __str__(self) -> str:
        options = "" if not self.option_set.arguments else str(self.option_set)
        grid = f"{self.axes}D" if self.axes else ""
        return " ".join(part for part in (f"{self.card.key}({options})", self.pattern, grid) if part)

    @cached_property
    def contract(self) -> Contract:
        """What is promised of this case."""
        return self.card.contract.under(self.option_set)

    @property
    def causal(self) -> bool:
        return self.pattern is not None and self.pattern.startswith("causal")

    @property
    def cross(self) -> bool:
        return self.pattern is not None and self.pattern.endswith("cross")

    @property
    def steps(self) -> bool:
        """Whether it promises to decode step by step."""
        return self.contract.step and self.pattern == "causal self"

    @property
    def aligned(self) -> bool:
        """Whether outputs depend on the length of the context, padding included: the queries stand at its end."""
        return self.cross and (self.causal or self.contract.permutation is None)

    @property
    def takes_padding(self) -> bool:
        return self.contract.padding or self.contract.any_mask

    @property
    def takes_packed(self) -> bool:
        return self.contract.packed or self.contract.any_mask

    @property
    def dtype(self) -> torch.dtype:
        """The most accurate type it runs in: equalities are proved in it."""
        return max(self.contract.dtypes, key=lambda dtype: -torch.finfo(dtype).eps)

    @cached_property
    def arguments(self) -> dict[str, object]:
        """The constructor arguments of this case, sizes included."""
        minimum = self.contract.minimum
        sizes: dict[str, object] = {"dim": max(DIM, minimum.get("dim", 1))}
        if "heads" in self.card.arguments:
            sizes["heads"] = max(HEADS, minimum.get("heads", 1))
        return {**sizes, **self.option_set.arguments}

    @property
    def dim(self) -> int:
        return _integer(self.arguments["dim"])

    def dropouts(self, probability: float) -> dict[str, object]:
        """The dropout arguments the constructor has, all set to `probability`."""
        return {name: probability for name in self.card.arguments if name == "dropout" or name.endswith("_dropout")}

    def build(self, changes: Mapping[str, object] | None = None, *, seed: int = 0, training: bool = False) -> nn.Module:
        """The mechanism, with `changes` to its arguments, in the case's dtype and in eval mode unless said otherwise.

        Its parameters are moved a little: what starts at zero hides what stands behind it.
        """
        arguments = {"dtype": self.dtype, **self.arguments, **(changes or {})}
        with torch.random.fork_rng(devices=[]):
            seed_cpu(seed)
            module = self.card.build(pattern=self.pattern, **arguments)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(_NOISE * torch.randn_like(parameter))
        return module.train(training)

    def modes(self) -> dict[str, nn.Module]:
        """The mechanism in eval mode, and in training with dropout where it has any: often another path of its code."""
        return {"eval": self.build(), "training": self.build(self.dropouts(0.3), training=True)}

    def lengths(self, length: int | None = None) -> tuple[int, ...]:
        """Sizes of the token axes: about `length` tokens in all, or a few by default; never below the minimum."""
        smallest = self.contract.minimum.get("length", 1)
        axes = self.axes or {"tokens": 1, "feature_map": 2}[self.contract.input]
        if length is None:
            return tuple(max(size, smallest) for size in LENGTHS.get(axes, (3,) * axes))
        if axes == 1:
            return (max(length, smallest),)
        # Powers of two multiply back to a power of two.
        sizes = [max(1 << (length.bit_length() - 1 + axis) // axes, smallest) for axis in range(axes)]
        return tuple(sizes)

    def inputs(
        self,
        length: int | tuple[int, ...] | None = None,
        *,
        batch: int = BATCH,
        context_length: int | None = None,
        dim: int | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 1,
    ) -> Inputs:
        """Random inputs of the kind the case takes."""
        sizes = length if isinstance(length, tuple) else self.lengths(length)
        width = self.dim if dim is None else dim
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype or self.dtype)

        x = draw(batch, width, *sizes) if self.contract.input == "feature_map" else draw(batch, *sizes, width)
        if not self.cross:
            return Inputs(x)
        keys = context_length or (CONTEXT_LENGTH if length is None else prod(sizes) + 4)
        return Inputs(x, draw(batch, keys, _integer(self.arguments.get("context_dim") or width)))

    def run(self, module: nn.Module, inputs: Inputs, **arguments: object) -> Tensor:
        """The output."""
        return module(*inputs.tensors(), **arguments)

    def sizes(self, inputs: Inputs) -> Sizes:
        """The numbers of samples, queries and keys, whatever the kind of input."""
        batch, queries = self.tokens(inputs.x).shape[:2]
        return Sizes(batch, queries, queries if inputs.context is None else inputs.context.shape[1])

    def tokens(self, x: Tensor) -> Tensor:
        """Any input or output as (batch, tokens, width), positions in row-major order."""
        return x.flatten(2).mT if self.contract.input == "feature_map" else x.flatten(1, -2)

    def untokens(self, tokens: Tensor, like: Tensor) -> Tensor:
        """What `tokens` undid, in the shape of `like`."""
        return (tokens.mT if self.contract.input == "feature_map" else tokens).reshape(like.shape)

    def integers(self) -> dict[str, int]:
        """The integer constructor arguments by name, as formulas use them, and ``d`` and ``h``."""
        defaults = {name: parameter.default for name, parameter in inspect.signature(self.card.cls).parameters.items()}
        known = {**defaults, **self.arguments}
        found = {name: value for name, value in known.items() if type(value) is int}
        return {**found, "d": self.dim, "h": found.get("heads", 1)}


def seed_cpu(seed: int) -> None:
    """`torch.manual_seed` for the CPU alone, where all checks run: for absent devices it keeps a stack trace each."""
    torch.default_generator.manual_seed(seed)


def cases(mechanism: str | Card | type[nn.Module]) -> list[Case]:
    """Every case of a mechanism, given by key, card or registered class."""
    return list(_cases(card_of(mechanism)))


def card_of(mechanism: str | Card | type[nn.Module]) -> Card:
    """The card of a mechanism; raises ValueError for an unknown key and TypeError for an unregistered class."""
    if isinstance(mechanism, str):
        return card(mechanism)
    if isinstance(mechanism, Card):
        return mechanism
    found = vars(mechanism).get("card")
    if not isinstance(found, Card):
        raise TypeError(f"regard.testing: {mechanism!r} has no card; enter it with @regard.catalogue.register(...)")
    return found


def _cases(entry: Card) -> Iterator[Case]:
    for option_set in entry.option_sets():
        contract = entry.contract.under(option_set)
        for pattern in contract.patterns or (None,):
            for axes in contract.grid_dims or (None,):
                yield Case(entry, option_set, pattern, axes)


def _integer(value: object) -> int:
    require(isinstance(value, int), "OptionSet", f"size {value!r}", "give an integer")
    return value  # pyright: ignore[reportReturnType] just checked
