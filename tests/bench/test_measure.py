"""What is counted and timed is what was done."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import ceil

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from regard.bench import measure
from regard.bench.measure import copy, gemm, gemm_limit, processor, times, work
from regard.ops import attention, linear_attention
from regard.ops.masks import Causal

CPU = torch.device("cpu")
HEADS, WIDTH = 3, 8


def heads(length: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(1, HEADS, length, WIDTH, requires_grad=True) for _ in range(3))
    return query, key, value


def flops(call: Callable[[], Tensor], *, backward: bool = False) -> float:
    """Of the call, and of its backward if wanted."""
    return work(lambda: call().sum().backward() if backward else call(), CPU).flops


def product(rows: int, inner: int, columns: int) -> float:
    """Floating-point operations of a matrix product: a multiplication and an addition per term."""
    return 2.0 * rows * inner * columns


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_one_product(bias: bool):
    layer, x = nn.Linear(12, 20, bias=bias), torch.randn(2, 5, 12)
    assert flops(lambda: layer(x)) == product(10, 12, 20)


def test_backward_of_a_linear_is_two_more_products():
    layer, x = nn.Linear(12, 20), torch.randn(2, 5, 12, requires_grad=True)
    assert flops(lambda: layer(x), backward=True) == 3 * product(10, 12, 20)


@pytest.mark.parametrize(("causal", "part"), [(False, 1.0), (True, 0.5)])
def test_sdpa_is_two_products_and_half_of_them_where_causal(causal: bool, part: float):
    query, key, value = heads(40)
    expected = part * HEADS * 2 * product(40, WIDTH, 40)
    assert flops(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal)) == expected


@pytest.mark.parametrize(("causal", "part"), [(False, 1.0), (True, 0.5)])
def test_backward_of_sdpa_is_five_more_products(causal: bool, part: float):
    query, key, value = heads(40)
    found = flops(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=causal), backward=True)
    assert found == part * HEADS * 7 * product(40, WIDTH, 40)


def test_sdpa_that_falls_apart_into_products_counts_them_once():
    query, key, value = heads(40)
    with sdpa_kernel(SDPBackend.MATH):
        found = flops(lambda: F.scaled_dot_product_attention(query, key, value))
    assert found == HEADS * 2 * product(40, WIDTH, 40)


def test_a_product_that_falls_apart_into_rows_of_its_batch_counts_once():
    """As torch does where an operand is the same for the whole batch."""
    start, left, right = torch.randn(3, 40, 1), torch.randn(1, 40, WIDTH), torch.randn(3, WIDTH, 40)
    spread = torch.ones(1, 1, 1).expand(3, 40, WIDTH)
    for operand in (left.expand(3, -1, -1), spread):
        assert flops(lambda operand=operand: torch.baddbmm(start, operand, right)) == 3 * product(40, WIDTH, 40)


def test_sdpa_with_fewer_key_heads_counts_every_query_head():
    query, (key, value) = torch.randn(1, 4, 40, WIDTH), torch.randn(2, 1, 2, 40, WIDTH)
    found = flops(lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True))
    assert found == 4 * 2 * product(40, WIDTH, 40)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("backend", "length"), [("tiled", 40), ("tiled", 600), ("reference", 40)])
def test_engines_of_our_own_count_as_dense_attention_forward(backend: str, length: int, normalizer: str):
    query, key, value = heads(length)
    found = flops(lambda: attention(query, key, value, normalizer=normalizer, backend=backend))
    assert found == HEADS * 2 * product(length, WIDTH, length)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_tiled_backward_is_five_more_products(normalizer: str):
    """The scores again, and one product for each gradient of weights, queries, keys and values."""
    query, key, value = heads(40)
    found = flops(lambda: attention(query, key, value, normalizer=normalizer, backend="tiled"), backward=True)
    assert found == HEADS * 7 * product(40, WIDTH, 40)


def test_tiles_that_a_mask_empties_are_not_counted():
    query, key, value = heads(1024)
    full, causal = (
        flops(lambda mask=mask: attention(query, key, value, mask=mask, backend="tiled")) for mask in (None, Causal())
    )
    assert 0.5 * full < causal < 0.7 * full


@pytest.mark.parametrize("length", [128, 640])
def test_linear_attention_counts_the_products_of_its_chunks(length: int):
    """Per chunk of 64: scores, weights on values, queries on the state, and keys on values for the next state."""
    query, key, value = heads(length)
    chunk = product(64, WIDTH, 64) + product(64, 64, WIDTH) + 2 * product(64, WIDTH, WIDTH)
    assert flops(lambda: linear_attention(query, key, value, chunk_size=64)) == HEADS * length / 64 * chunk


def test_convolution_counts_its_taps():
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(1, 4, 10, 12)
    assert flops(lambda: layer(x)) == product(10 * 12, 4 * 9, 6)


def test_backward_of_a_convolution_is_two_more_products():
    layer, x = nn.Conv2d(4, 6, 3, padding=1), torch.randn(1, 4, 10, 12, requires_grad=True)
    assert flops(lambda: layer(x), backward=True) == 3 * product(10 * 12, 4 * 9, 6)


def test_what_has_no_products_counts_nothing():
    x = torch.randn(5, 5)
    assert flops(lambda: x.exp() + x) == 0


@pytest.mark.parametrize("size", [4096, 1_000_000])
def test_peak_is_the_bytes_that_a_call_holds(size: int):
    assert work(lambda: torch.empty(size, dtype=torch.uint8), CPU).peak_bytes == size


def test_peak_is_of_what_is_held_at_once():
    def one_after_another():
        for _ in range(3):
            torch.empty(100_000, dtype=torch.uint8)

    assert work(one_after_another, CPU).peak_bytes == 100_000
    held = []
    assert work(lambda: held.extend(torch.empty(100_000, dtype=torch.uint8) for _ in range(3)), CPU).peak_bytes == (
        300_000
    )


def test_peak_does_not_count_what_was_there_before():
    x = torch.ones(1_000_000, dtype=torch.uint8)
    assert work(lambda: x.add_(1), CPU).peak_bytes < 1000


def test_freeing_what_was_there_before_gives_no_room():
    held = []
    work(lambda: held.append(torch.empty(100_000, dtype=torch.uint8)), CPU)

    def exchanged():
        held.clear()
        held.append(torch.empty(30_000, dtype=torch.uint8))

    assert work(exchanged, CPU).peak_bytes == 30_000


class Clock:
    """Time that passes only in calls that say so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.order = 0.0, []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def call(self, name: str, *seconds: float) -> Callable[[], None]:
        """A call that takes each of `seconds` in turn, the last one from then on."""
        durations = itertools.chain(seconds, itertools.repeat(seconds[-1]))

        def run() -> None:
            self.now += next(durations)
            self.order.append(name)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_calls_take_turns(clock: Clock):
    times([clock.call("a", 0.1), clock.call("b", 0.2)], device=CPU, seconds=0.3, fewest=3)
    assert "".join(clock.order[4:]) == "ababab"


