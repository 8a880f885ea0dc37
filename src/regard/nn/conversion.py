"""A mechanism in the place of a trained layer of softmax attention, with its settings and parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from regard.nn.attention import Attention
from regard.ops.checks import require

Made = TypeVar("Made", bound=nn.Module)


def converted(
    kind: type[Made],
    layer: Attention,
    /,
    *,
    causal: bool = False,
    state: Mapping[str, Tensor] | None = None,
    **own: object,
) -> Made:
    """A layer of another kind with the settings and parameters of a trained one, and `own` arguments.

    A setting that `kind` has no argument for must be what `kind` has: `causal` as given here, heads of width
    dim / heads, as many key heads, no position, no dropout, no context of another width. `state` takes the place of
    the layer's parameters where they are named or shaped otherwise; what it lacks stays as `kind` begins. Raises
    ValueError.
    """
    weight, takes = layer.query.weight, inspect.signature(kind).parameters
    plain = {
        "heads": layer.heads,
        "kv_heads": layer.heads,
        "head_dim": layer.dim // layer.heads,
        "causal": causal,
        "position": None,
        "bias": layer.query.bias is not None,
        "dropout": 0.0,
        "context_dim": layer.dim,
    }
    settings = {name: getattr(layer, name) for name in plain if name != "bias"} | {"bias": plain["bias"]}
    given: dict[str, object] = {}
    for name, value in settings.items():
        if name in own:
            continue
        if name in takes:
            given[name] = value
            continue
        require(
            value == plain[name],
            kind.__name__,
            lambda name=name, value=value: f"a layer with {name}={value!r}",
            lambda name=name: f"convert one with {name}={plain[name]!r}",
        )
    made = kind(layer.dim, **given, **own, device=weight.device, dtype=weight.dtype)  # pyright: ignore[reportCallIssue] checked above
    made.load_state_dict({**made.state_dict(), **(layer.state_dict() if state is None else state)})
    return made.train(layer.training)
