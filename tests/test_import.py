"""Importing regard is cheap, and a floor of it imports only the floors below."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import regard

SOURCE = Path(regard.__file__).parent
FLOORS = ("ops", "catalogue", "nn", "models", "tasks", "sites", "inspect", "testing", "bench", "report", "cli")
OPTIONAL = {
    *("diffusers", "jinja2", "natten", "plotly", "pydantic", "pytest", "rich", "scipy", "sklearn"),
    *("timm", "torchvision", "transformers", "typer", "xarray"),
}
COMPILER = {"torch._dynamo", "torch._inductor", "triton"}


def modules_added_by(statement: str) -> set[str]:
    """Names in ``sys.modules`` after `statement` in a fresh interpreter that ``import torch`` did not bring."""
    program = (
        f"import json, sys, torch; before = set(sys.modules); {statement}; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(result.stdout))


@pytest.mark.parametrize("statement", ["import regard", "import regard.nn", "import regard.testing"])
def test_import_takes_no_optional_package(statement: str):
    assert not modules_added_by(statement) & OPTIONAL


def test_the_door_takes_no_host():
    hosts = {"diffusers", "timm", "torchvision", "transformers"}
    assert not modules_added_by("import regard.sites, regard.inspect") & hosts


def test_import_takes_no_compiler():
    assert not modules_added_by("import regard, regard.nn") & COMPILER


def test_import_takes_no_mechanism_before_one_is_asked_for():
    assert "regard.nn" not in modules_added_by("import regard")
    assert "regard.nn" in modules_added_by("import regard; regard.mechanisms()")


def test_exported_names_exist():
    assert all(hasattr(regard, name) for name in regard.__all__)
    assert regard.create("gqa", dim=256, heads=8, kv_heads=2, causal=True).card is regard.card("gqa")


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("floor", FLOORS)
def test_floor_imports_only_floors_below(floor: str):
    above = FLOORS[FLOORS.index(floor) + 1 :]
    files = [file for file in SOURCE.rglob("*.py") if file.relative_to(SOURCE).with_suffix("").parts[0] == floor]
    assert files
    wrong = {
        f"{file.relative_to(SOURCE)}: {name}"
        for file in files
        for name in imports(file)
        if any(f"{name}.".startswith(f"regard.{forbidden}.") for forbidden in above)
    }
    assert not wrong


def test_every_file_stands_on_a_floor():
    places = {file.relative_to(SOURCE).with_suffix("").parts[0] for file in SOURCE.rglob("*.py")}
    assert places == {"__init__", *FLOORS}
