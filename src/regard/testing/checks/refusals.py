"""Whatever is not declared, or does not fit, raises an error that names the argument and the value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from regard.catalogue import Pattern
from regard.ops.masks import Causal, Dense, Mask, Padding, Segments, Window
from regard.testing.cases import Case, Inputs
from regard.testing.proof import proves


@proves()
def wrong_rank_is_refused(case: Case) -> None:
    """x with an axis too few or too many raises (axes of a grid that are declared excepted)."""
    module, inputs = case.build(), case.inputs()
    for x in (inputs.x[0], inputs.x[:, None]):
        if case.axes is not None and x.ndim - 2 in case.contract.grid_dims:
            continue
        _refused(f"x of shape {_shape(x)}", lambda x=x: case.run(module, inputs._replace(x=x)), "x", _shape(x))


@proves()
def wrong_width_is_refused(case: Case) -> None:
    """x of another width than dim raises."""
    module, inputs = case.build(), case.inputs()
    for width in (case.dim + 1, case.dim // 2, 1):
        x = case.inputs(dim=width).x
        _refused(f"x of width {width}", lambda x=x: case.run(module, inputs._replace(x=x)), "x", str(width))


@proves()
def integers_are_refused(case: Case) -> None:
    """x of an integer type raises."""
    module, inputs = case.build(), case.inputs()
    x = inputs.x.long()
    _refused("x of integers", lambda: case.run(module, inputs._replace(x=x)), "x", "int64")


@proves()
def bad_sizes_are_refused(case: Case) -> None:
    """Constructor sizes that are not positive, heads that do not divide dim and dropout outside [0, 1) raise."""
    bad: list[tuple[str, object]] = [("dim", 0), ("dim", -case.dim)]
    if "heads" in case.card.arguments:
        bad += [("heads", 0), ("heads", -1)]
        if case.arguments.get("head_dim") is None:
            bad.append(("heads", case.dim - 1))
    bad += [(name, value) for name in case.card.arguments if name.endswith("dropout") for value in (-0.1, 1.0, 1.5)]
    for name, value in bad:
        _refused(f"{name}={value}", lambda name=name, value=value: case.build({name: value}), name, str(value))


@proves()
def unknown_arguments_are_refused(case: Case) -> None:
    """An argument that constructor or forward does not have raises and is named."""
    module, inputs = case.build(), case.inputs()
    _refused("a constructor argument colour", lambda: case.card.cls(**case.arguments, colour="blue"), "colour")
    _refused("a constructor argument colour", lambda: case.build({"colour": "blue"}), "colour")
    _refused("a forward argument colour", lambda: case.run(module, inputs, colour="blue"), "colour")


@proves(lambda case: bool(case.contract.patterns))
def undeclared_patterns_are_refused(case: Case) -> None:
    """Asking for a pattern that is not declared raises, by `Card.build` and by the class itself."""
    for pattern in set(get_args(Pattern)) - set(case.contract.patterns):
        if pattern not in case.card.contract.patterns:
            _refused(f"pattern {pattern!r}", lambda p=pattern: case.card.build(case.dim, pattern=p), "pattern", pattern)
        causal = pattern.startswith("causal")
        if "causal" in case.card.arguments:
            _refused(f"{pattern} by causal={causal}", lambda p=pattern, c=causal: _attempt(case, p, causal=c))
        elif causal == case.causal:
            _refused(pattern, lambda p=pattern: _attempt(case, p))


@proves(lambda case: not any(pattern.endswith("cross") for pattern in case.contract.patterns))
def context_is_refused(case: Case) -> None:
    """A context given to a mechanism without a cross pattern raises."""
    module, inputs = case.build(), case.inputs()
    context = case.inputs(seed=2).x
    _refused("context", lambda: module(inputs.x, context), "context|arguments?")
    _refused("context=", lambda: module(inputs.x, context=context), "context")


@proves(lambda case: case.cross)
def misfit_context_is_refused(case: Case) -> None:
    """A context of another rank, width, batch or type raises."""
    module, inputs = case.build(), case.inputs()
    context = inputs.context
    assert context is not None
    for bad, value in (
        (context[0], _shape(context[0])),
        (context[:, None], _shape(context[:, None])),
        (torch.cat([context, context[..., :1]], -1), str(context.shape[-1] + 1)),
        (context[:2], "2"),
        (context.long(), "int64"),
    ):
        what = f"context of shape {_shape(bad)} and dtype {bad.dtype}"
        _refused(what, lambda bad=bad: module(inputs.x, bad), "context", value)


@proves(lambda case: all(pattern.endswith("cross") for pattern in case.contract.patterns) and case.cross)
def missing_context_is_refused(case: Case) -> None:
    """A mechanism that is cross-attention only raises without a context."""
    module, inputs = case.build(), case.inputs()
    _refused("no context", lambda: module(inputs.x), "context")


@proves()
def undeclared_masks_are_refused(case: Case) -> None:
    """A kind of mask that is not declared raises."""
    module, inputs = case.build(), case.inputs()
    for mask in _undeclared(case, inputs):
        _refused(f"mask={mask!r:.40}", lambda mask=mask: case.run(module, inputs, mask=mask), "mask")


@proves()
def tensors_as_masks_are_refused(case: Case) -> None:
    """A boolean or additive tensor in place of a mask raises: its convention would be a guess."""
    module, inputs = case.build(), case.inputs()
    batch, queries, keys = case.sizes(inputs)
    for mask in (torch.ones(batch, keys, dtype=torch.bool), torch.zeros(queries, keys)):
        _refused("a tensor as mask", lambda mask=mask: case.run(module, inputs, mask=mask), "mask")


@proves(lambda case: case.takes_padding or case.takes_packed)
def misfit_masks_are_refused(case: Case) -> None:
    """A declared mask made for another batch or length raises."""
    module, inputs = case.build(), case.inputs()
    batch, queries, keys = case.sizes(inputs)
    bad: list[tuple[Mask, str]] = []
    if case.takes_padding:
        bad.append((Padding(torch.full((batch + 1,), keys)), str(batch + 1)))
    if case.takes_packed:
        own = (torch.zeros(queries, dtype=torch.long),) if case.cross else ()
        bad.append((Segments(torch.zeros(keys + 1, dtype=torch.long), *own), str(keys + 1)))
        bad.append((Segments(torch.zeros(batch + 1, keys, dtype=torch.long), *own), str(batch + 1)))
    if case.contract.any_mask:
        bad.append((Dense(torch.ones(queries + 1, keys, dtype=torch.bool)), str(queries + 1)))
        bad.append((Dense(torch.ones(batch + 1, 1, queries, keys, dtype=torch.bool)), str(batch + 1)))
        bad.append((Causal() & Padding(torch.full((batch + 1,), keys)), str(batch + 1)))
    for mask, value in bad:
        what = f"{type(mask).__name__} made for another size"
        _refused(what, lambda mask=mask: case.run(module, inputs, mask=mask), "", value)


@proves(lambda case: not case.contract.positions)
def undeclared_positions_are_refused(case: Case) -> None:
    """Positions given where they are not declared raise."""
    module, inputs = case.build(), case.inputs()
    positions = torch.arange(case.sizes(inputs).queries)
    _refused("positions", lambda: case.run(module, inputs, positions=positions), "positions")


@proves(lambda case: case.contract.positions and case.contract.input == "tokens")
def misfit_positions_are_refused(case: Case) -> None:
    """Positions of another length or batch raise."""
    module, inputs = case.build(), case.inputs()
    batch, queries, _ = case.sizes(inputs)
    for shape in ((queries + 1,), (batch + 1, queries), (batch, queries - 1), (batch, queries, 1)):
        positions = torch.zeros(shape, dtype=torch.long)
        what = f"positions of shape {shape}"
        _refused(
            what, lambda positions=positions: case.run(module, inputs, positions=positions), "positions", str(shape)
        )


@proves(lambda case: case.steps)
def misfit_steps_are_refused(case: Case) -> None:
    """A step with tokens of another rank, width or batch than the state's raises."""
    module: Any = case.build()
    x = case.inputs(4).x
    _, state = module.step(x, module.init_state(x.shape[0]))
    for bad, value in ((x[:, 0], _shape(x[:, 0])), (x[..., :-1], str(case.dim - 1)), (x[:2], "2")):
        _refused(f"step with x of shape {_shape(bad)}", lambda bad=bad: module.step(bad, state), "x|batch", value)


