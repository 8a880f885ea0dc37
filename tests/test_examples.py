"""The examples run as they stand."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_trains_each_of_its_mechanisms(example: Path):
    command = [sys.executable, str(example), "--steps", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for key in mechanisms(example):
        assert key in run.stdout


def mechanisms(example: Path) -> list[str]:
    tree = ast.parse(example.read_text(encoding="utf-8"))
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return list(ast.literal_eval(assigned["MECHANISMS"]))
