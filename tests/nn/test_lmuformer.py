"""LMUFormer's memory against its recurrence and the delay it approximates, and all its blocks against the authors'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from regard.nn import LegendreMemory
from regard.nn.linear.lmuformer import legendre_delay, orbit
from regard.nn.linear.lmuformer_block import LMUFormerBlock, PatchEmbedding, SpikingLegendreMemory
from regard.ops.masks import Padding

GOLDEN = Path(__file__).parents[1] / "golden" / "lmuformer.safetensors"


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def by_recurrence(layer: LegendreMemory, x: Tensor) -> Tensor:
    """Token by token."""
    memory, outputs = x.new_zeros(len(x), layer.memory_size), []
    for token in x.unbind(1):
        memory = memory @ layer.transition.mT + F.relu(layer.input(token)) * layer.entry
        outputs.append(layer.output(F.relu(layer.hidden(torch.cat([memory, token], -1)))))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize(("length", "options"), [(1, {}), (2, {}), (63, {"theta": 20.0}), (200, {"memory_size": 30})])
def test_the_parallel_form_is_the_recurrence(length, options):
    layer = LegendreMemory(12, dtype=torch.float64, **options)
    x = draw(2, length, 12).requires_grad_()
    found, wanted = layer(x), by_recurrence(layer, x)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    leaves = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_constants_are_the_zero_order_hold_of_the_delay_system():
    """Over one token, m' = A m + B u with u held: e^A m + A⁻¹ (e^A − 1) B u."""
    size, theta = 5, 7.0
    a = torch.tensor(
        [[(2 * i + 1) / theta * (-1.0 if i < j else (-1.0) ** (i - j + 1)) for j in range(size)] for i in range(size)],
        dtype=torch.float64,
    )
    b = torch.tensor([(2 * i + 1) / theta * (-1.0) ** i for i in range(size)], dtype=torch.float64)
    held = torch.linalg.matrix_exp(a)
    transition, entry = legendre_delay(size, theta)
    torch.testing.assert_close(transition, held, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entry, torch.linalg.solve(a, (held - torch.eye(size)) @ b), rtol=1e-12, atol=1e-12)


def test_the_memory_holds_the_last_theta_tokens():
    """Legendre polynomials of the memory, read at delay r θ, give back what came r θ tokens ago."""
    size, theta, length = 16, 60.0, 400
    signal = torch.sin(torch.arange(length, dtype=torch.float64) / 9) + 1
    transition, entry = legendre_delay(size, theta)
    kernel = orbit(transition, entry, length)
    memory = torch.stack([(kernel[:, : t + 1].flip(-1) * signal[: t + 1]).sum(-1) for t in range(200, length)])
    for share in (0.25, 0.5, 1.0):
        points = torch.tensor(2 * share - 1, dtype=torch.float64)
        read = memory @ torch.stack([torch.special.legendre_polynomial_p(points, degree) for degree in range(size)])
        # A held token stands half a token later than its sample.
        delayed = torch.sin((torch.arange(200, length) - share * theta + 0.5) / 9) + 1
        assert (read - delayed).abs().max() < 0.02


def test_powers_by_doubling_are_powers():
    matrix, start = draw(4, 4) / 3, draw(2, 4)
    wanted = [start]
    for _ in range(10):
        wanted.append(wanted[-1] @ matrix.mT)
    for length in (1, 2, 3, 8, 11):
        torch.testing.assert_close(orbit(matrix, start, length), torch.stack(wanted[:length], -1))


def test_half_precision_does_not_round_the_constants():
    layer = LegendreMemory(16, theta=500.0)
    before = layer.transition.clone()
    layer.bfloat16()
    assert layer.input.weight.dtype == torch.bfloat16
    assert layer.transition.dtype == torch.float32
    assert torch.equal(layer.transition, before)
    layer.double()
    assert torch.equal(layer.transition, legendre_delay(16, 500.0)[0])