def test_call_is_warmed_up_before_it_is_timed(clock: Clock):
    (found,) = times([clock.call("a", 7.0, 5.0, 0.125)], device=CPU)
    assert found
    assert set(found) == {0.125}


@pytest.mark.parametrize(
    ("each", "runs"), [(0.125, 4), (0.0625, 8), (0.0001, 15), (2.0, 3), (0.3, 3), (0.15, ceil(0.5 / 0.15))]
)
def test_runs_fill_the_seconds_between_fewest_and_most(clock: Clock, each: float, runs: int):
    (found,) = times([clock.call("a", each)], device=CPU, seconds=0.5, fewest=3, most=15)
    assert len(found) == runs
    assert found == pytest.approx([each] * runs)


def test_each_call_has_its_own_number_of_runs(clock: Clock):
    quick, slow = times([clock.call("a", 0.0625), clock.call("b", 1.0)], device=CPU, seconds=0.5, fewest=3)
    assert (len(quick), len(slow)) == (8, 3)
    assert set(slow) == {1.0}


def test_first_run_that_is_slow_does_not_shorten_the_timing(clock: Clock):
    (found,) = times([clock.call("a", 9.0, 0.0625)], device=CPU, seconds=0.5, fewest=3)
    assert len(found) == 8


def test_no_calls_take_no_time():
    assert times([], device=CPU) == []


def test_large_product_does_what_it_says():
    call, counted = gemm(torch.float32, CPU, 64)
    assert work(call, CPU).flops == counted == 2 * 64**3


def test_large_copy_reads_and_writes_every_byte():
    call, moved = copy(CPU, 1000)
    assert moved == 2000
    assert torch.equal(call(), torch.ones(1000, dtype=torch.uint8))


def test_limit_of_the_machine_is_a_speed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "times", lambda calls, **given: [[2.0, 4.0, 3.0]])
    assert gemm_limit() == 2 * 2048**3 / 3.0


def test_processor_has_a_name():
    assert processor().strip()
