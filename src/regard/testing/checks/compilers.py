"""torch.compile and torch.export see one graph and give what eager gives."""

from __future__ import annotations

from typing import Any

import torch

from regard.testing.arguments import forward_arguments
from regard.testing.cases import Case
from regard.testing.compare import assert_same
from regard.testing.outcome import assert_same_outcome, outcome
from regard.testing.proof import proves, told_apart


@proves()
def compiled_equals_eager(case: Case) -> None:
    """`torch.compile` in one graph gives eager's output and gradients, with a padding mask too where declared."""
    module = case.build()
    given = forward_arguments(case, case.inputs())
    for name in given.keys() & {"no mask", "padding"}:
        torch._dynamo.reset()
        compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
        with told_apart(name):
            actual = outcome(case, module, given[name], called_as=compiled)
            assert_same_outcome(actual, outcome(case, module, given[name]), "of the compiled module")
    torch._dynamo.reset()


@proves()
def exported_equals_eager(case: Case) -> None:
    """`torch.export` gives a program with eager's output."""
    module, inputs = case.build(), case.inputs()
    program = torch.export.export(module, inputs.tensors())
    other = case.inputs(seed=3)
    assert_same(program.module()(*other.tensors()), case.run(module, other), "exported output")
    torch._dynamo.reset()
