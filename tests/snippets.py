"""The Python in documents, and a way to run it as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

FENCED = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(documents: Iterable[Path]) -> dict[str, str]:
    """Blocks marked ``python``, by the name of their document and their number in it."""
    return {
        f"{document.name}-{number}": code
        for document in documents
        for number, code in enumerate(FENCED.findall(document.read_text(encoding="utf-8")), start=1)
    }


def assert_runs(code: str, folder: Path) -> None:
    """Run `code` in an interpreter of its own, with warnings as errors."""
    script = folder / "block.py"
    script.write_text(code, encoding="utf-8")
    result = subprocess.run([sys.executable, "-W", "error", script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
