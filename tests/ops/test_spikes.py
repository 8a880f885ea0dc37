"""Leaky integrate-and-fire against its loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.ops import leaky_integrate_and_fire


class Step(torch.autograd.Function):
    """The step function with the gradient of a steep sigmoid."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        soft = (4 * ctx.saved_tensors[0]).sigmoid()
        return grad * 4 * soft * (1 - soft)


def by_definition(x: Tensor, tau: float, threshold: float, potential: Tensor) -> tuple[Tensor, Tensor]:
    spikes = []
    for token in x.unbind(1):
        potential = potential + (token - potential) / tau
        spikes.append(Step.apply(potential - threshold))
        potential = potential * (1 - spikes[-1].detach())
    return torch.stack(spikes, 1), potential


@pytest.mark.parametrize(("length", "tau", "threshold"), [(1, 2.0, 1.0), (2, 2.0, 0.5), (50, 2.0, 0.5), (33, 5.0, 0.2)])
def test_spikes_potential_and_surrogate_gradients_are_those_of_the_loop(length, tau, threshold):
    torch.manual_seed(0)
    x = (2 * torch.randn(2, length, 7, dtype=torch.float64)).requires_grad_()
    start = torch.rand(2, 7, dtype=torch.float64, requires_grad=True)
    found = leaky_integrate_and_fire(x, tau=tau, threshold=threshold, state=start)
    wanted = by_definition(x, tau, threshold, start)
    assert torch.equal(found[0], wanted[0])
    assert 0 < found[0].mean() < 1
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(x)
    gradients = [
        torch.autograd.grad((spikes * weight).sum() + potential.sin().sum(), (x, start))
        for spikes, potential in (found, wanted)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_sequence_may_come_in_parts():
    x = 2 * torch.randn(2, 20, 5)
    whole, last = leaky_integrate_and_fire(x)
    first, state = leaky_integrate_and_fire(x[:, :7])
    second, end = leaky_integrate_and_fire(x[:, 7:], state=state)
    assert torch.equal(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)


def test_half_precision_keeps_its_potential_in_float32():
    x = 2 * torch.randn(2, 20, 5)
    spikes, state = leaky_integrate_and_fire(x.bfloat16())
    assert (spikes.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(spikes.float(), leaky_integrate_and_fire(x.bfloat16().float())[0])


def test_a_compiled_neuron_is_one_graph_and_gives_the_same():
    torch._dynamo.reset()
    x = (2 * torch.randn(1, 9, 3)).requires_grad_()
    compiled = torch.compile(leaky_integrate_and_fire, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(x)[0], leaky_integrate_and_fire(x)[0]
    assert torch.equal(found, wanted)
    gradients = [torch.autograd.grad(out.cumsum(1).sum(), x)[0] for out in (found, wanted)]
    torch.testing.assert_close(*gradients)
    torch._dynamo.reset()


def test_the_loop_is_an_operator():
    torch.library.opcheck(torch.ops.regard.spikes.default, (torch.randn(2, 6, 3), torch.zeros(2, 3), 0.5, 1.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, 3)}, "x of shape"),
        ({"x": torch.ones(2, 0, 3)}, "x of shape"),
        ({"tau": 1.0}, "tau 1.0"),
        ({"state": torch.ones(2, 4)}, "state of shape"),
        ({"state": torch.ones(2, 3, dtype=torch.float64)}, "dtype torch.float64"),
    ],
)
def test_misfits_are_refused(arguments, message):
    given = {"x": torch.ones(2, 5, 3), **arguments}
    with pytest.raises(ValueError, match=message):
        leaky_integrate_and_fire(given.pop("x"), **given)
