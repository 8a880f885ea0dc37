"""Normalizers that are not softmax: their formulas, their extreme rows, and what they need to see."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from regard.ops import attention, attention_weights, explain
from regard.ops.masks import Causal, Dense, Padding
from regard.ops.normalizers import LayerNormScores, ReversedSoftmax, SoftplusL1

EVERY = ["sigmoid", "relu", "softplus_l1", SoftplusL1(None), SoftplusL1(3.0), "layer_norm_scores", "reversed"]
LONG = 65_536


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def engines(normalizer) -> list[str]:
    tensors = (torch.zeros(1, 1, 2, 2),) * 3
    return [name for name in ("reference", "tiled") if name not in explain(*tensors, normalizer=normalizer).refusals]


@pytest.mark.parametrize("spread", [1.0, 1e4, -1e4, "mixed"])
@pytest.mark.parametrize("normalizer", [*EVERY, ReversedSoftmax(1e-8)], ids=repr)
def test_rows_of_65536_with_logits_up_to_1e4_are_finite(normalizer, spread):
    key = draw(1, 1, LONG, 2, dtype=torch.float32)
    key = torch.full_like(key, 0.5) if isinstance(spread, float) and abs(spread) > 1 else key / key.abs().max()
    query = torch.full((1, 1, 3, 2), 1e4 if spread == "mixed" else spread)
    for engine in engines(normalizer):
        tensors = [tensor.clone().requires_grad_() for tensor in (query, key, key)]
        out = attention(*tensors, normalizer=normalizer, scale=1.0, backend=engine)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), tensors))


@pytest.mark.parametrize("normalizer", ["softplus_l1", SoftplusL1(None)], ids=repr)
def test_softplus_over_65536_keys_agrees_with_float64(normalizer):
    tensors = [draw(1, 1, n, 4) for n in (2, LONG, LONG)]
    exact = attention(*tensors, normalizer=normalizer, backend="reference")
    found = attention(*(t.float() for t in tensors), normalizer=normalizer, backend="tiled")
    assert_close(found.double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("normalizer", [*EVERY, ReversedSoftmax(1e-8)], ids=repr)
def test_masked_keys_empty_rows_and_single_keys(normalizer):
    allowed = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1]]).bool()
    tensors = [draw(1, 2, n, 3).requires_grad_() for n in (3, 4, 4)]
    weights = attention_weights(*tensors[:2], mask=Dense(allowed), normalizer=normalizer)
    assert (weights[..., ~allowed] == 0).all()
    assert weights.isfinite().all()
    out = attention(*tensors, mask=Dense(allowed), normalizer=normalizer, backend="reference")
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(grad.isfinite().all() for grad in grads)
    assert (out[:, :, 0] == 0).all()
    assert (grads[0][:, :, 0] == 0).all()
    assert (grads[2][:, :, 2] == 0).all()


@pytest.mark.parametrize("normalizer", [*EVERY[2:], ReversedSoftmax(1e-2)], ids=repr)
def test_gradients_are_those_of_the_formula(normalizer):
    tensors = tuple(draw(1, 2, n, 3).requires_grad_() for n in (5, 7, 7))
    for engine in engines(normalizer):
        assert torch.autograd.gradcheck(
            lambda *t, engine=engine: attention(*t, mask=Causal(), normalizer=normalizer, scale=2.0, backend=engine),
            tensors,
        )


def test_softplus_is_the_l1_norm_of_softplus_of_the_score_times_log_length():
    scores, counts = draw(3, 9), torch.full((3, 1), 9)
    raw = torch.nn.functional.softplus(scores * torch.tensor(9.0, dtype=torch.float64).log())
    assert_close(SoftplusL1(None).weights(scores, counts), raw / raw.sum(-1, keepdim=True), rtol=1e-12, atol=1e-14)


def test_softplus_power_below_one_is_refused():
    with pytest.raises(ValueError, match=r"power 0\.5; give at least 1"):
        SoftplusL1(0.5)


def test_layer_norm_rows_have_mean_zero_and_deviation_one_whatever_the_scale():
    query, key = draw(1, 2, 5, 4), draw(1, 2, 50, 4)
    for scale in (0.1, 1.0, 1e4):
        weights = attention_weights(query, key, normalizer=LayerNormScores(epsilon=0.0), scale=scale)
        assert_close(weights.mean(-1), torch.zeros(1, 2, 5, dtype=torch.float64), rtol=0, atol=1e-12)
        assert_close(weights.std(-1, correction=0), torch.ones(1, 2, 5, dtype=torch.float64), rtol=1e-12, atol=0)


def test_layer_norm_statistics_are_those_of_the_keys_in_sight():
    query, key = draw(1, 2, 5, 4), draw(1, 2, 9, 4)
    gain, bias = torch.tensor([2.0, 0.5]), torch.tensor([0.3, -1.0])
    normalizer = LayerNormScores(gain, bias)
    padded = attention_weights(query, key, mask=Padding(torch.tensor([6])), normalizer=normalizer)
    assert_close(padded[..., :6], attention_weights(query, key[:, :, :6], normalizer=normalizer))
    assert (padded[..., 6:] == 0).all()


def test_reversed_is_softmax_of_the_other_axis():
    query, key = draw(1, 2, 5, 4), draw(1, 2, 9, 4)
    found = attention_weights(query, key, normalizer="reversed")
    assert_close(found, (query @ key.mT / 2).softmax(-2))
    assert_close(found, attention_weights(key, query).mT)


def test_reversed_gives_zeros_to_a_key_nobody_may_look_at():
    allowed = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    weights = attention_weights(draw(1, 1, 2, 4), draw(1, 1, 3, 4), mask=Dense(allowed), normalizer="reversed")
    assert_close(weights.sum(-2)[0, 0], torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))


def test_reversed_with_epsilon_is_the_mean_slots_take_of_their_inputs():
    query, key = draw(1, 1, 3, 4), draw(1, 1, 9, 4)
    found = attention_weights(query, key, normalizer=ReversedSoftmax(1e-8))
    wanted = (query @ key.mT / 2).softmax(-2) + 1e-8
    assert_close(found, wanted / wanted.sum(-1, keepdim=True))


@pytest.mark.parametrize("normalizer", ["layer_norm_scores", "reversed"])
def test_what_needs_whole_rows_says_so(normalizer):
    tensors = (draw(1, 1, 3, 4),) * 3
    assert explain(*tensors, normalizer=normalizer).engine == "reference"
    with pytest.raises(ValueError, match="needs whole rows"):
        attention(*tensors, normalizer=normalizer, backend="tiled")
