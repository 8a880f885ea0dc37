"""Every mechanism over tokens that declares linear or N log N time, from 4096 to 32 768, forward and backward.

Causal where it can be. Beside each the layer of exact attention, causal as well or not, and the length from which it is
faster than that.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from harness import Row, keep_freed_memory, report, threads_argument, times
from regard.catalogue import Contract, Pattern, card, mechanisms
from regard.testing import Case
from regard.testing.checks.memory import peak_bytes

DIM, HEADS = 128, 4
LENGTHS = [2**power for power in range(12, 16)]
LINEAR, LOGARITHMIC = 2.3, 2.6
ROUNDS = 3
EXACT = "multi_head"
CAUSAL: Pattern = "causal self"
PLAIN: Pattern = "noncausal self"


def growth(contract: Contract, integers: dict[str, int], which: str) -> float:
    """How much a declared cost grows when the longest length doubles."""
    short, long = (
        contract.cost(which, **{**integers, "d": DIM, "h": HEADS, "n": n, "m": n})  # pyright: ignore[reportArgumentType]
        for n in (LENGTHS[-1], 2 * LENGTHS[-1])
    )
    return long / short


def build(key: str, pattern: Pattern) -> nn.Module:
    torch.manual_seed(0)
    heads = {"heads": HEADS} if "heads" in card(key).arguments else {}
    return card(key).build(DIM, pattern=pattern, **heads)


def layer(key: str, pattern: Pattern, length: int) -> Callable[[], object]:
    """Forward and backward of a batch of one."""
    built = build(key, pattern)
    x, seed = torch.randn(1, length, DIM, requires_grad=True), torch.randn(1, length, DIM)
    leaves = [x, *(parameter for parameter in built.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(built(x), leaves, seed, allow_unused=True)


def fastest(key: str, pattern: Pattern, limit: float) -> list[float]:
    """The time of each length; where a ratio is above the limit, of more runs, as others' work only adds to it."""
    calls, found = [layer(key, pattern, length) for length in LENGTHS], []
    for _ in range(ROUNDS):
        found.append(times(*calls, repeats=3))
        seconds = [min(of_length) for of_length in zip(*found, strict=True)]
        if max(b / a for a, b in pairwise(seconds)) <= limit:
            break
    return seconds


def compare(key: str, exact: dict[Pattern, dict[int, float]]) -> Row | None:
    contract = card(key).contract
    pattern: Pattern = CAUSAL if CAUSAL in contract.patterns else PLAIN
    case = Case(card(key), card(key).option_sets()[0], pattern)
    declared = growth(contract, case.integers(), "time")
    if declared > LOGARITHMIC:
        return None
    limit = LINEAR if declared < 2.05 else LOGARITHMIC
    seconds = dict(zip(LENGTHS, fastest(key, pattern, limit), strict=True))
    peaks = [peak_bytes(layer(key, pattern, length)) for length in (LENGTHS[-2], LENGTHS[-1])]
    worst, memory = max(b / a for a, b in pairwise(seconds.values())), peaks[1] / peaks[0]
    faster = [length for length in LENGTHS if seconds[length] < exact[pattern][length]]
    since = next((length for length in LENGTHS if all(later in faster for later in LENGTHS if later >= length)), None)
    detail: dict[str, float | str] = {
        **{f"{length // 1024}k ms": value * 1e3 for length, value in seconds.items()},
        "memory(2N)/memory(N)": memory,
        "faster from": "no length here"
        if since is None
        else f"{since} tokens"
        if since > LENGTHS[0]
        else "4096 or less",
    }
    reached = worst <= limit and memory <= limit
    longest = LENGTHS[-1]
    case, peer = f"{key}{', not causal' * (pattern == PLAIN)}, time(2N)/time(N)", exact[pattern][longest]
    return Row(case, EXACT, worst, f"≤ {limit}", reached, seconds[longest], peer, detail)


if __name__ == "__main__":
    threads_argument()
    keep_freed_memory()
    exact: dict[Pattern, dict[int, float]] = {
        pattern: dict(zip(LENGTHS, times(*(layer(EXACT, pattern, n) for n in LENGTHS), repeats=3), strict=True))
        for pattern in (CAUSAL, PLAIN)
    }
    keys = dict.fromkeys(key for pattern in (CAUSAL, PLAIN) for key in mechanisms(pattern=pattern, input="tokens"))
    rows = [compare(key, exact) for key in keys]
    report("scaling", [row for row in rows if row is not None])
