"""A decoding step of every mechanism whose state is constant, after two thousand tokens and after a hundred thousand.

Both numbers are multiples of all block sizes, and the first has filled every state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from harness import Row, report, threads_argument, times
from regard.catalogue import card, mechanisms

DIM, HEADS = 128, 4
SHORT, LONG, STEPS = 2 * 1024, 98 * 1024, 200
LIMIT, ROUNDS = 1.1, 3


def build(key: str) -> Any:
    torch.manual_seed(0)
    heads = {"heads": HEADS} if "heads" in card(key).arguments else {}
    return card(key).build(DIM, pattern="causal self", **heads).eval()


@torch.no_grad()
def compare(key: str) -> Row:
    """A step after many tokens, as a share of one after few; of more runs where it is above the limit."""
    built, token = build(key), torch.randn(1, 1, DIM)

    def steps(seen: int) -> Callable[[], object]:
        state = built.init_state(1)
        for piece in torch.randn(1, seen, DIM).split(10_000, dim=1):
            _, state = built.step(piece, state)

        def run() -> None:
            for _ in range(STEPS):
                built.step(token, state)

        return run

    calls, found = [steps(SHORT), steps(LONG)], []
    for _ in range(ROUNDS):
        found.append(times(*calls, repeats=9, warmup=2))
        few, many = (min(of_length) for of_length in zip(*found, strict=True))
        if many <= LIMIT * few:
            break
    case, ratio = f"{key}, a decoding step after {LONG} tokens", many / few
    detail: dict[str, float | str] = {"us a step": many / STEPS * 1e6}
    return Row(case, f"after {SHORT}", ratio, f"≤ {LIMIT}", ratio <= LIMIT, many / STEPS, few / STEPS, detail)


if __name__ == "__main__":
    threads_argument()
    keys = mechanisms(pattern="causal self", input="tokens", state="constant")
    report("decoding", [compare(key) for key in keys])
