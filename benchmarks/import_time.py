"""What `import regard` costs beyond `import torch`: at most 0.3 s, each time in a fresh interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys

from harness import Row, report, threads_argument

LIMIT_SECONDS = 0.3
REPEATS = 9
PROGRAM = """
from time import perf_counter
start = perf_counter()
import torch
between = perf_counter()
import regard
end = perf_counter()
layer = regard.create("multi_head", dim=8, heads=2)
assert layer(torch.zeros(1, 3, 8)).shape == (1, 3, 8)
print(between - start, end - between, perf_counter() - end)
"""


def main() -> None:
    threads_argument()
    torch_seconds, regard_seconds, first_layer_seconds = measured()
    report(
        "import_time",
        [
            Row(
                case="import regard, after torch",
                peer="import torch",
                ratio=regard_seconds / torch_seconds,
                target=f"≤ {LIMIT_SECONDS} s",
                reached=regard_seconds <= LIMIT_SECONDS,
                ours_seconds=regard_seconds,
                peer_seconds=torch_seconds,
                detail={"seconds to first layer and call": first_layer_seconds},
            )
        ],
    )


def measured() -> tuple[float, ...]:
    """Median seconds to import torch, to import regard after it, and to build and call a first layer."""
    runs = [
        subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout.split()
        for _ in range(1 + REPEATS)
    ]
    return tuple(statistics.median(map(float, column)) for column in zip(*runs[1:], strict=True))


if __name__ == "__main__":
    main()