class Model(nn.Module):
    """The authors' model before its head."""

    def __init__(self, spiking: bool) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(3, 4, spiking=spiking, dtype=torch.float64)
        self.block = LMUFormerBlock(4, ratio=2, spiking=spiking, dtype=torch.float64)

    def forward(self, x: Tensor, mask: Padding | None = None) -> Tensor:
        return self.block(self.embedding(x, mask=mask), mask=mask)


@pytest.mark.parametrize("name", ["plain", "spiking"])
def test_embedding_and_block_are_the_authors(name):
    kept = load_file(GOLDEN)
    model = Model(name == "spiking")
    weights = {key.removeprefix(f"{name}."): value for key, value in kept.items() if key.startswith(f"{name}.")}
    wanted, gradient = weights.pop("out"), weights.pop("grad_x")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [key for key in missing if "running" not in key and "num_batches" not in key]
    x = kept["x"].requires_grad_()
    found = model(x)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(found, x, kept["seed"])[0], gradient, rtol=1e-8, atol=1e-9)


def test_the_constants_are_the_authors():
    kept = load_file(GOLDEN)
    transition, entry = legendre_delay(12, 20.0)
    torch.testing.assert_close(transition, kept["transition"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(entry, kept["entry"], rtol=1e-11, atol=1e-12)


def trained(module: nn.Module, *inputs: Tensor) -> nn.Module:
    """With statistics of a batch, in eval mode."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for _ in range(30):
            module(*inputs)
    return module.eval()


@pytest.mark.parametrize("spiking", [False, True])
def test_a_block_steps_like_it_runs(spiking):
    x = draw(2, 30, 8)
    block = trained(LMUFormerBlock(8, theta=20.0, spiking=spiking, dtype=torch.float64), x)
    state, outputs = block.init_state(2), []
    for part in x.split([1, 1, 7, 1, 20], 1):
        out, state = block.step(part, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), block(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spiking", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(spiking, training):
    torch.manual_seed(0)
    x, lengths = draw(2, 25, 3), torch.tensor([25, 14])
    other = torch.where(torch.arange(25)[:, None] < lengths[:, None, None], x, 100 * draw(2, 25, 3))
    model = trained(Model(spiking), x).train(training)
    real = Padding(lengths).real(25)
    found, wanted = (model(given, Padding(lengths))[real] for given in (x, other))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    if not training:
        torch.testing.assert_close(found[25:], model(x[1:, :14])[0], rtol=1e-9, atol=1e-9)


def test_projections_of_the_spiking_block_multiply_zeros_and_ones():
    x = draw(2, 30, 8)
    block = trained(LMUFormerBlock(8, theta=20.0, spiking=True, dtype=torch.float64), x)
    seen = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
    block(x)
    assert len(seen) == 5
    for given in seen.values():
        assert ((given == 0) | (given == 1)).all()
        assert 0 < given.mean() < 1


def test_every_parameter_of_the_spiking_block_learns_by_surrogates():
    block = LMUFormerBlock(8, theta=20.0, spiking=True, dtype=torch.float64)
    (block(draw(2, 30, 8)) * draw(2, 30, 8)).sum().backward()
    # A bias before a batch normalisation is taken off again.
    silent = {"memory.input.bias", "memory.hidden.bias", "memory.output.bias", "mixer.widen.bias"}
    for name, parameter in block.named_parameters():
        assert (parameter.grad.abs().max() > 1e-9) == (name not in silent), name


def test_a_step_in_training_is_refused():
    for module in (LMUFormerBlock(8), SpikingLegendreMemory(8)):
        with pytest.raises(ValueError, match="step in training"):
            module.step(torch.randn(1, 1, 8), module.init_state(1))


def test_the_unit_is_refused_sizes_that_mean_nothing():
    with pytest.raises(ValueError, match="theta 0"):
        LegendreMemory(8, theta=0.0)
    with pytest.raises(ValueError, match="memory_size 0"):
        LegendreMemory(8, memory_size=0)
