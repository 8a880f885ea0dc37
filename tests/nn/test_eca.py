"""ECA is timm's, channel by channel local, and as small as the paper says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm_peer import EcaModule
from torch.testing import assert_close

from regard.nn.channel.eca import ECA, adaptive_kernel_size

RESNET50 = {256: 3, 512: 4, 1024: 6, 2048: 3}
"""Blocks per number of channels."""


def feature_map(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


@pytest.mark.parametrize("dim", [8, 96, 256])
def test_output_and_gradients_equal_timms(dim: int) -> None:
    ours, timms = ECA(dim, dtype=torch.float64), EcaModule(dim, dtype=torch.float64)
    ours.convolution.load_state_dict(timms.conv.state_dict())
    x = feature_map(2, dim, 5, 4)
    out, expected = ours(x), timms(x)
    weights = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, ours.convolution.weight), weights)
    wanted = torch.autograd.grad(expected, (x, timms.conv.weight), weights)
    assert_close((out, *found), (expected, *wanted), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=20)
@given(dim=st.integers(1, 40), half=st.integers(0, 25), height=st.integers(1, 4), width=st.integers(1, 4))
def test_gate_is_a_banded_matrix_times_the_channel_means(dim: int, half: int, height: int, width: int) -> None:
    module = ECA(dim, kernel_size=2 * half + 1, dtype=torch.float64)
    x = feature_map(2, dim, height, width)
    offset = torch.arange(dim) - torch.arange(dim)[:, None]
    kernel = module.convolution.weight[0, 0]
    band = torch.where(offset.abs() <= half, kernel[(offset + half).clamp(0, 2 * half)], 0.0)
    gate = torch.sigmoid(x.flatten(2).mean(2) @ band.mT)
    assert_close(module(x), gate[:, :, None, None] * x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [64, 256])
def test_gate_of_a_channel_sees_its_k_neighbours_only(dim: int) -> None:
    module, x = ECA(dim, dtype=torch.float64), feature_map(1, dim, 3, 3)
    middle = dim // 2
    (gradient,) = torch.autograd.grad(module.gate(x)[0, middle], x)
    seen = gradient[0].abs().sum((1, 2)).nonzero().flatten().tolist()
    reach = adaptive_kernel_size(dim) // 2
    assert seen == list(range(middle - reach, middle + reach + 1))


@pytest.mark.parametrize(("dim", "size"), [(16, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1024, 5), (2048, 7)])
def test_adaptive_kernel_size_is_the_papers(dim: int, size: int) -> None:
    assert adaptive_kernel_size(dim) == size


def test_adaptive_kernel_size_is_the_nearest_odd_number() -> None:
    for dim in range(1, 5000):
        exact = (torch.tensor(float(dim), dtype=torch.float64).log2().item() + 1) / 2
        nearest = min(range(1, 15, 2), key=lambda odd: (round(abs(odd - exact), 9), -odd))
        assert adaptive_kernel_size(dim) == nearest, dim


def test_parameters_are_the_kernel_alone() -> None:
    for dim in (32, 256, 2048):
        assert sum(parameter.numel() for parameter in ECA(dim).parameters()) == adaptive_kernel_size(dim)


def test_resnet50_takes_the_papers_80_parameters_with_its_released_kernel_sizes() -> None:
    released = dict(zip(RESNET50, (3, 5, 5, 7), strict=True))
    modules = [ECA(dim, kernel_size=released[dim]) for dim, blocks in RESNET50.items() for _ in range(blocks)]
    assert sum(parameter.numel() for module in modules for parameter in module.parameters()) == 80


@pytest.mark.parametrize("size", [0, 4, -3])
def test_kernel_size_must_be_odd_and_positive(size: int) -> None:
    with pytest.raises(ValueError, match=f"ECA: kernel_size {size} is not odd and positive; use an odd one"):
        ECA(64, kernel_size=size)
