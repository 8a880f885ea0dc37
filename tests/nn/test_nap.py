"""NAP is the release's formula, leaves the convex hull of the values, and does not care for scale or length."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn.heads.multi_head import MultiHeadAttention
from regard.nn.scores.nap import NormalizedAttentionPooling
from regard.ops.masks import Padding


def tokens(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def release(module: NormalizedAttentionPooling, x: Tensor, real: Tensor) -> Tensor:
    """The release's masked normalisation, with the mask as numbers as it has it."""
    query, key, value = (
        p(x).unflatten(-1, (module.heads, -1)).transpose(1, 2) for p in (module.query, module.key, module.value)
    )
    logits, mask = query @ key.mT, real[:, None, None, :]
    count = mask.sum(-1, keepdim=True)
    centred = (logits - (logits * mask).sum(-1, keepdim=True) / count) * mask
    deviation = ((centred**2).sum(-1, keepdim=True) / count).sqrt() + 0.001
    gain, bias = module.gain[:, None, None], module.shift[:, None, None]
    weights = (gain * centred / deviation + bias) * mask
    return module.output(F.gelu(module.norm((weights @ value).transpose(1, 2).flatten(2))))


def test_output_and_gradients_equal_the_releases_formula():
    module = NormalizedAttentionPooling(12, heads=3, dtype=torch.float64)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    x = tokens(2, 9, 12).requires_grad_()
    lengths = torch.tensor([9, 5])
    real = (torch.arange(9) < lengths[:, None]).double()
    outs = module(x, mask=Padding(lengths)), release(module, x, real)
    assert_close(*outs, rtol=1e-10, atol=1e-12)
    parameters = [parameter for name, parameter in module.named_parameters() if name != "key.bias"]
    found, wanted = (torch.autograd.grad(out.sin().sum(), [x, *parameters]) for out in outs)
    assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_gain_and_bias_start_at_one_and_zero():
    module = NormalizedAttentionPooling(8, heads=2)
    assert module.gain.tolist() == [1, 1]
    assert module.shift.tolist() == [0, 0]


def test_the_output_leaves_the_convex_hull_of_the_values():
    x = tokens(1, 9, 8)
    leaves = {}
    for module in (
        NormalizedAttentionPooling(8, heads=1, norm=False, gelu=False, bias=False, dtype=torch.float64),
        MultiHeadAttention(8, heads=1, dtype=torch.float64),
    ):
        weights, value = module.attention_map(x)
        mixed = weights @ value
        outside = (mixed > value.amax(-2, keepdim=True)) | (mixed < value.amin(-2, keepdim=True))
        leaves[type(module).__name__] = bool(outside.any())
    assert leaves == {"NormalizedAttentionPooling": True, "MultiHeadAttention": False}


def test_the_scale_of_the_scores_does_not_matter_where_softmax_saturates():
    module = NormalizedAttentionPooling(8, heads=2, dtype=torch.float64)
    weights = [module.attention_map(tokens(1, 9, 8, scale=scale))[0] for scale in (1.0, 100.0)]
    assert_close(*weights, rtol=0, atol=0.02)


@pytest.mark.parametrize("length", [8, 512])
def test_at_initialisation_a_row_neither_isolates_a_token_nor_averages_them_all(length):
    """The mass of a row, Σ |w|, grows with the length, and the largest share of it shrinks: no softmax of one token."""
    weights = NormalizedAttentionPooling(16, heads=2, dtype=torch.float64).attention_map(tokens(1, length, 16))[0]
    assert_close(weights.square().mean(-1).sqrt(), torch.ones(1, 2, length, dtype=torch.float64), rtol=0.05, atol=0)
    assert (weights.abs().amax(-1) / weights.abs().sum(-1)).median() < 4 / length**0.5


def test_float32_loses_no_more_at_a_steep_row_than_rounding_the_inputs_does():
    torch.manual_seed(1)  # a draw whose rows of two keys have nearly equal scores
    module = NormalizedAttentionPooling(32, heads=4, head_dim=6, bias=False, causal=True)
    x, seed = torch.randn(3, 2, 32), torch.randn(3, 2, 32)

    def gradient(module: NormalizedAttentionPooling, x: Tensor) -> Tensor:
        return torch.autograd.grad(module(x), module.query.weight, seed.to(x.dtype))[0].double()

    rounded, exact = gradient(module, x), gradient(module.double(), x.double())
    assert exact.norm() > 1e4
    moves = []
    for _ in range(4):
        nearby = copy.deepcopy(module)
        with torch.no_grad():
            for tensor in nearby.parameters():
                tensor.mul_(1 + 2**-24 * torch.empty_like(tensor).uniform_(-1, 1))
        moves.append((gradient(nearby, x.double()) - exact).norm())
    assert (rounded - exact).norm() < 4 * max(moves)
