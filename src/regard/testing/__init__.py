"""Declared, then proved: the conformance suite reads a mechanism's contract and proves every line of it.

>>> from regard.testing import check
>>> print(check("multi_head"))
>>> check(MyAttention).raise_for_failures()

What a mechanism looks like is written in `regard.catalogue.Contract` and, method by method, in `CHECKS`:
``for proof in CHECKS.values(): print(proof.name, proof.claim)``.
"""

from regard.testing.cases import Case, cases
from regard.testing.checks import CHECKS
from regard.testing.proof import Check
from regard.testing.report import Report, Result
from regard.testing.run import check

__all__ = ["CHECKS", "Case", "Check", "Report", "Result", "cases", "check"]
