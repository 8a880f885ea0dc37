"""What every benchmark script shares: interleaved timing, peak memory, machine limits, a table and a JSON file."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from regard.bench.measure import gemm_limit, processor

RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One line of a benchmark: a measured ratio, what it must reach, and the numbers behind it."""

    case: str
    peer: str
    ratio: float
    target: str
    reached: bool
    ours_seconds: float
    peer_seconds: float
    detail: dict[str, float | str] = field(default_factory=dict)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def times(
    *functions: Callable[[], object],
    repeats: int = 7,
    warmup: int = 1,
    of: Callable[[list[float]], float] = statistics.median,
) -> list[float]:
    """Median seconds of each function; rounds are interleaved so that drift of the machine hits all alike.

    ``of=min`` takes the least instead, for calls that last so long that every round is disturbed by something.
    """
    for function in functions:
        for _ in range(warmup):
            function()
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for kept, function in zip(samples, functions, strict=True):
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            kept.append(time.perf_counter() - start)
    return [of(kept) for kept in samples]


def keep_freed_memory() -> None:
    """Have glibc reuse blocks from 32 MiB on, which it otherwise returns to the kernel each time.

    The page faults of a fresh block would be timed for long sequences only, as if they were work of the operator.
    """
    if sys.platform == "linux":
        no_trimming, no_mapping = (-1, -1), (-4, 0)
        for option, value in (no_trimming, no_mapping):
            ctypes.CDLL(None).mallopt(option, value)


def machine() -> dict[str, object]:
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gemm_gflops": round(gemm_limit() / 1e9, 1),
    }


def report(name: str, rows: list[Row]) -> None:
    """Print the table and write ``results/<name>.json`` whole or not at all."""
    host = machine()
    table = Table(
        title=f"{name} — {host['threads']} threads, torch {host['torch']}, GEMM {host['gemm_gflops']} GFLOP/s"
    )
    for column in ("case", "peer", "ratio", "target", "reached", "ours", "peer's", "detail"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row.case,
            row.peer,
            f"{row.ratio:.2f}",
            row.target,
            "yes" if row.reached else "NO",
            f"{row.ours_seconds * 1e3:.1f} ms",
            f"{row.peer_seconds * 1e3:.1f} ms",
            ", ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.detail.items()
            ),
        )
    Console(width=180).print(table)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    partial = target.with_suffix(".json.part")
    partial.write_text(json.dumps({"machine": host, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    os.replace(partial, target)


def threads_argument() -> None:
    """Every script takes ``--threads`` (2 by default, so that numbers compare across machines)."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
