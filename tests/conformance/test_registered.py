"""Everything registered, over every option set, pattern and number of axes, against every promise it makes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from regard.catalogue import mechanisms
from regard.testing import CHECKS, Case, Check, cases

# What the quick suite runs; the rest is among the slow tests, so that nothing is lost:
#   - the default arguments are proved whole under every pattern;
#   - every other option set keeps each of its promises at least once, under the last pattern that makes it, which asks
#     for most, and these under every pattern, for it is here that options and patterns meet;
EVERYWHERE = {
    "output_has_shape_and_dtype_of_x",
    "every_parameter_learns",
    "gradients_are_right",
    "future_changes_nothing",
    "future_has_no_gradient",
    "future_has_no_gradient_with_padding",
    "later_tokens_are_seen",
    "padding_is_invisible",
    "mask_is_obeyed",
    "step_equals_forward",
}
#   - what takes seconds a case is proved for the default arguments under the last pattern.
HEAVY = {"compiled_equals_eager", "exported_equals_eager", "memory_grows_as_declared"}
#   - these take 15 to 25 seconds to compile; the memory that they are blocks around is compiled by the quick suite.
SLOW_TO_COMPILE = {"titans_mac", "titans_mag", "titans_mal"}


def promises(key: str) -> Iterator[tuple[Case, Check, bool]]:
    """Every case of a mechanism with every check of a promise it makes, and whether the quick suite runs it."""
    made = [(case, check) for case in cases(key) for check in CHECKS.values() if check.applies(case)]
    last = {(str(case.option_set), check.name): case.pattern for case, check in made}
    for case, check in made:
        is_default = not case.option_set.arguments
        is_last = case.pattern == last[str(case.option_set), check.name]
        if check.name in HEAVY:
            slow = check.name == "compiled_equals_eager" and key in SLOW_TO_COMPILE
            yield case, check, is_default and is_last and not slow
        else:
            yield case, check, is_default or is_last or check.name in EVERYWHERE


PROMISES = [
    pytest.param(case, check, id=f"{case} {check}", marks=[] if quick else [pytest.mark.slow])
    for key in mechanisms()
    for case, check, quick in promises(key)
]


def test_the_rule_names_checks_there_are() -> None:
    assert EVERYWHERE | HEAVY <= CHECKS.keys()
    assert SLOW_TO_COMPILE <= set(mechanisms())


@pytest.mark.parametrize(("case", "check"), PROMISES)
def test_a_promise_is_kept(case: Case, check: Check) -> None:
    check(case)
