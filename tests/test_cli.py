"""The command line says what the registry and the papers table hold, on terminals and in pipes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import entry_points

import pytest
from typer.testing import CliRunner, Result

from regard import __version__
from regard.catalogue import Contract, card, mechanisms, papers
from regard.cli import app

WITHOUT_TERMINAL = {"FORCE_COLOR": "", "TTY_COMPATIBLE": ""}
TERMINAL = {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "", "TERM": "xterm"}
STYLE = re.compile(r"\x1b\[[0-9;]*m")
OPEN = next(row for row in papers().values() if not row.implemented and row.key not in mechanisms())


def regard(*arguments: str, env: dict[str, str] = WITHOUT_TERMINAL) -> Result:
    return CliRunner().invoke(app, arguments, env=env)


def lines(*arguments: str) -> list[list[str]]:
    result = regard(*arguments)
    assert result.exit_code == 0, result.output
    return [line.split("\t") for line in result.stdout.splitlines()]


def keys(kind: str, *arguments: str) -> list[str]:
    return [line[1] for line in lines("list", *arguments) if line[0] == kind]


def error(*arguments: str) -> str:
    result = regard(*arguments)
    assert result.exit_code == 2
    assert not result.stdout
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_command_is_installed():
    (script,) = entry_points(group="console_scripts", name="regard")
    assert script.value == "regard.cli:main"


def test_no_command_shows_help():
    result = regard()
    assert result.exit_code == 0
    assert "list" in result.stdout
    assert "show" in result.stdout


def test_version_is_the_packages():
    assert regard("--version").stdout == f"regard {__version__}\n"


def test_list_has_every_mechanism_and_every_open_paper():
    assert keys("mechanism") == mechanisms()
    assert sorted(keys("open")) == sorted(key for key, row in papers().items() if not row.implemented)


def test_list_leaves_out_no_implemented_paper():
    behind = {source.key for key in mechanisms() for source in card(key).papers}
    done = {key for key, row in papers().items() if row.implemented}
    assert set(keys("implemented")) == done - behind


def test_list_orders_open_papers_by_wave():
    waves = [int(line[3]) for line in lines("list", "--open")]
    assert waves == sorted(waves)


def test_list_without_terminal_is_one_whole_line_per_entry():
    result = regard("list", env={**WITHOUT_TERMINAL, "COLUMNS": "20"})
    entries = [line.split("\t") for line in result.stdout.splitlines()]
    assert {(entry[0], len(entry)) for entry in entries} <= {("mechanism", 8), ("implemented", 6), ("open", 6)}
    assert all(all(entry) for entry in entries)


def test_list_can_be_narrowed_to_implemented_or_open():
    assert {line[0] for line in lines("list", "--implemented")} <= {"mechanism", "implemented"}
    assert {line[0] for line in lines("list", "--open")} == {"open"}


def test_list_narrows_by_wave_and_room():
    assert OPEN.key in keys("open", "--wave", str(OPEN.wave), "--room", OPEN.room)
    assert {line[3] for line in lines("list", "--open", "--wave", "2")} == {"2"}
    assert {line[4] for line in lines("list", "--open", "--room", OPEN.room)} == {OPEN.room}
    assert "eca" in keys("mechanism", "--room", "nn/channel")
    assert "gqa" not in keys("mechanism", "--room", "nn/channel")


def test_list_narrows_by_pattern_and_input():
    assert keys("mechanism", "--pattern", "causal self") == mechanisms(pattern="causal self")
    assert keys("mechanism", "--input", "grid") == mechanisms(input="grid")
    both = keys("mechanism", "--pattern", "causal cross", "--input", "tokens")
    assert both == mechanisms(pattern="causal cross", input="tokens")
    assert {line[0] for line in lines("list", "--input", "tokens")} == {"mechanism"}


@pytest.mark.parametrize(
    ("option", "value", "valid"),
    [
        ("--pattern", "causal", "noncausal self, causal self, noncausal cross, causal cross"),
        ("--input", "token", "tokens, grid, feature_map"),
        ("--wave", "77", "1, 2, 3, 4, 5, 6"),
        ("--room", "nn/head", "nn/heads"),
    ],
)
def test_unknown_filter_is_refused_in_one_line_with_the_valid_values(option: str, value: str, valid: str):
    message = error("list", option, value)
    assert option in message
    assert value in message
    assert valid in message


def test_open_papers_cannot_be_narrowed_by_what_only_mechanisms_declare():
    assert "--open" in error("list", "--open", "--input", "tokens")


def test_json_holds_the_registry_and_the_table():
    listed = json.loads(regard("list", "--json").stdout)
    assert [entry["key"] for entry in listed["mechanisms"]] == mechanisms()
    assert [row["key"] for row in listed["papers"]] == list(papers())
    for entry in listed["mechanisms"]:
        assert entry["patterns"] == list(card(entry["key"]).contract.patterns)
        assert entry["papers"][0]["title"] == card(entry["key"]).papers[0].title


def test_json_takes_the_same_filters():
    listed = json.loads(regard("list", "--json", "--open", "--wave", "2").stdout)
    assert listed["mechanisms"] == []
    assert {row["wave"] for row in listed["papers"]} == {2}


@pytest.mark.parametrize("key", mechanisms())
def test_show_prints_source_file_docstring_contract_and_arguments(key: str):
    entry = card(key)
    shown = regard("show", key).stdout
    assert entry.description in shown
    for source in entry.papers:
        assert source.cite() in shown
        assert source.url is None or source.url in shown
    rows = [line.split("\t") for line in shown.splitlines()]
    names = [row[0] for row in rows]
    assert {item.name for item in fields(Contract)} - {"options"} <= set(names)
    assert set(entry.arguments) <= set(names)
    assert ["dim", "required", "int"] in rows
    assert {str(option) for option in entry.option_sets()} <= set(names)


def test_show_says_what_is_open_about_a_paper():
    rows = dict(line[:2] for line in lines("show", OPEN.key)[1:])
    assert rows["state"] == "open"
    assert rows["what must work"] == OPEN.what
    assert (rows["wave"], rows["room"]) == (str(OPEN.wave), OPEN.room)


def test_show_leads_from_a_paper_to_the_mechanism_with_another_key():
    rows = dict(line[:2] for line in lines("show", "faster_na")[1:])
    assert rows["mechanism"] == "dinat"


def test_unknown_key_is_refused_in_one_line_with_the_nearest():
    assert "gqa" in error("show", "gqaa")
    assert OPEN.key in error("show", f"{OPEN.key}_")
    assert "regard list" in error("show", "?????")


@pytest.mark.parametrize("width", [20, 60, 150])
def test_terminal_output_stays_within_the_width_and_names_everything(width: int):
    shown = STYLE.sub("", regard("list", env={**TERMINAL, "COLUMNS": str(width)}).stdout)
    assert max(map(len, shown.splitlines())) <= width
    folded = "".join(shown.split())
    assert all(key in folded for key in (*mechanisms(), OPEN.key))


def test_terminal_output_keeps_brackets_of_equations():
    shown = regard("show", "multi_head", env={**TERMINAL, "COLUMNS": "60"}).stdout
    assert card("multi_head").description in shown


def run(stdout: int, **env: str) -> subprocess.CompletedProcess[bytes]:
    program = [sys.executable, "-c", "from regard.cli import main; main()", "show", "multi_head"]
    return subprocess.run(program, stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **env}, timeout=120)


def test_closed_pipe_is_no_error_message():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run(writer).stderr == b""
    finally:
        os.close(writer)


def test_output_that_cannot_encode_an_equation_replaces_its_symbols():
    result = run(subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert b"softmax(Q_h K_h? / ?d_h) V_h" in result.stdout
