"""LSSA is the paper's two stages, needs no N × N tensor, and does not flatten as the sequence grows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from regard.nn.scores.lssa import LSSA
from regard.ops import attention_weights
from regard.ops.normalizers import SoftplusL1
from regard.testing.checks.memory import peak_bytes


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def paper(module: LSSA, x: Tensor, power: float | None) -> Tensor:
    """Both stages for one causal sequence, one row at a time."""
    width, heads = module.head_dim, []
    parts = zip(*(p(x).split(width, -1) for p in (module.query, module.key, module.value)), strict=True)
    for query, key, value in parts:
        rows = []
        for i in range(len(x)):
            n = i + 1
            cosine = key[:n] @ query[i] / (key[:n].norm(dim=-1) * query[i].norm())
            raw = (1 + (math.log(width) * math.log(n) * cosine).exp()).log()
            weights = raw / raw.sum()
            if power is not None:
                weights = (weights * n - (0 if n <= 3 else 1)).clamp(min=0) ** power
                weights = weights / (weights.sum() + 1e-12)
            rows.append(weights @ value[:n])
        heads.append(torch.stack(rows))
    return module.output(torch.cat(heads, -1))


@pytest.mark.parametrize("power", [None, 1.0, 3.0, 15.0])
def test_output_and_gradients_equal_the_papers_formula(power):
    module = LSSA(12, heads=2, causal=True, power=power, dtype=torch.float64)
    x = tokens(1, 20, 12).requires_grad_()
    outs = module(x)[0], paper(module, x[0], power)
    assert_close(*outs, rtol=1e-10, atol=1e-12)
    found, wanted = (torch.autograd.grad(out.sin().sum(), [x, *module.parameters()]) for out in outs)
    assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_weights_below_the_mean_are_dropped_and_the_rest_sums_to_one():
    scores = tokens(1, 1, 4, 50) * 3
    counts = torch.full((1, 1, 1, 1), 50)
    shares = SoftplusL1(None).weights(scores, counts)
    weights = SoftplusL1().weights(scores, counts)
    assert ((weights > 0) == (shares > 1 / 50)).all()
    assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)), rtol=1e-12, atol=0)


def test_a_large_power_leaves_the_largest_score_alone():
    weights = SoftplusL1(2000.0).weights(tokens(1, 1, 4, 50) * 3, torch.full((1, 1, 1, 1), 50))
    assert weights.amax(-1).min() > 0.99


def test_it_keeps_looking_at_what_matters_at_16_times_the_length():
    """One key fits the query, the others are noise: its weight shrinks with the length in softmax, not in LSSAR."""

    def weight(normalizer, length: int, scale: float) -> float:
        query, key = tokens(1, 64, 1, 16), tokens(1, 64, length, 16)
        query, key = query / query.norm(dim=-1, keepdim=True), key / key.norm(dim=-1, keepdim=True)
        key[:, :, :1] = query
        return attention_weights(query, key, normalizer=normalizer, scale=scale)[..., 0].mean().item()

    softmax = [weight("softmax", length, 8.0) for length in (64, 1024)]
    ours = [weight("softplus_l1", length, math.log(16)) for length in (64, 1024)]
    assert softmax[1] < softmax[0] / 2
    assert ours[1] > 0.9 * ours[0]


def test_identical_tokens_have_nothing_above_the_mean():
    module = LSSA(8, heads=2, causal=True)
    x = torch.ones(1, 6, 8, requires_grad=True)
    out = module(x)
    assert_close(out[:, :3], module.output(module.value(x))[:, :3])
    assert (out[:, 3:].abs() < 1e-6).all()
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.isfinite().all()


def test_no_n_by_n_tensor_forward_or_backward():
    length = 4096
    module, x = LSSA(8, heads=1, causal=True), tokens(1, length, 8, dtype=torch.float32).requires_grad_()
    assert peak_bytes(lambda: module(x).sum().backward()) < length * length
