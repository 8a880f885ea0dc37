"""What is declared is there, and what is there is declared."""

from __future__ import annotations

import inspect
from typing import Any

from regard.catalogue import Card
from regard.testing.cases import Case
from regard.testing.proof import proves

_REFUSALS = (ValueError, TypeError, AttributeError, NotImplementedError)


@proves()
def signature_is_the_librarys(case: Case) -> None:
    """Constructor: ``(dim, *, ..., device, dtype)``; forward: what is declared; neither takes ``**kwargs``."""
    constructor = inspect.signature(case.card.cls).parameters
    forward = inspect.signature(case.card.cls.forward).parameters
    for owner, parameters in {"the constructor": constructor, "forward": forward}.items():
        open_ended = [str(p) for p in parameters.values() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        assert not open_ended, f"{owner} takes {', '.join(open_ended)}, which hides unknown arguments"
    assert next(iter(constructor), None) == "dim", (
        f"the constructor's arguments are {list(constructor)}; dim comes first"
    )
    positional = [name for name, parameter in constructor.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    assert positional in (["dim"], ["dim", "heads"]), f"positional constructor arguments {positional}; keep dim alone"
    missing = {"device", "dtype"} - constructor.keys()
    assert not missing, f"the constructor lacks {sorted(missing)}"
    lacking = {name for name, declared in _forward_arguments(case).items() if declared} - forward.keys()
    assert not lacking, f"declared, but forward lacks {sorted(lacking)}"
    assert isinstance(vars(case.card.cls).get("card"), Card), "the class has no card of its own"


@proves()
def formulas_can_be_evaluated(case: Case) -> None:
    """`time` and `memory` use only n, m, d, h and integer arguments of the constructor, and are positive."""
    for which in ("time", "memory"):
        formula = getattr(case.contract, which)
        try:
            cost = case.contract.cost(which, **{**case.integers(), "n": 64, "m": 64})
        except NameError as error:
            raise AssertionError(
                f"{which}={formula!r}: {error}; there are {sorted(case.integers())}, n and m"
            ) from None
        assert cost > 0, f"{which}={formula!r} is {cost} for 64 tokens"


@proves()
def patterns_can_be_chosen(case: Case) -> None:
    """A mechanism with causal and noncausal patterns has the constructor argument ``causal``."""
    causal = {pattern.startswith("causal") for pattern in case.contract.patterns}
    assert len(causal) < 2 or "causal" in case.card.arguments, (
        f"patterns {case.contract.patterns} without a constructor argument causal"
    )


@proves()
def declared_methods_exist(case: Case) -> None:
    """Declared abilities have their methods."""
    module = case.build()
    for names, declared in _abilities(case).items():
        missing = [name for name in names if not callable(getattr(module, name, None))]
        assert not (declared and missing), f"declared, but there is no method {', '.join(missing)}"


@proves()
def undeclared_methods_refuse(case: Case) -> None:
    """What is not declared does not exist or raises: no ability is left unproved."""
    module, inputs = case.build(), case.inputs()
    if not (case.contract.step and case.causal) and hasattr(module, "step"):
        _assert_refuses("step", lambda: _step(module, inputs.x))
    if not case.contract.attention_map and hasattr(module, "attention_map"):
        call: Any = module.attention_map
        _assert_refuses("attention_map", lambda: call(*inputs.tensors()))


def _forward_arguments(case: Case) -> dict[str, bool]:
    crosses = any(pattern.endswith("cross") for pattern in case.contract.patterns)
    masks = case.takes_padding or case.takes_packed
    return {"x": True, "context": crosses, "mask": masks, "positions": case.contract.positions}


def _abilities(case: Case) -> dict[tuple[str, ...], bool]:
    return {("init_state", "step"): case.steps, ("attention_map", "combine"): case.contract.attention_map}


def _step(module: Any, x: Any) -> object:
    return module.step(x[:, :1], module.init_state(x.shape[0]))


def _assert_refuses(name: str, call: Any) -> None:
    try:
        call()
    except _REFUSALS:
        return
    raise AssertionError(f"{name} works, but the contract does not declare it")
