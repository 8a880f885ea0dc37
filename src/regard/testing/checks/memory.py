"""Peak memory grows no faster than the declared formula."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from regard.testing.cases import Case
from regard.testing.compare import weighted_sum
from regard.testing.proof import proves


class Growth(NamedTuple):
    """From `short` to `long` tokens the peak may grow `slack` times as much as the formula."""

    short: int
    long: int
    slack: float


# Workspaces that fill only at the longer size count fully there: hence the slack of the first, which finds score
# matrices cheaply. The second is long enough for workspaces to be full at both ends and finds a mask of bytes.
_COARSE, _FINE = Growth(512, 2048, 1.4), Growth(1024, 4096, 1.15)
# Who declares a matrix of scores has it in front of all else at fewer tokens.
_QUADRATIC = Growth(256, 1024, 1.4)


@proves()
def memory_grows_as_declared(case: Case) -> None:
    """With more tokens the peak grows at most as the formula `memory` says, forward and with backward."""
    quadratic = _cost(case, 1 << 20) > 1.9**2 * _cost(case, 1 << 19)
    growth = _QUADRATIC if quadratic else _COARSE
    _assert_grows(case, "forward", _forward, growth)
    _assert_grows(case, "forward and backward", _forward_and_backward, growth)
    if not quadratic:
        _assert_grows(case, "forward", _forward, _FINE)


def _assert_grows(case: Case, what: str, measure: Callable[[Case, int], int], growth: Growth) -> None:
    short, long = (measure(case, length) for length in (growth.short, growth.long))
    declared = _cost(case, growth.long) / _cost(case, growth.short)
    assert long <= growth.slack * declared * short, (
        f"{what}: the peak grows {long / short:.1f} times ({short} to {long} bytes) from {growth.short} to "
        f"{growth.long} tokens; memory={case.contract.memory!r} allows {declared:.1f} times {growth.slack}"
    )


def _cost(case: Case, length: int) -> float:
    n = prod(case.lengths(length))
    return case.contract.cost("memory", **{**case.integers(), "n": n, "m": n})


def _forward(case: Case, length: int) -> int:
    with torch.no_grad():
        return _measure(case, length, lambda out: None)


def _forward_and_backward(case: Case, length: int) -> int:
    return _measure(case, length, lambda out: weighted_sum(out).backward())


def _measure(case: Case, length: int, then: Callable[[torch.Tensor], None]) -> int:
    dtype = torch.float32 if torch.float32 in case.contract.dtypes else case.dtype
    module, sizes = case.build({"dtype": dtype}), case.lengths(length)
    keys = prod(sizes) if case.cross else None
    inputs = case.inputs(sizes, batch=1, context_length=keys, dtype=dtype).with_gradients()
    return peak_bytes(lambda: then(case.run(module, inputs)))


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory of its own a call holds at once (CPU). What was there before gives no room when it is freed."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise writes lines of its own to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    return peak_recorded(recorded)


def peak_recorded(recorded: torch.profiler.profile) -> int:
    """The most bytes held at once of those allocated while recording, by torch's own allocator on the CPU."""
    held = most = 0
    sizes: dict[int, int] = {}
    memory = (event for event in _events(recorded) if event.name == "[memory]")
    for event in sorted(memory, key=attrgetter("start_time_ns")):
        block, change = event.extra_fields, event.extra_fields.alloc_size
        if change > 0:
            sizes[block.ptr] = change
        else:
            # The profiler reports frees of earlier blocks by chance: of those whose address it saw in another run.
            change = -sizes.pop(block.ptr, 0)
        held += change
        most = max(most, held)
    return most


def _events(recorded: torch.profiler.profile) -> Iterator[Any]:
    results: Any = recorded.profiler and recorded.profiler.kineto_results
    waiting = results.experimental_event_tree()[::-1]
    while waiting:
        event = waiting.pop()
        yield event
        waiting += event.children[::-1]
