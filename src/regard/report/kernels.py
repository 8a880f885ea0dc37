"""The report of ``regard bench kernels``: its table, its findings, and one page that holds everything it shows."""

from __future__ import annotations

import statistics
from collections import Counter

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from regard.bench.kernels.patterns import PATTERNS
from regard.bench.kernels.results import Auto, KernelCase, KernelResults
from regard.ops.engines import COMPILED
from regard.report.page import NOTHING, Cell, Table

BUSY = 1.5
"""Between quartiles of a quiet machine there is less than this factor."""

PHASES = {"forward": "forward", "training": "forward and backward"}
COLUMNS = ("pattern, tokens, phase", "kernel", "ms", "against the best", "GFLOP needed", "of GEMM", "peak MB", "auto")


def page(results: KernelResults) -> str:
    """The whole report."""
    environment = Environment(
        loader=PackageLoader("regard.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("kernels.html.jinja").render(
        results=results,
        tables=[table(results, pattern) for pattern in PATTERNS if pattern in results.settings.patterns],
        auto=auto(results),
        notes=notes(results),
        # A tag inside a string of JSON would end the script it stands in.
        script=Markup(results.model_dump_json(indent=1).replace("<", "\\u003c")),
    )


def table(results: KernelResults, pattern: str) -> Table:
    """Every kernel that took a mask, fastest first; one that was wrong has no numbers."""
    cases = {place: case for place, case in results.cases.items() if case.pattern == pattern}
    rows = [row for place, case in cases.items() for row in rows_of(place, case)]
    pairs = {case.length: case.pairs / (results.settings.heads * case.length**2) for case in cases.values()}
    densities = ", ".join(f"{100 * share:.3g}% at {length} tokens" for length, share in pairs.items())
    return Table(
        f"pattern-{pattern}".replace("/", "-"),
        pattern,
        f"Pairs allowed: {densities or 'not measured yet'}.",
        COLUMNS,
        tuple(rows),
    )


def rows_of(place: str, case: KernelCase) -> list[tuple[Cell, ...]]:
    """A row for each kernel of a case that was verified or is wrong."""
    name = Cell(f"{case.pattern} {case.length} {PHASES[case.phase]}")
    ranked = sorted(case.timings.items(), key=lambda item: item[1].seconds.median)
    rows = []
    for kernel, timing in ranked:
        source = f"/cases/{place.replace('/', '~1')}/timings/{kernel}"
        best, peak = ranked[0][1].seconds.median, timing.peak_bytes
        rows.append(
            (
                name,
                Cell(kernel),
                Cell(f"{timing.seconds.median * 1e3:.3g}", f"{source}/seconds/median"),
                Cell(f"{timing.seconds.median / best:.2f}×"),
                Cell(f"{case.flops / 1e9:.3g}"),
                Cell(f"{100 * timing.share:.1f}%", f"{source}/share"),
                NOTHING if peak is None else Cell(f"{peak / 1e6:.3g}", f"{source}/peak_bytes"),
                Cell("auto") if kernel == case.auto.engine else NOTHING,
            )
        )
    for kernel, why in case.wrong.items():
        rows.append((name, Cell(kernel), Cell(f"wrong: {why}"), *[NOTHING] * 5))
    return rows


def auto(results: KernelResults) -> list[str]:
    """How far ``backend="auto"`` is behind the best engine, worst first."""
    judged = [(case.auto.behind, place, case.auto) for place, case in results.cases.items() if case.auto.behind]
    judged.sort(key=lambda item: -item[0])
    if not judged:
        return []
    behind, place, found = judged[0]
    worst = "auto picked the best engine in every case" if behind == 1 else ""
    lines = [worst or f"auto was at most {behind:.2f}× slower than the best engine ({place}: {_choice(found)})"]
    slower = [f"{place}: {_choice(found)}, {behind:.2f}×" for behind, place, found in judged if behind > 1.25]
    return lines + [f"auto is more than 1.25× slower at {line}" for line in slower] + _compiled(results)


def _compiled(results: KernelResults) -> list[str]:
    """What engines that auto leaves alone gain, and what they cost first."""
    lines = []
    for engine in COMPILED:
        cases = [case for case in results.cases.values() if {engine, case.auto.engine} <= case.timings.keys()]
        if not cases:
            continue
        timed = [(case.timings[case.auto.engine].seconds.median, case.timings[engine]) for case in cases]
        gain = max(ours / found.seconds.median for ours, found in timed)
        first = statistics.median(found.first_seconds for _, found in timed)
        lines.append(
            f"auto does not compile: {engine} would have been up to {gain:.2f}× faster than its choice in {len(cases)} "
            f"cases, after {first:.2g} s for the first call of each"
        )
    return lines


def notes(results: KernelResults) -> list[str]:
    """What not to trust, and what was not measured and why; each reason once."""
    seconds = [timing.seconds for case in results.cases.values() for timing in case.timings.values()]
    busy = sum(found.high > BUSY * found.low for found in seconds)
    lines = []
    if busy > len(seconds) / 10:
        lines.append(
            f"the machine was busy: in {busy} of {len(seconds)} timings the upper quartile is more than {BUSY} times "
            "the lower: do not trust the times, run again when it is quiet, with another --out"
        )
    lines += [
        f"{place}: {kernel} is wrong: {why}"
        for place, case in results.cases.items()
        for kernel, why in case.wrong.items()
    ]
    lines += [
        f"{place}: {kernel} failed: {why}"
        for place, case in results.cases.items()
        for kernel, why in case.failed.items()
    ]
    refused = Counter((kernel, why) for case in results.cases.values() for kernel, why in case.refused.items())
    lines += [
        f"{kernel} left out of {count} of {len(results.cases)} cases: {why}" for (kernel, why), count in refused.items()
    ]
    return lines + [f"{kernel} is absent: {why}" for kernel, why in results.absent.items()]


def _choice(found: Auto) -> str:
    return f"{found.engine}, best {found.best}"
