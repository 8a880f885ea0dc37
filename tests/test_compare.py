"""``regard compare`` as a program: complete, killed, interrupted, resumed, refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from regard.bench.results import Results
from regard.cli import app

QUICK = ("--task", "none", "--mechanisms", "multi_head,lightning,eca", "--dim", "16", "--heads", "2")
LENGTHS = ("--lengths", "64,128,256")
CELLS = 6


class Program(NamedTuple):
    """A running comparison, and what it has said on stderr."""

    process: subprocess.Popen[str]

    def wait_for(self, words: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if words in line:
                return
        raise AssertionError(f"ended without saying {words!r}")


def start(out: Path, *arguments: str) -> Program:
    command = [sys.executable, "-c", "from regard.cli import main; main()", "compare", *arguments, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    # A shell that starts the tests in the background has them ignore Ctrl-C, and so would all they start.
    heeding = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, preexec_fn=heeding)
    return Program(process)


def complete(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(out, *arguments).process
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def results_in(out: Path) -> Results:
    return Results.model_validate_json((out / "results.json").read_bytes())


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 2, result.output
    assert not result.stdout
    assert result.stderr.count("\n") == 1
    return result.stderr


def children(parent: int) -> list[int]:
    """Processes started by `parent`, and by those."""
    found = [process for process, fields in _processes() if int(fields[1]) == parent]
    return [*found, *(grandchild for child in found for grandchild in children(child))]


def alive(process: int) -> bool:
    return any(found == process and fields[0] != "Z" for found, fields in _processes())


def _processes() -> Iterator[tuple[int, list[str]]]:
    """Process ids, and what stands after the name: state, parent, …"""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            yield int(path.parent.name), path.read_text().rpartition(")")[2].split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("finished")
    return out, complete(out, *QUICK, *LENGTHS)


def test_a_complete_run_measures_every_cell_and_writes_both_files(finished):
    out, run = finished
    assert run.returncode == 0, run.stderr
    assert len(results_in(out).timing) == CELLS
    assert f"{CELLS}/{CELLS} done: noncausal self 256" in run.stderr
    assert (out / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert {path.name for path in out.iterdir()} == {"results.json", "report.html", ".lock"}


def test_without_a_terminal_the_table_is_lines_with_tabs(finished):
    _, run = finished
    header, *rows = (line.split("\t") for line in run.stdout.splitlines() if "\t" in line)
    assert header[0] == "mechanism"
    assert [row[0] for row in rows] == ["multi_head", "lightning", "eca"]
    assert all(len(row) == len(header) for row in rows)


def test_a_complete_run_is_not_measured_again(finished):
    out, _ = finished
    before = results_in(out).timing
    again = complete(out, *QUICK, *LENGTHS)
    assert again.returncode == 0
    assert not again.stderr
    assert results_in(out).timing == before


# Of the runs that end early, that of Ctrl-C is in the quick suite: a run is ten seconds of processes that start.
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path):
    program = start(tmp_path, *QUICK, *LENGTHS)
    program.wait_for("2/6 done")
    workers = children(program.process.pid)
    program.process.kill()
    program.process.communicate()
    measured = results_in(tmp_path).timing
    assert 2 <= len(measured) < CELLS
    deadline = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)

    rest = complete(tmp_path, *QUICK, *LENGTHS)
    assert rest.returncode == 0, rest.stderr
    assert f"/{CELLS - len(measured)} done" in rest.stderr
    after = results_in(tmp_path).timing
    assert len(after) == CELLS
    assert {key: after[key] for key in measured} == measured


def test_ctrl_c_keeps_what_was_measured_and_says_how_to_go_on(tmp_path: Path):
    program = start(tmp_path, *QUICK, "--lengths", "64,4096,8192")
    program.wait_for("1/6 done")
    program.process.send_signal(signal.SIGINT)
    stdout, stderr = program.process.communicate(timeout=60)
    assert program.process.returncode == 130
    assert stderr.strip().splitlines()[-1] == (
        "regard: interrupted; what was measured is kept: run the same command again to go on"
    )
    assert "Traceback" not in stderr
    assert str(tmp_path / "report.html") in stdout
    assert 1 <= len(results_in(tmp_path).timing) < CELLS
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_a_spent_budget_is_told_and_the_rest_can_follow(tmp_path: Path):
    short = complete(tmp_path, *QUICK, *LENGTHS, "--budget", "0.001")
    assert short.returncode == 0
    assert re.search(r"the budget of 0.001 minutes is spent with [56] of 6 cells left", short.stderr)
    rest = complete(tmp_path, *QUICK, *LENGTHS)
    assert rest.returncode == 0
    assert len(results_in(tmp_path).timing) == CELLS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mechanisms", "windw"), "mechanism 'windw' is not known; did you mean 'window'?"),
        (("--mechanisms", "window:windw=3"), "argument 'windw' is not known; it takes"),
        (("--task", "chess"), "task 'chess' is not known; valid values: recall, text, digits, hull, delaunay, tour"),
        (("--mechanisms", "lightning", "--task", "digits"), "task digits needs 'noncausal self'"),
        (
            ("--mechanisms", "lightning", "--task", "hull"),
            "task hull needs 'noncausal cross', which lightning cannot do",
        ),
        (("--lengths", "64,512"), "length 64 is too short for window 64 of window:window=64"),
        (("--lengths", "12,512"), "length 12 is too short"),
        (("--lengths", "many"), "--lengths 'many': give whole numbers"),
        (("--lengths", "0"), "lengths 0; give positive numbers"),
        (("--dim", "10", "--heads", "4", "--mechanisms", "multi_head"), "heads 4 does not divide dim 10"),
        (("--mechanisms", "dinat:kernel_size=(3,4)", "--task", "none"), "kernel_size (3, 4)"),
        (("--dtype", "int8"), "dtype 'int8' is not known; valid values: float32, bfloat16, float16"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
        (("--budget", "0"), "budget 0 minutes; give a positive number"),
        (("--mechanisms", "dinat", "--task", "none", "--lengths", "30"), "mechanism dinat cannot run as asked"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], words: str, tmp_path: Path):
    assert words in refusal(*arguments, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    assert "cannot be written" in refusal(*QUICK, *LENGTHS, "--out", str(tmp_path / "file"))
    assert "cannot be written" in refusal(*QUICK, *LENGTHS, "--out", str(tmp_path / "file" / "below"))


def test_results_of_other_settings_are_refused_and_left(finished):
    out, _ = finished
    before = (out / "results.json").read_bytes()
    assert "holds a run with lengths 64,128,256, asked for now: 64" in refusal(
        *QUICK, "--lengths", "64", "--out", str(out)
    )
    assert (out / "results.json").read_bytes() == before


def test_a_half_written_file_is_told_kept_aside_and_not_overwritten(finished, tmp_path: Path):
    half = (finished[0] / "results.json").read_bytes()[:1000]
    (tmp_path / "results.json").write_bytes(half)
    said = refusal(*QUICK, *LENGTHS, "--out", str(tmp_path))
    assert "is damaged" in said
    assert "kept as results.damaged-1.json" in said
    assert (tmp_path / "results.damaged-1.json").read_bytes() == half
    assert not (tmp_path / "results.json").exists()


def test_results_say_what_and_where(finished):
    content = json.loads((finished[0] / "results.json").read_text())
    assert content["schema_version"] == 1
    assert content["settings"]["mechanisms"] == ["multi_head", "lightning", "eca"]
    assert {"processor", "cores", "threads", "torch", "python", "regard"} <= set(content["machine"])
