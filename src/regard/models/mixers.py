"""A mechanism as a layer of a model: built by key with what every layer gives it, called in its own layout."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalogue import Card, Pattern, card


def build_mixers(
    key: str,
    dim: int,
    *,
    heads: int,
    layers: int,
    pattern: Pattern | None,
    options: Mapping[str, object] | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[Any]:
    """The mechanism `key`, once for each layer of a model.

    Where its constructor has them it is given `heads`, its ``layer`` of `layers`, rotary positions if it is causal and
    would have none, and ``residual=False``, because the block around it has the residual. `options` go before all of
    these.
    """
    entry = card(key)
    given: dict[str, object] = {"heads": heads, "layers": layers, "residual": False}
    if pattern is not None and pattern.startswith("causal") and takes_rotary(entry):
        given["position"] = "rotary"

    def build(layer: int) -> Any:
        known = {name: value for name, value in {**given, "layer": layer}.items() if name in entry.arguments}
        return entry.build(dim, pattern=pattern, **{**known, **(options or {})}, device=device, dtype=dtype)

    return [build(layer) for layer in range(layers)]


def takes_rotary(entry: Card) -> bool:
    """Whether it has no positions unless asked, and an option set that is proved has ``position="rotary"``."""
    position = signature(entry.cls).parameters.get("position")
    if position is None or position.default is not None:
        return False
    return any(option_set.arguments.get("position") == "rotary" for option_set in entry.option_sets())


def mix_grid(mixer: nn.Module, x: Tensor) -> Tensor:
    """`mixer` over a grid (batch, *grid, dim), whichever layout it takes."""
    taken = mixer.card.contract.input  # pyright: ignore[reportAttributeAccessIssue] it is registered
    if taken == "tokens":
        return mixer(x.flatten(1, -2)).view_as(x)
    if taken == "feature_map":
        return mixer(x.movedim(-1, 1)).movedim(1, -1)
    return mixer(x)
