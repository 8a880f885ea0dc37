"""The suite itself, proved: it passes what is correct and turns red on what is broken, on the checks meant to."""

from __future__ import annotations

import pytest
from broken import BROKEN, Broken
from correct import Correct

from regard.testing import CHECKS, check

# Checks of things that fail by raising; all others must say what is wrong in their own words.
FAIL_BY_RAISING = {"compiled_equals_eager", "exported_equals_eager", "copies_are_equal_and_independent"}


def test_the_correct_mechanism_passes_everything() -> None:
    report = check(Correct)
    report.raise_for_failures()
    assert report.passed


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.cls.__name__)
def test_a_broken_mechanism_turns_the_suite_red(broken: Broken) -> None:
    report = check(broken.cls, only=broken.caught_by)
    assert not report.passed
    assert {failure.check.name for failure in report.failures} == set(broken.caught_by)
    for failure in report.failures:
        assert failure.check.name in FAIL_BY_RAISING or not failure.message.startswith("raises "), failure.message


def test_every_check_catches_something() -> None:
    assert set(CHECKS) - {name for broken in BROKEN for name in broken.caught_by} == set()
