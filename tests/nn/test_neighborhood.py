"""The neighbourhood module against NATTEN's and its own claims; the operator is tested in tests/ops."""

from __future__ import annotations

import pytest
import torch

from regard.nn import MultiHeadAttention, NeighborhoodAttention


@pytest.mark.parametrize(
    ("axes", "grid", "options"),
    [
        (1, (13,), {"kernel_size": 5}),
        (2, (9, 8), {"kernel_size": 3, "dilation": 2}),
        (2, (9, 8), {"kernel_size": (3, 5), "stride": (2, 3)}),
        (3, (4, 5, 3), {"kernel_size": 3}),
    ],
)
def test_the_module_is_nattens(axes, grid, options):
    natten = pytest.importorskip("natten")
    peer_class = getattr(natten, f"NeighborhoodAttention{axes}D")
    torch.manual_seed(0)
    peer = peer_class(embed_dim=32, num_heads=2, **options)
    ours = NeighborhoodAttention(32, heads=2, axes=axes, relative_bias=False, **options)
    ours.load_state_dict(
        {
            "qkv.weight": peer.qkv.weight,
            "qkv.bias": peer.qkv.bias,
            "output.weight": peer.proj.weight,
            "output.bias": peer.proj.bias,
        }
    )
    x = torch.randn(2, *grid, 32)
    with torch.no_grad():
        # NATTEN on a CPU computes in another order, in float32, and has no backward.
        torch.testing.assert_close(ours(x), peer(x), rtol=1e-4, atol=1e-5)


def test_a_kernel_as_large_as_the_grid_is_full_attention():
    ours = NeighborhoodAttention(16, heads=2, kernel_size=5, relative_bias=False, dtype=torch.float64)
    full = MultiHeadAttention(16, heads=2, bias=True, dtype=torch.float64)
    query, key, value = ours.qkv.weight.chunk(3)
    full.load_state_dict(
        {
            "query.weight": query,
            "key.weight": key,
            "value.weight": value,
            **{f"{name}.bias": torch.zeros(16) for name in ("query", "key", "value")},
            "output.weight": ours.output.weight,
            "output.bias": ours.output.bias,
        }
    )
    x = torch.randn(2, 5, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), full(x.flatten(1, 2)).view(2, 5, 5, 16))


def test_every_position_sees_as_many_neighbours_even_in_a_corner():
    layer = NeighborhoodAttention(8, heads=2, kernel_size=3)
    x = torch.randn(1, 6, 6, 8, requires_grad=True)
    for place in ((0, 0), (0, 3), (3, 3), (5, 5)):
        (grad,) = torch.autograd.grad(layer(x)[0][place].sum(), x)
        assert (grad[0].abs().sum(-1) > 0).sum() == 9


def test_the_relative_bias_has_an_entry_per_head_and_offset():
    layer = NeighborhoodAttention(8, heads=2, kernel_size=(3, 5))
    assert layer.relative.shape == (2, 5, 9)


@pytest.mark.parametrize("kernel_size", [4, (3, 3, 3), (3, 0)])
def test_a_kernel_that_does_not_fit_is_refused(kernel_size):
    with pytest.raises(ValueError, match="kernel_size"):
        NeighborhoodAttention(8, heads=2, kernel_size=kernel_size)
