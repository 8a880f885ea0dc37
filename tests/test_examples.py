"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quickstart_trains_three_mechanisms():
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--steps", "2"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    for key in ("multi_head", "window", "lightning"):
        assert key in run.stdout
