"""Dropout, seeds and what eval mode must not touch."""

from __future__ import annotations

import torch

from regard.testing.cases import Case, seed_cpu
from regard.testing.compare import assert_differs, assert_same
from regard.testing.proof import proves

_DROPOUT = 0.5


def _has_dropout(case: Case) -> bool:
    return bool(case.dropouts(_DROPOUT))


@proves()
def eval_is_repeatable(case: Case) -> None:
    """Two calls in eval mode give the same, with dropout and without, and dropout leaves no trace there."""
    inputs = case.inputs()
    plain = case.build(case.dropouts(0.0))
    expected = case.run(plain, inputs)
    for module in (plain, case.build(case.dropouts(_DROPOUT))):
        seed_cpu(1)
        first = case.run(module, inputs)
        seed_cpu(2)
        assert_same(case.run(module, inputs), first, "second call in eval mode")
        assert_same(first, expected, "eval mode with dropout and without")


@proves(_has_dropout)
def dropout_acts_in_training(case: Case) -> None:
    """In training, dropout changes the output, differently for every seed, and keeps gradients flowing."""
    inputs = case.inputs().with_gradients()
    for name in case.dropouts(_DROPOUT):
        module = case.build({**case.dropouts(0.0), name: _DROPOUT})
        quiet = case.run(module, inputs)
        module.train()
        seed_cpu(1)
        first = case.run(module, inputs)
        seed_cpu(2)
        second = case.run(module, inputs)
        assert_differs(first, quiet, f"training output with {name}={_DROPOUT} and eval output")
        assert_differs(first, second, f"training outputs with {name}={_DROPOUT} under two seeds")
        first.sum().backward()


@proves()
def seed_determines_everything(case: Case) -> None:
    """One seed gives the same parameters and the same training output; the constructor sets no seed of its own."""
    inputs, states, after = case.inputs(), [], []
    for seed in (0, 0, 1):
        with torch.random.fork_rng(devices=[]):
            seed_cpu(seed)
            module = case.card.build(
                pattern=case.pattern, **{"dtype": case.dtype, **case.arguments, **case.dropouts(_DROPOUT)}
            )
            after.append(torch.get_rng_state())
            states.append((module, case.run(module, inputs)))
    (one, first), (two, second), _ = states
    for name, value in one.state_dict().items():
        assert_same(two.state_dict()[name], value, f"{name} built under one seed")
    assert_same(second, first, "training output under one seed")
    assert not torch.equal(after[0], after[2]), "the constructor leaves the same random state under two seeds"


@proves()
def eval_leaves_global_state(case: Case) -> None:
    """A call in eval mode draws no random number and changes no global setting of torch."""
    module, inputs = case.build(case.dropouts(_DROPOUT)), case.inputs().with_gradients()
    before = _global_state()
    random_state = torch.get_rng_state()
    case.run(module, inputs).sum().backward()
    assert torch.equal(torch.get_rng_state(), random_state), "random numbers were drawn in eval mode"
    changed = {name: value for name, value in _global_state().items() if value != before[name]}
    assert not changed, f"global settings changed: {changed}"
    assert not module.training, "the module left eval mode"


def _global_state() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
    }
