"""Comparing a mechanism of ours with another implementation of it: outputs and the gradients of inputs and weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_same(
    ours: nn.Module,
    found: Tensor,
    wanted: Tensor,
    inputs: list[Tensor],
    weights: list[tuple[Tensor, Tensor]],
    tolerance: float = 1e-10,
) -> None:
    """`found` of ours against `wanted` of the peer, with the gradients of `inputs` and of weights (ours, peer's)."""
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    mine, theirs = [pair[0] for pair in weights], [pair[1] for pair in weights]
    seed = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
    ours_grads = torch.autograd.grad(found, [*inputs, *mine], seed)
    peer_grads = torch.autograd.grad(wanted, [*inputs, *theirs], seed)
    for ours_grad, peer_grad in zip(ours_grads, peer_grads, strict=True):
        torch.testing.assert_close(ours_grad, peer_grad, rtol=tolerance, atol=tolerance)
    # No weight of ours is left out of the comparison.
    assert {id(parameter) for parameter in ours.parameters()} == {id(parameter) for parameter in mine}


def copy_weights(weights: list[tuple[Tensor, Tensor]]) -> None:
    """Write the peer's weights into ours."""
    with torch.no_grad():
        for ours, peer in weights:
            ours.copy_(peer)
