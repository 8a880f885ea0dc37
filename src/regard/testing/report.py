"""What came out of proving a mechanism."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from regard.testing.cases import Case
from regard.testing.proof import Check

Outcome = Literal["passed", "failed", "not declared"]
_MARKS = {"passed": "✓", "failed": "✗", "not declared": "·"}


@dataclass(frozen=True)
class Result:
    """One check on one case; `message` says what is wrong where it failed."""

    case: Case
    check: Check
    outcome: Outcome
    message: str = ""

    def __str__(self) -> str:
        return f"{self.case}: {self.check} {self.outcome}" + (f": {self.message}" if self.message else "")


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0]


@dataclass(frozen=True)
class Report:
    """The results of every check on every case of one mechanism; prints as a table followed by the failures."""

    key: str
    results: tuple[Result, ...]

    @property
    def failures(self) -> tuple[Result, ...]:
        """What was declared and does not hold."""
        return tuple(result for result in self.results if result.outcome == "failed")

    @property
    def passed(self) -> bool:
        """Whether everything declared holds."""
        return not self.failures

    def raise_for_failures(self) -> None:
        """Raise AssertionError with every failure, if there is any."""
        if self.failures:
            raise AssertionError(f"{self.key} breaks its contract:\n" + "\n".join(map(str, self.failures)))

    def __str__(self) -> str:
        cases = list(dict.fromkeys(str(result.case) for result in self.results))
        rows: dict[str, dict[str, str]] = {}
        for result in self.results:
            rows.setdefault(result.check.name, {})[str(result.case)] = _MARKS[result.outcome]
        width = max(map(len, rows), default=0)
        cell = len(str(len(cases))) + 1
        counts = [f"{self._count(outcome)} {outcome}" for outcome in ("passed", "failed", "not declared")]
        lines = [f"{self.key}: {', '.join(counts)}"]
        lines += [f"{number:>{cell}}  {case}" for number, case in enumerate(cases, start=1)]
        lines.append(" " * width + "".join(f"{number:>{cell}}" for number in range(1, len(cases) + 1)))
        lines += [
            name.ljust(width) + "".join(f"{row.get(case, ' '):>{cell}}" for case in cases) for name, row in rows.items()
        ]
        return "\n".join([*lines, *self._failure_lines(cases)])

    def _failure_lines(self, cases: list[str]) -> list[str]:
        """One line per check and kind of failure: the first message, and the numbers of the cases that share it."""
        alike: dict[tuple[str, str], list[Result]] = {}
        for result in self.failures:
            # The same words with other numbers are the same failure.
            words = re.sub(r"[\d.e+-]+", "", _first_line(result.message))
            alike.setdefault((result.check.name, words), []).append(result)
        return [
            f"{name} [{', '.join(str(cases.index(str(result.case)) + 1) for result in results)}]: "
            f"{_first_line(results[0].message)}"
            for (name, _), results in alike.items()
        ]

    def _count(self, outcome: Outcome) -> int:
        return sum(result.outcome == outcome for result in self.results)
