"""CBAM is the authors' and timm's module, follows the paper's equations and adds no residual."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm_peer import CbamModule
from torch import Tensor, nn
from torch.testing import assert_close

from regard.nn.channel.cbam import CBAM

GOLDEN = Path(__file__).parents[1] / "golden" / "cbam.safetensors"
RESNET50 = {256: 3, 512: 4, 1024: 6, 2048: 3}
"""Blocks per number of channels."""
RESNET50_PARAMETERS = 25_557_032
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def feature_map(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def stirred(module: nn.Module) -> nn.Module:
    """Every parameter moved, also those that start at one or zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def as_timm(module: CBAM) -> dict[str, Tensor]:
    """Our parameters and buffers under timm's names and in its shapes."""
    renamed = {"shared.0": "channel.fc1", "shared.2": "channel.fc2"}
    renamed |= {"convolution": "spatial.conv.conv", "norm": "spatial.conv.bn"}
    state = {}
    for name, value in module.state_dict().items():
        layer, _, kind = name.rpartition(".")
        unit = layer.startswith("shared") and kind == "weight"
        state[f"{renamed[layer]}.{kind}"] = value[..., None, None] if unit else value
    return state


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("dim", "reduction", "kernel_size"), [(32, 16, 7), (24, 5, 3)])
def test_output_and_gradients_equal_timms(dim: int, reduction: int, kernel_size: int, training: bool) -> None:
    ours = stirred(CBAM(dim, reduction=reduction, kernel_size=kernel_size, dtype=torch.float64)).train(training)
    timms = CbamModule(
        dim, rd_channels=dim // reduction, spatial_kernel_size=kernel_size, mlp_bias=True, dtype=torch.float64
    ).train(training)
    timms.load_state_dict(as_timm(ours))
    x = feature_map(3, dim, 6, 5)
    out, expected = ours(x), timms(x)
    weights = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, *ours.parameters()), weights)
    wanted = torch.autograd.grad(expected, (x, *timms.parameters()), weights)
    assert_close(out, expected, **EXACT)
    for ours_gradient, timms_gradient in zip(found, wanted, strict=True):
        assert_close(ours_gradient, timms_gradient.view_as(ours_gradient), **EXACT)


def test_training_step_equals_the_authors_code() -> None:
    golden = load_file(GOLDEN)
    names = {"shared.0": "ChannelGate.mlp.1", "shared.2": "ChannelGate.mlp.3"}
    names |= {"convolution": "SpatialGate.spatial.conv", "norm": "SpatialGate.spatial.bn"}

    def authors(name: str, suffix: str = "") -> Tensor:
        layer, _, kind = name.rpartition(".")
        value = golden[f"{names[layer]}.{kind}{suffix}"]
        return value.flip(1) if layer == "convolution" else value

    module = CBAM(8, reduction=2, dtype=torch.float64)
    module.load_state_dict({name: authors(name) for name, _ in module.named_parameters()}, strict=False)
    x = golden["x"].requires_grad_()
    out = module(x)
    out.backward(golden["output_gradient"])
    assert_close(out, golden["output"], **EXACT)
    assert_close(x.grad, golden["x_gradient"], **EXACT)
    for name, parameter in module.named_parameters():
        assert_close(parameter.grad, authors(name, ".gradient"), **EXACT)
    for name, buffer in module.named_buffers():
        assert_close(buffer.double(), authors(name, ".after"), **EXACT)


@pytest.mark.parametrize("spatial", [True, False])
def test_output_follows_the_papers_equations(spatial: bool) -> None:
    module = stirred(CBAM(16, reduction=4, spatial=spatial, dtype=torch.float64)).eval()
    x = feature_map(2, 16, 5, 9)
    first, _, second = module.shared

    def perceptron(pooled: Tensor) -> Tensor:
        return (pooled @ first.weight.mT + first.bias).clamp(min=0) @ second.weight.mT + second.bias

    positions = x.flatten(2)
    channel = torch.sigmoid(perceptron(positions.mean(2)) + perceptron(positions.max(2).values))
    expected = channel[..., None, None] * x
    if spatial:
        pools = torch.stack([expected.mean(1), expected.max(1).values], 1)
        windows = nn.functional.unfold(pools, 7, padding=3)
        convolved = (module.convolution.weight.flatten() @ windows).view(2, 1, 5, 9)
        normal = convolved / (1 + module.norm.eps) ** 0.5 * module.norm.weight + module.norm.bias
        expected = torch.sigmoid(normal) * expected
    assert_close(module(x), expected, **EXACT)


def test_closed_gates_leave_nothing_of_the_input() -> None:
    module = CBAM(16, dtype=torch.float64).eval()
    nn.init.constant_(module.shared[2].bias, -50.0)
    out = module(feature_map(2, 16, 4, 4))
    assert out.abs().max() < 1e-20


def test_spatial_gate_of_a_position_sees_its_window_only() -> None:
    module = stirred(CBAM(16, kernel_size=3, dtype=torch.float64)).eval()
    x = feature_map(1, 16, 9, 9)
    (gradient,) = torch.autograd.grad(module.spatial_gate(x)[0, 0, 4, 5], x)
    seen = gradient[0].abs().sum(0) > 0
    assert seen[3:6, 4:7].all()
    assert seen.sum() == 9


def test_resnet50_has_the_papers_28_09_million_parameters() -> None:
    modules = [CBAM(dim, device="meta") for dim, blocks in RESNET50.items() for _ in range(blocks)]
    added = sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert round((RESNET50_PARAMETERS + added) / 1e6, 2) == 28.09


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 8}, "CBAM: reduction 16 leaves no hidden channel of dim 8; use one from 1 to 8"),
        ({"dim": 32, "reduction": 0}, "CBAM: reduction 0 leaves no hidden channel"),
        ({"dim": 32, "kernel_size": 4}, "CBAM: kernel_size 4 is not odd"),
        ({"dim": 32, "kernel_size": 3, "spatial": False}, "CBAM: kernel_size 3 with spatial=False"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CBAM(**arguments)
