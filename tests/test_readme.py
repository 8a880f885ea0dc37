"""What the documents say is true: their code runs, their commands exist, their tables are the registry's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regard.catalogue import mechanisms
from regard.cli import app
from tests.snippets import assert_runs, python_blocks
from tools.readme import README, ROOT, filled, mechanism_table, speed_tables

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
BLOCKS = python_blocks(ROOT / document for document in DOCUMENTS)
COMMAND = re.compile(r"^    ((?:make|python|regard) .*?)(?:\s+#.*)?$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def commands() -> list[str]:
    return sorted({command for document in DOCUMENTS for command in COMMAND.findall(text(document))})


@pytest.mark.parametrize("code", BLOCKS.values(), ids=BLOCKS)
def test_python_block_runs(code: str, tmp_path: Path):
    assert_runs(code, tmp_path)


def test_documents_show_commands():
    assert {command.split()[0] for command in commands()} == {"make", "python", "regard"}


@pytest.mark.parametrize("command", commands())
def test_command_exists(command: str):
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", text("Makefile"), re.MULTILINE)
    elif program == "python":
        assert not [argument for argument in arguments if "/" in argument and not (ROOT / argument).exists()]
    else:
        # These take minutes; with --help its options are still read, and unknown ones refused.
        arguments += ["--help"] if arguments[0] in ("compare", "bench") else []
        assert CliRunner().invoke(app, arguments).exit_code == 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_to_files_resolve(document: str):
    missing = [target for target in LINK.findall(text(document)) if not (ROOT / target).exists()]
    assert not missing


def test_tables_are_up_to_date():
    assert text("README.md") == filled(text("README.md")), "run `make readme`"


def test_mechanism_table_has_every_mechanism_of_the_library():
    named = re.findall(r"^\| `(\w+)` \|", mechanism_table(), re.MULTILINE)
    assert set(named) <= set(mechanisms())
    assert {"multi_head", "mqa", "gqa"} <= set(named)


def test_speed_table_shows_every_row_of_every_result(tmp_path: Path):
    machine = {"processor": "abacus", "threads": 2, "python": "3.11", "torch": "2.13.0", "gemm_gflops": 190.0}
    row = {"case": "causal | window", "peer": "dense", "ratio": 2.0, "target": ">= 16", "reached": False}
    row |= {"ours_seconds": 0.5, "peer_seconds": 1.0, "detail": {"share": 0.25, "engine": "tiled"}}
    for name in ("b", "a"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": [row]}))
    tables = speed_tables(tmp_path)
    line = r"| causal \| window | dense | 2.00 | >= 16 | no | 500.0 ms | 1000.0 ms | share 0.25, engine tiled |"
    assert tables.count(line) == 2
    assert tables.index("`benchmarks/a.py` (abacus, 2 threads") < tables.index("`benchmarks/b.py`")


def test_speed_section_without_results_says_how_to_get_them(tmp_path: Path):
    assert "make bench" in speed_tables(tmp_path)


def test_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="mechanisms:begin"):
        filled("# regard")


def test_filling_keeps_everything_else():
    readme = README.read_text(encoding="utf-8")
    stripped = re.sub(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", r"\1stale\n\3", readme, flags=re.DOTALL)
    assert stripped != readme
    assert filled(stripped) == filled(readme)
