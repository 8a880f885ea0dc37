"""``regard bench kernels``: what is counted, what is refused, what is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from regard.bench.kernels import measure as measuring
from regard.bench.kernels import run as running
from regard.bench.kernels.adapters import KERNELS, Kernel, Problem
from regard.bench.kernels.measure import FLOPS, judge_auto, make_problem, measure_case
from regard.bench.kernels.patterns import PATTERNS, SHORTEST, count_pairs
from regard.bench.kernels.results import KernelCase, KernelResults, KernelSettings, KernelStore, KernelTiming, Verified
from regard.bench.kernels.run import PHASES, cases, run, waiting
from regard.bench.plan import this_machine
from regard.bench.results import Seconds
from regard.cli import app
from regard.ops import attention
from regard.ops.masks import Causal, Mask, Padding
from regard.report.kernels import auto, notes, page, rows_of

HEADS, DIM, CPU = 2, 8, torch.device("cpu")
QUICK = ("--patterns", "causal", "--lengths", "64", "--engines", "fused,tiled", "--heads", "2", "--dim", "8")


def problem(pattern: str, phase: str, length: int = 96) -> Problem:
    return make_problem(pattern, length, phase, heads=HEADS, dim=DIM, dtype=torch.float32, device=CPU, seed=0)


def measured(pattern: str, phase: str, *names: str, length: int = 96) -> KernelCase:
    return measure_case(problem(pattern, phase, length), pattern, [KERNELS[name] for name in names])


def settings(**changes: object) -> KernelSettings:
    quick = {"patterns": ["causal", "window"], "lengths": [64], "engines": ["fused", "tiled"], "heads": 2, "dim": 8}
    return KernelSettings(**{**quick, "dtype": "float32", "device": "cpu", "seed": 0, **changes})


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    assert result.exit_code == 2, result.output
    assert not result.stdout
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on how well a time is known."""
    monkeypatch.setattr(measuring, "times", partial(measuring.times, seconds=0.0, fewest=2))
    monkeypatch.setattr(measuring, "gemm", partial(measuring.gemm, size=64))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KernelStore]:
    made = KernelStore(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("length", [SHORTEST, 200, 385])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pairs_counted_are_the_sum_of_the_dense_mask(pattern: str, length: int):
    mask = PATTERNS[pattern](length, 3)
    dense = torch.ones(1, 1) if mask is None else mask.dense(length, length, heads=3)
    assert count_pairs(mask, 3, length) == int(dense.expand(1, 3, length, length).sum())


@pytest.mark.parametrize("length", [SHORTEST, 1024])
def test_no_two_patterns_are_one_mask(length: int):
    made = [make(length, 2) for make in PATTERNS.values()]
    dense = [torch.ones(1, 1) if mask is None else mask.dense(length, length, heads=2) for mask in made]
    shapes = {tuple(mask.expand(1, 2, length, length).flatten().nonzero().flatten().tolist()) for mask in dense}
    assert len(shapes) == len(PATTERNS)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_query_may_look_at_itself(pattern: str):
    mask = PATTERNS[pattern](100, 2)
    assert mask is None or mask.dense(100, 100, heads=2).diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("part", [2, 8, 16])
def test_blocks_allow_the_part_they_are_named_by(part: int):
    assert count_pairs(PATTERNS[f"blocks_1/{part}"](256, 2), 2, 256) == 2 * 256**2 // part


@pytest.mark.parametrize(("pattern", "phase"), [("window", "forward"), *((name, "training") for name in PATTERNS)])
def test_engines_are_right_under_every_pattern(pattern: str, phase: str):
    case = measured(pattern, phase, "reference", "fused", "tiled")
    assert case.timings.keys() == {"reference", "fused", "tiled"}
    assert not case.wrong
    assert not case.failed
    assert all(timing.verified.queries == 96 for timing in case.timings.values())


def test_flops_needed_are_those_of_the_pairs_and_shares_follow():
    for phase, per_pair in (("forward", 4), ("training", 14)):
        case = measured("causal", phase, "fused")
        assert case.pairs == HEADS * 96 * 97 // 2
        assert case.flops == FLOPS[phase] * DIM * case.pairs == per_pair * DIM * case.pairs
        timing = case.timings["fused"]
        assert timing.share == pytest.approx(case.flops / case.gemm_flops / timing.seconds.median)


def test_peak_memory_counts_scores_and_a_dense_mask():
    case = measured("window", "forward", "reference", "tiled", "sdpa_dense_mask", length=512)
    assert case.timings["reference"].peak_bytes >= 4 * HEADS * 512**2
    assert case.timings["sdpa_dense_mask"].peak_bytes >= 512**2
    assert case.timings["tiled"].peak_bytes < 4 * HEADS * 512**2


@dataclass(frozen=True, eq=False, repr=False)
class TwoMore(Mask):
    """Causal, and two keys more."""

    def allows(self, batch, head, query, key):
        return key <= query + 2


def wrong(problem: Problem, mask: Mask | None = None, scale: float = 1.0):
    def operator(query, key, value):
        # The value passes through unscaled: only gradients of what is scaled differ.
        value = value.detach() + scale * (value - value.detach())
        return attention(query, key, value, mask=mask or problem.mask)

    return operator


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("length", [96, 2048])
def test_a_kernel_that_leaks_two_keys_is_refused(phase: str, length: int):
    leaks = Kernel("leaks", lambda problem: None, lambda problem: wrong(problem, TwoMore()))
    case = measure_case(problem("causal", phase, length), "causal", [leaks, KERNELS["fused"]])
    assert case.timings.keys() == {"fused"}
    assert "off by up to" in case.wrong["leaks"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_key_of_many_left_out_is_noticed_in_every_precision(dtype: torch.dtype):
    whole = make_problem("full", 1024, "forward", heads=1, dim=16, dtype=dtype, device=CPU, seed=0)
    forgets = Kernel("forgets", lambda problem: None, lambda problem: wrong(problem, Padding(torch.tensor([1023]))))
    case = measure_case(whole, "full", [forgets, KERNELS["fused"], KERNELS["tiled"]])
    assert case.wrong.keys() == {"forgets"}
    assert case.timings.keys() == {"fused", "tiled"}


def test_a_kernel_with_a_wrong_gradient_is_refused_where_gradients_are_asked_for():
    halves = Kernel("halves", lambda problem: None, lambda problem: wrong(problem, scale=0.5))
    assert measure_case(problem("window", "forward"), "window", [halves]).timings.keys() == {"halves"}
    assert measure_case(problem("window", "training"), "window", [halves]).wrong.keys() == {"halves"}


def test_a_kernel_that_gives_no_numbers_is_refused():
    nothing = Kernel("nothing", lambda problem: None, lambda problem: lambda query, key, value: query * torch.nan)
    assert measure_case(problem("full", "forward"), "full", [nothing]).wrong.keys() == {"nothing"}


def test_a_kernel_that_raises_is_told_and_the_others_are_measured():
    def raises(query, key, value):
        raise TypeError("no such argument\nmore")

    broken = Kernel("broken", lambda problem: None, lambda problem: raises)
    case = measure_case(problem("full", "forward"), "full", [broken, KERNELS["tiled"]])
    assert case.failed == {"broken": "TypeError: no such argument"}
    assert case.timings.keys() == {"tiled"}


def test_reference_is_left_out_where_it_would_build_too_many_scores():
    case = measured("window", "forward", "reference", "tiled", length=2049)
    assert case.refused == {"reference": "it builds all scores, and is left out above 2048 tokens"}
    assert 64 <= case.timings["tiled"].verified.queries < 2049


def test_the_table_has_no_row_without_verification():
    leaks = Kernel("leaks", lambda problem: None, lambda problem: wrong(problem, TwoMore()))
    kernels = [leaks, *(KERNELS[name] for name in ("fused", "tiled", "natten", "flash_attn", "sdpa_dense_mask"))]
    case = measure_case(problem("causal", "forward"), "causal", kernels)
    rows = {row[1].text: [cell.text for cell in row[2:]] for row in rows_of("causal 96 forward", case)}
    assert rows.keys() == {"fused", "tiled", "sdpa_dense_mask", "leaks"}
    assert rows["leaks"][0].startswith("wrong: ")
    assert set(rows["leaks"][1:]) == {"–"}
    with pytest.raises(ValueError, match="verified"):
        KernelTiming.model_validate(case.timings["fused"].model_dump(exclude={"verified"}))


def timing(median: float) -> KernelTiming:
    seconds = Seconds(median=median, low=median, high=median, runs=3)
    verified = Verified(queries=1, error=0.0)
    return KernelTiming(verified=verified, seconds=seconds, first_seconds=4.0, peak_bytes=None, share=0.1)


def test_auto_is_judged_against_engines_and_not_peers():
    timings = {"tiled": timing(3.0), "fused": timing(2.0), "sdpa_dense_mask": timing(1.0)}
    assert judge_auto("tiled", timings).model_dump() == {"engine": "tiled", "behind": 1.5, "best": "fused"}
    assert judge_auto("fused", timings).behind == 1.0
    assert judge_auto("reference", timings).behind is None


def test_auto_is_not_judged_against_what_must_be_compiled_and_the_report_says_what_that_gains():
    case = measured("causal", "forward", "fused")
    case.timings = {"tiled": timing(3.0), "flex": timing(2.0)}
    case.auto = judge_auto("tiled", case.timings)
    assert case.auto.behind == 1.0
    results = KernelResults(settings=settings(), machine=this_machine("cpu", 1), cases={"causal 96 forward": case})
    assert auto(results) == [
        "auto picked the best engine in every case",
        "auto does not compile: flex would have been up to 1.50× faster than its choice in 1 cases, after 4 s for the "
        "first call of each",
    ]


def test_what_auto_would_take_is_what_it_takes():
    assert measured("causal", "training", "fused").auto.engine == "fused"
    assert measured("window", "training", "tiled", length=512).auto.engine == "tiled"


def test_resuming_measures_nothing_twice(store: KernelStore, monkeypatch: pytest.MonkeyPatch):
    machine, seen, measure = this_machine("cpu", 1), [], running.measure_case

    def counted(problem, pattern, kernels):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append((pattern, problem.phase))
        return measure(problem, pattern, kernels)

    monkeypatch.setattr(running, "measure_case", counted)
    with pytest.raises(KeyboardInterrupt):
        run(store.open(settings(), machine), store, lambda case, event: None)
    kept = store.read()
    assert [*kept.cases] == ["causal 64 forward", "causal 64 training"]
    monkeypatch.setattr(running, "measure_case", measure)
    told = []
    results = store.open(settings(), machine)
    run(results, store, lambda case, event: told.append(f"{case} {event}"))
    assert told == [f"window 64 {phase} {event}" for phase in PHASES for event in ("started", "done")]
    assert not waiting(results)
    assert len(cases(results.settings)) == len(store.read().cases) == 4
    assert all(store.read().cases[name] == case for name, case in kept.cases.items())


# Twenty seconds of processes that start; the quick suite interrupts `regard compare`.
@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured_and_exits_130(tmp_path: Path):
    arguments = (
        "--lengths",
        "64,128",
        "--engines",
        "fused,tiled",
        "--heads",
        "2",
        "--dim",
        "8",
        "--out",
        str(tmp_path),
    )
    program = [sys.executable, "-c", "from regard.cli import main; main()", "bench", "kernels", *arguments]
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    # A shell that starts the tests in the background has them ignore Ctrl-C, and so would all they start.
    heeding = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(program, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=heeding)
    assert process.stderr is not None
    assert process.stderr.readline() == "1/40 done: full 64 forward\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == (
        "regard: interrupted; what was measured is kept: run the same command again to go on"
    )
    assert "Traceback" not in stderr
    assert str(tmp_path / "report.html") in stdout
    kept = KernelResults.model_validate_json((tmp_path / "results.json").read_bytes())
    assert 1 <= len(kept.cases) < 40
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html", ".lock"}


def test_the_command_prints_a_table_and_writes_a_report_that_holds_the_results(tmp_path: Path):
    result = CliRunner().invoke(app, ["bench", "kernels", *QUICK, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    header, *rows = (line.split("\t") for line in result.stdout.splitlines() if "\t" in line)
    assert header[1] == "kernel"
    assert sorted((row[0], row[1]) for row in rows) == [
        (f"causal 64 {phase}", kernel) for phase in ("forward", "forward and backward") for kernel in ("fused", "tiled")
    ]
    assert all(len(row) == len(header) for row in rows)
    assert "fla is absent: fla is not installed" in result.stdout
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    held = text.partition('<script type="application/json" id="results">')[2].partition("</script>")[0]
    assert json.loads(held) == json.loads((tmp_path / "results.json").read_text())
    assert "http://" not in text
    assert "https://" not in text


def test_the_report_says_where_auto_is_slow_and_what_was_wrong():
    slow = measured("causal", "forward", "fused")
    slow.timings = {"fused": timing(2.0), "tiled": timing(1.0)}
    slow.auto, slow.wrong = judge_auto("fused", slow.timings), {"flex": "its rows are off"}
    results = KernelResults(settings=settings(), machine=this_machine("cpu", 1), cases={"causal 96 forward": slow})
    assert auto(results)[-1] == "auto is more than 1.25× slower at causal 96 forward: fused, best tiled, 2.00×"
    assert notes(results)[0] == "causal 96 forward: flex is wrong: its rows are off"
    slow.timings["tiled"].seconds.high = 2.0
    assert notes(results)[0].startswith("the machine was busy: in 1 of 2 timings")
    assert "flex is wrong" in page(results)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--patterns", "causl"), "pattern 'causl' is not known; valid values: full, causal, window"),
        (
            ("--engines", "fuse"),
            "engine 'fuse' is not known; valid values: fused, tiled, flex, reference, sdpa_dense_mask",
        ),
        (("--engines", "flash_attn"), "engine 'flash_attn' cannot be measured: flash_attn is not installed"),
        (("--lengths", "many"), "--lengths 'many': give whole numbers"),
        (("--lengths", "63"), "length 63 is too short for the patterns; give at least 64"),
        (("--lengths", "0"), "lengths 0; give positive numbers"),
        (("--lengths", ""), "lengths is empty; give positive numbers"),
        (("--heads", "0"), "heads 0; give positive numbers"),
        (("--dim", "-1"), "dim -1; give positive numbers"),
        (("--dtype", "int8"), "dtype 'int8' is not known; valid values: float32, bfloat16, float16"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], words: str, tmp_path: Path):
    assert words in refusal(*arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_results_of_other_settings_are_refused_and_left(store: KernelStore):
    store.write(store.open(settings(), this_machine("cpu", 1)))
    before = store.path.read_bytes()
    store.close()
    said = refusal(*QUICK, "--out", str(store.folder))
    assert "holds a run with patterns causal,window, asked for now: causal" in said
    assert store.path.read_bytes() == before


def test_a_mask_of_ones_own_is_counted_too():
    assert count_pairs(TwoMore() & Causal(), 2, 300) == 2 * 300 * 301 // 2
