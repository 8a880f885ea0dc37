"""What the suite itself promises: readable cases, honest reports, no trace left behind."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from correct import CONTRACT, Correct, declares
from torch import Tensor, nn

from regard.catalogue import Contract, OptionSet, mechanisms
from regard.ops.attention import attention_weights
from regard.ops.checks import require
from regard.testing import CHECKS, cases, check
from regard.testing.checks.decoding import state_bytes
from regard.testing.checks.memory import peak_bytes


@declares(replace(CONTRACT, options=(OptionSet({"heads": 2}, {"permutation": None}),)))
class WithOptions(Correct):
    """Two option sets."""


@declares(Contract(input="feature_map", memory="n*d", permutation="equivariant"))
class Gate(nn.Module):
    """A gate over feature maps without parameters: every channel by its own mean."""

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        require(dim > 0, "Gate", f"dim {dim}", "give a positive width")
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        given = f"x of shape {tuple(x.shape)} and dtype {x.dtype}"
        require(x.ndim == 4 and x.shape[1] == self.dim and x.is_floating_point(), "Gate", given, "give (B, C, H, W)")
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Unregistered(nn.Module):
    """No card."""


def test_cases_are_option_sets_times_patterns_with_readable_names() -> None:
    assert [str(case) for case in cases(WithOptions)] == [
        "WithOptions() noncausal self",
        "WithOptions() causal self",
        "WithOptions(heads=2) noncausal self",
        "WithOptions(heads=2) causal self",
    ]


def test_a_gate_without_parameters_passes_everything() -> None:
    check(Gate).raise_for_failures()


def test_grids_are_proved_for_every_number_of_axes() -> None:
    cls = declares(Contract(input="grid", patterns=("noncausal self",), grid_dims=(1, 2, 3)))(
        type("Grid", (Correct,), {})
    )
    assert [case.inputs().x.ndim for case in cases(cls)] == [3, 4, 5]


def test_what_an_option_set_changes_is_not_demanded_of_it() -> None:
    report = check(WithOptions, only="permutation_of_tokens_does_as_declared")
    assert [result.outcome for result in report.results] == ["passed", "not declared", "not declared", "not declared"]


def test_a_report_prints_every_check_and_what_failed() -> None:
    cls = declares(replace(CONTRACT, frozen=("output.bias",)))(type("Frozen", (Correct,), {}))
    report = check(cls, only=["every_parameter_learns", "every_input_matters"])
    assert "Frozen: 2 passed, 2 failed, 0 not declared" in str(report)
    assert "every_parameter_learns [1, 2]: parameter output.bias" in str(report)
    with pytest.raises(AssertionError, match="Frozen breaks its contract"):
        report.raise_for_failures()


def test_every_check_says_what_it_claims() -> None:
    assert all(proof.claim.endswith(").") or proof.claim.endswith(".") for proof in CHECKS.values())


def test_unknown_names_raise_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'gradients_are_right'"):
        check(Correct, only="gradient_are_right")
    with pytest.raises(ValueError, match="did you mean 'multi_head'"):
        check("multihead")
    with pytest.raises(TypeError, match="has no card"):
        check(Unregistered)


def test_a_check_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    (proof,) = (proof for proof in CHECKS.values() if proof.name == "dropout_acts_in_training")
    proof(cases(Correct)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_extreme_inputs_reach_logits_of_1e4() -> None:
    case = cases(Correct)[0]
    module = case.build()
    query, key, _ = module.project(100 * case.inputs().x)
    assert (query @ key.mT * query.shape[-1] ** -0.5).abs().max() > 1e4


def test_states_are_weighed_by_what_they_keep_alive() -> None:
    buffer = torch.zeros(1000)
    assert state_bytes({"view": buffer[:1], "twice": (buffer, [buffer])}) == 4000


def test_peak_memory_counts_what_is_freed_again() -> None:
    peak = peak_bytes(lambda: attention_weights(torch.randn(1, 1, 512, 4), torch.randn(1, 1, 512, 4)).sum())
    assert 512 * 512 * 4 <= peak <= 8 * 512 * 512 * 4


def test_the_suite_needs_no_test_framework() -> None:
    lines = "import sys, regard.testing", "assert not {'pytest', 'hypothesis'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_mechanisms_of_the_tests_are_not_registered() -> None:
    assert not {"Correct", "WithOptions"} & set(mechanisms())