def _refused(what: str, call: Callable[[], object], name: str = "", value: str = "") -> None:
    """`call` raises ValueError or TypeError that names the argument (a pattern) and, unless Python's own, the value."""
    try:
        call()
    except (ValueError, TypeError) as error:
        message = str(error)
        pythons_own = isinstance(error, TypeError) and "argument" in message
        for part in (name,) if pythons_own else (name, re.escape(value)):
            found = re.search(rf"(?<!\w)({part})(?!\w)", message) or not part
            assert found, f"{what}: the error does not name {part!r}: {message}"
        return
    except Exception as error:
        raise AssertionError(f"{what}: raises {type(error).__name__} instead of ValueError: {error}") from error
    raise AssertionError(f"{what} is accepted")


def _attempt(case: Case, pattern: str, **causal: bool) -> Tensor:
    """Use a pattern by hand: what `Card.build` refuses, the class must refuse too."""
    module: nn.Module = case.card.cls(**{"dtype": case.dtype, **case.arguments, **causal})
    x, context = case.inputs().x, case.inputs(seed=2).x
    return module(x, context) if pattern.endswith("cross") else module(x)


def _undeclared(case: Case, inputs: Inputs) -> list[Mask]:
    if case.contract.any_mask:
        return []
    batch, queries, keys = case.sizes(inputs)
    padding = Padding(torch.full((batch,), keys))
    masks: list[Mask] = [Causal(), Window(2), Dense(torch.ones(queries, keys, dtype=torch.bool)), padding & Causal()]
    if not case.contract.padding:
        masks.append(padding)
    if not case.contract.packed:
        own = (torch.zeros(queries, dtype=torch.long),) if case.cross else ()
        masks.append(Segments(torch.zeros(keys, dtype=torch.long), *own))
    return masks


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))
