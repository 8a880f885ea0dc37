"""Everything registered, over every option set, pattern and number of axes, against every promise it makes."""

from __future__ import annotations

import pytest

from regard.catalogue import mechanisms
from regard.testing import CHECKS, Case, Check, cases

HEAVY = {"compiled_equals_eager", "exported_equals_eager", "memory_grows_as_declared"}
"""Seconds a case: in CI they are run for the default arguments under the last pattern, which asks for most, and among
the slow tests for all else."""


def marks(case: Case, check: Check) -> list[pytest.MarkDecorator]:
    patterns = case.contract.patterns
    first = not case.option_set.arguments and (not patterns or case.pattern == patterns[-1])
    return [pytest.mark.slow] if check.name in HEAVY and not first else []


PROMISES = [
    pytest.param(case, check, id=f"{case} {check}", marks=marks(case, check))
    for key in mechanisms()
    for case in cases(key)
    for check in CHECKS.values()
    if check.applies(case)
]


@pytest.mark.parametrize(("case", "check"), PROMISES)
def test_a_promise_is_kept(case: Case, check: Check) -> None:
    check(case)
