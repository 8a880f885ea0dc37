"""Layers are timed side by side, and one that fails does not keep the others from it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import regard
from regard.bench import timing
from regard.bench.measure import Work, work
from regard.bench.plan import BASELINE
from regard.bench.results import Seconds, TimingCell
from regard.bench.timing import STEPS, Layer, time_layers
from regard.bench.variant import Variant
from regard.catalogue import Pattern
from regard.testing.checks.decoding import state_bytes

CPU = torch.device("cpu")
LENGTH, DIM = 64, 16
CAUSAL: Pattern = "causal self"
NONCAUSAL: Pattern = "noncausal self"


def attending(pattern: Pattern) -> list[Variant]:
    """Every mechanism that attends so and can at this size."""
    return [variant for variant in map(Variant, regard.mechanisms()) if variant.attends(pattern)]


def time_at(variants: list[Variant], pattern: Pattern, length: int = LENGTH) -> tuple[TimingCell, dict[str, str]]:
    return time_layers(variants, pattern, length, dim=DIM, heads=2, dtype=torch.float32, device=CPU, seed=0)


@pytest.fixture(scope="module", params=[CAUSAL, NONCAUSAL])
def measured(request: pytest.FixtureRequest) -> TimingCell:
    with pytest.MonkeyPatch.context() as patch:
        quick = timing.times
        patch.setattr(timing, "times", lambda calls, device: quick(calls, device=device, seconds=0.01))
        cell, failures = time_at(attending(request.param), request.param)
    assert not failures
    return cell


def test_every_mechanism_is_measured(measured: TimingCell):
    assert [*measured.layers] == [str(variant) for variant in attending(measured.pattern)]
    assert measured.length == LENGTH


def test_limits_of_the_machine_are_measured(measured: TimingCell):
    assert 1e8 < measured.gemm_flops < 1e15
    assert 1e8 < measured.copy_bytes < 1e14


def test_times_are_ordered_quartiles(measured: TimingCell):
    for layer in measured.layers.values():
        for found in filter(None, (layer.forward, layer.training, layer.step)):
            assert 0 < found.low <= found.median <= found.high
            assert 3 <= found.runs <= 15


def test_training_does_more_than_forward(measured: TimingCell):
    for name, layer in measured.layers.items():
        assert layer.training_flops >= layer.forward_flops, name
        assert layer.training_peak_bytes > layer.forward_peak_bytes > 0, name


def test_shares_are_between_nothing_and_about_everything(measured: TimingCell):
    """A little more than 1 is noise of the machine, much more a wrong count."""
    for name, layer in measured.layers.items():
        assert 0 < layer.forward_share < 1.5, name
        assert 0 < layer.training_share < 1.5, name


def test_only_causal_mechanisms_with_a_step_are_stepped(measured: TimingCell):
    for name, layer in measured.layers.items():
        steps = measured.pattern == CAUSAL and Variant(name).card.contract.step
        assert (layer.step is not None) == steps, name
        assert (layer.state_bytes is not None) == steps, name


def test_state_is_what_the_sequence_left():
    cell, _ = time_at([BASELINE], CAUSAL)
    module = BASELINE.build(DIM, 2, CAUSAL, dtype=torch.float32, device=CPU)
    _, state = module.step(torch.randn(1, LENGTH, DIM), module.init_state(1))
    assert cell.layers["multi_head"].state_bytes == state_bytes(state)


def test_exact_attention_has_the_operations_of_its_products():
    """Four projections; scores and mixing, of which causal leaves half."""
    cell, _ = time_at([BASELINE], CAUSAL)
    projections, pairs = 4 * 2 * LENGTH * DIM * DIM, 2 * 2 * LENGTH * LENGTH * DIM
    assert cell.layers["multi_head"].forward_flops == projections + pairs / 2
    assert cell.layers["multi_head"].training_flops == 3 * projections + 3.5 * pairs / 2


def test_variant_that_fails_is_reported_and_the_others_are_measured():
    broken = Variant.parse("gqa:kv_heads=3")
    cell, failures = time_at([BASELINE, broken, Variant("lightning")], CAUSAL)
    assert [*cell.layers] == ["multi_head", "lightning"]
    assert failures == {
        "gqa:kv_heads=3": "ValueError: GroupedQueryAttention: kv_heads 3 does not divide heads 2; give a divisor"
    }


def test_variant_that_fails_when_it_runs_is_reported_too():
    cell, failures = time_at([Variant("dinat"), BASELINE], NONCAUSAL, 16)
    assert [*cell.layers] == ["multi_head"]
    assert [*failures] == ["dinat"]
    assert failures["dinat"].startswith("ValueError: ")
    assert "exceeds the axis length 4" in failures["dinat"]


def test_nothing_that_runs_still_gives_the_limits():
    cell, failures = time_at([Variant("dinat")], NONCAUSAL, 16)
    assert cell.layers == {}
    assert cell.gemm_flops > 0
    assert [*failures] == ["dinat"]


def stepped(key: str) -> Layer:
    """A layer that has seen `LENGTH` tokens, in float64."""
    torch.manual_seed(0)
    module = Variant(key).build(DIM, 2, CAUSAL, dtype=torch.float64, device=CPU)
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64)
    with torch.no_grad():
        _, state = module.step(x, module.init_state(1))
    return Layer(module, x, torch.randn_like(x), state)


@pytest.mark.parametrize("key", regard.mechanisms(pattern=CAUSAL, step=True))
def test_decoding_goes_on_from_the_state(key: str):
    layer, probe = stepped(key), torch.randn(1, 1, DIM, dtype=torch.float64)
    layer.decode()
    layer.decode()
    seen = torch.cat([layer.x, layer.x[:, -1:].expand(-1, 2 * STEPS, -1), probe], dim=1)
    with torch.no_grad():
        found, _ = layer.module.step(probe, layer.state)
        torch.testing.assert_close(found, layer.module(seen)[:, -1:], rtol=1e-9, atol=1e-9)


def test_forward_records_no_gradients_and_training_leaves_fresh_ones():
    layer = stepped("multi_head")
    assert not layer.forward().requires_grad
    layer.train()
    once = [parameter.grad.clone() for parameter in layer.module.parameters()]
    layer.train()
    for parameter, gradient in zip(layer.module.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert layer.x.grad is None


def test_no_gradients_are_left_when_memory_is_measured(monkeypatch: pytest.MonkeyPatch):
    """On CUDA those of an earlier run, freed in this one, would count as room."""
    left = []

    def spied(call: Callable[[], object], device: torch.device) -> Work:
        left.extend(parameter.grad for parameter in call.__self__.module.parameters())
        return work(call, device)

    monkeypatch.setattr(timing, "work", spied)
    time_at([BASELINE], CAUSAL)
    assert left[:4] == [None] * 4  # four projections, when training is measured


def test_training_reaches_the_input():
    """What stands before a layer needs the gradient of its input: it is part of a training step."""
    layer, asked = stepped("multi_head"), []
    forward = layer.module.forward

    def spied(x: Tensor) -> Tensor:
        asked.append(x.requires_grad)
        return forward(x)

    layer.module.forward = spied
    layer.train()
    assert asked == [True]


def test_bytes_moved_are_input_and_output():
    layer = stepped("multi_head")
    assert layer.bytes_moved() == 8 * 2 * LENGTH * DIM


def test_seconds_are_median_and_quartiles():
    assert timing.quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == Seconds(median=3.0, low=2.0, high=4.0, runs=5)


@pytest.mark.parametrize("flops_bound", [True, False])
def test_share_is_that_of_the_nearer_limit(flops_bound: bool, monkeypatch: pytest.MonkeyPatch):
    """Every call takes a second; the product or the copy does so much in it that it is no limit."""
    monkeypatch.setattr(timing, "times", lambda calls, device: [[1.0, 1.0, 1.0] for _ in calls])
    monkeypatch.setattr(timing, "gemm", lambda dtype, device: (lambda: None, 1e5 if flops_bound else 1e30))
    monkeypatch.setattr(timing, "copy", lambda device: (lambda: None, 1e30 if flops_bound else 1e5))
    cell, _ = time_at([BASELINE], CAUSAL)
    layer, moved = cell.layers["multi_head"], 4 * 2 * LENGTH * DIM
    forward = layer.forward_flops if flops_bound else moved
    training = layer.training_flops if flops_bound else 2 * moved
    assert math.isclose(layer.forward_share, forward / 1e5)
    assert math.isclose(layer.training_share, training / 1e5)
    assert math.isclose(layer.step.median, 1 / STEPS)
