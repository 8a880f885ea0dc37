"""Rewrites the table of docs/quality.md from the results of a comparison: `python tools/quality.py RESULTS.json`."""

from __future__ import annotations

import sys
from pathlib import Path

from regard.bench.quality import TRIALS
from regard.bench.results import Results
from tools.readme import ROOT, between, table

PAGE = ROOT / "docs" / "quality.md"


def main(path: Path) -> None:
    results = Results.model_validate_json(path.read_text(encoding="utf-8"))
    PAGE.write_text(between(PAGE.read_text(encoding="utf-8"), "quality", tables(results), PAGE.name), encoding="utf-8")


def tables(results: Results) -> str:
    """The command, and a row per mechanism in its order: mean, 95% interval over seeds, and how training went."""
    settings, machine = results.settings, results.machine
    command = (
        f"regard compare --task {','.join(settings.tasks)} --lengths {','.join(map(str, settings.lengths))} "
        f"--mechanisms {','.join(settings.mechanisms)}"
    )
    columns = ["mechanism"]
    for task in settings.tasks:
        trial = TRIALS[task]
        columns.append(f"{task}: {trial.metric}" if trial.unit == "%" else f"{task}: {trial.unit}")
        columns += [f"{task}: {level}" for level in _levels(results, task)]
    rows = [
        [f"`{name}`", *(cell for task in settings.tasks for cell in _cells(results, task, name))]
        for name in settings.mechanisms
    ]
    seeds = len({cell.seed for cell in results.quality.values()})
    where = (
        f"{seeds} seeds, torch {machine.torch}, {machine.device}. After ± stands half of the 95% interval over seeds."
    )
    return f"    {command}\n\n{where}\n\n{table(columns, rows)}"


def _levels(results: Results, task: str) -> list[str]:
    return list(next((found.by for found in results.summary.quality.get(task, {}).values()), {}))


def _cells(results: Results, task: str, mechanism: str) -> list[str]:
    trial, found = TRIALS[task], results.summary.quality.get(task, {}).get(mechanism)
    if found is None:
        return ["–"] * (1 + len(_levels(results, task)))
    half = trial.number((found.high - found.low) / 2)
    return [
        f"{trial.number(found.score)} ± {half}",
        *(trial.number(found.by[level]) for level in _levels(results, task)),
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
