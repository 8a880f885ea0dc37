"""Everything registered, over every option set, pattern and number of axes, against every promise it makes."""

from __future__ import annotations

import pytest

from regard.catalogue import mechanisms
from regard.testing import CHECKS, Case, Check, cases

PROMISES = [
    pytest.param(case, check, id=f"{case} {check}")
    for key in mechanisms()
    for case in cases(key)
    for check in CHECKS.values()
    if check.applies(case)
]


@pytest.mark.parametrize(("case", "check"), PROMISES)
def test_a_promise_is_kept(case: Case, check: Check) -> None:
    check(case)
