"""Run the suite over a mechanism."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from regard.catalogue import Card
from regard.ops.checks import one_of
from regard.testing.cases import Case, card_of, cases
from regard.testing.checks import CHECKS
from regard.testing.proof import Check
from regard.testing.report import Report, Result


def check(mechanism: str | Card | type[nn.Module], *, only: str | Iterable[str] | None = None) -> Report:
    """Prove a mechanism: every check on every case, or those named by `only`.

    Args:
        mechanism: the key, card or class of a registered mechanism.
        only: names of checks (see `CHECKS`).

    Nothing is raised for a broken promise: see `Report.raise_for_failures`. Raises ValueError for an unknown mechanism
    or check.
    """
    names = list(CHECKS) if only is None else [only] if isinstance(only, str) else list(only)
    for name in names:
        one_of("regard.testing.check", "only", name, CHECKS)
    entry = card_of(mechanism)
    results = [_result(case, CHECKS[name]) for case in cases(entry) for name in names]
    return Report(entry.key, tuple(results))


def _result(case: Case, proof: Check) -> Result:
    if not proof.applies(case):
        return Result(case, proof, "not declared")
    try:
        proof(case)
    except AssertionError as error:
        return Result(case, proof, "failed", str(error))
    except Exception as error:  # whatever a mechanism raises where it promised to work is a broken promise
        return Result(case, proof, "failed", f"raises {type(error).__name__}: {error}")
    return Result(case, proof, "passed")
