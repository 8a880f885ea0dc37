"""Pointer attention is v·tanh(W_1 e + W_2 d), and its weights are a distribution that leaves out what was chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from regard.nn.scores.pointer import INITIAL, PointerAttention
from regard.ops.masks import Causal, Dense, Padding

DOUBLE = torch.float64


def layer(dim: int = 6, *, context_dim: int | None = 5, spread: float = 5.0, **options: object) -> PointerAttention:
    torch.manual_seed(0)
    made = PointerAttention(dim, context_dim=context_dim, dtype=DOUBLE, **options)
    with torch.no_grad():
        made.vector.mul_(spread / INITIAL)
        for weight in (made.query.weight, made.key.weight):
            weight.mul_(10.0)
    return made


def states(queries: int = 4, inputs: int = 7) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = (3, queries, 6), (3, inputs, 5)
    return tuple(torch.randn(*shape, generator=random, dtype=DOUBLE) for shape in shapes)


def scores_by_the_formula(pointer: PointerAttention, decoder: Tensor, inputs: Tensor) -> Tensor:
    """u_ij of the paper, pair by pair, for one head."""
    w_1, w_2, v = pointer.key.weight, pointer.query.weight, pointer.vector[0]
    return torch.stack(
        [
            torch.stack([torch.stack([v @ torch.tanh(w_1 @ e + w_2 @ d) for e in sample]) for d in asked])
            for asked, sample in zip(decoder, inputs, strict=True)
        ]
    )


def test_distribution_map_and_mix_follow_the_formula():
    pointer, (d, e) = layer(), states()
    u = scores_by_the_formula(pointer, d, e)
    assert u.std() > 1  # the case is not flat
    p = u.softmax(-1)
    assert_close(pointer.log_distribution(d, e), p.log(), rtol=1e-12, atol=1e-12)
    weights, _ = pointer.attention_map(d, e)
    assert_close(weights[:, 0], p, rtol=1e-12, atol=1e-12)
    assert_close(pointer(d, e), pointer.output(p @ pointer.value(e)), rtol=1e-12, atol=1e-12)


def test_gradients_of_the_distribution_follow_the_formula():
    pointer, (d, e) = layer(), states()
    learned = [pointer.query.weight, pointer.key.weight, pointer.vector]
    seed = torch.randn(3, 4, 7, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((pointer.log_distribution(d, e) * seed).sum(), learned)
    formula = (scores_by_the_formula(pointer, d, e).log_softmax(-1) * seed).sum()
    for one, other in zip(found, torch.autograd.grad(formula, learned), strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_several_heads_point_by_their_mean():
    pointer, (d, e) = layer(heads=3), states()
    weights, _ = pointer.attention_map(d, e)
    assert not torch.allclose(weights[:, 0], weights[:, 1])
    assert_close(pointer.log_distribution(d, e).exp(), weights.mean(1), rtol=1e-12, atol=1e-12)


def test_what_was_chosen_is_left_out_and_the_rest_keeps_its_proportions():
    pointer, (d, e) = layer(heads=2), states()
    chosen = torch.rand(3, 1, 4, 7, generator=torch.Generator().manual_seed(3)) < 0.4
    chosen[..., 0] = False
    found = pointer.log_distribution(d, e, mask=~Dense(chosen))
    assert torch.equal(found == -torch.inf, chosen[:, 0])
    by_head = pointer.attention_map(d, e)[0].masked_fill(chosen, 0.0)
    assert_close(found.exp(), (by_head / by_head.sum(-1, keepdim=True)).mean(1), rtol=1e-12, atol=1e-12)


def test_with_everything_chosen_nothing_is_probable_and_no_gradient_breaks():
    pointer, (d, e) = layer(heads=2), states()
    chosen = torch.zeros(3, 1, 4, 7, dtype=torch.bool)
    chosen[1, :, 2] = True
    found = pointer.log_distribution(d, e, mask=~Dense(chosen))
    assert (found[1, 2] == -torch.inf).all()
    found.masked_fill(found == -torch.inf, 0.0).sum().backward()
    learned = (pointer.query.weight, pointer.key.weight, pointer.vector)
    assert all(torch.isfinite(weight.grad).all() and weight.grad.abs().max() > 0 for weight in learned)


def test_padded_inputs_change_nothing():
    pointer, (d, e) = layer(), states()
    lengths = torch.tensor([7, 4, 2])
    found = pointer.log_distribution(d, e, mask=Padding(lengths))
    for sample, length in enumerate(lengths.tolist()):
        alone = pointer.log_distribution(d[sample : sample + 1], e[sample : sample + 1, :length])
        assert_close(found[sample, :, :length], alone[0], rtol=1e-12, atol=1e-12)


def test_causal_pointer_points_back():
    pointer = layer(context_dim=None, causal=True)
    x = states()[0]
    found = pointer.log_distribution(x)
    open_one = layer(context_dim=None)
    assert_close(found, open_one.log_distribution(x, mask=Causal()))
    assert torch.equal(found > -torch.inf, torch.ones(4, 4, dtype=torch.bool).tril().expand(3, 4, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_probabilities_of_hopeless_inputs_are_kept(dtype: torch.dtype):
    """Scores 400 apart: a probability would be 0 in float32, and its logarithm lost."""
    pointer = PointerAttention(4, dtype=dtype)
    with torch.no_grad():
        pointer.vector.fill_(50.0)
        pointer.key.weight.copy_(100 * torch.eye(4))
        pointer.query.weight.zero_()
    e = torch.stack([torch.ones(4), -torch.ones(4)])[None].to(dtype)
    found = pointer.log_distribution(e, e)
    assert found.dtype == torch.float32
    assert_close(found, torch.tensor([0.0, -400.0]).expand(1, 2, 2))


def test_there_are_as_many_classes_as_inputs_whatever_was_built():
    pointer = layer()
    parameters = sum(map(torch.numel, pointer.parameters()))
    for inputs in (1, 5, 50):
        d, e = states(inputs=inputs)
        assert_close(pointer.log_distribution(d, e).exp().sum(-1), torch.ones(3, 4, dtype=DOUBLE))
    assert sum(map(torch.numel, pointer.parameters())) == parameters


def test_weights_start_as_the_papers():
    pointer = PointerAttention(64, hidden_dim=256)
    for weight in (pointer.query.weight, pointer.key.weight, pointer.vector):
        assert 0.95 * INITIAL < weight.abs().max() <= INITIAL
        assert float(weight.detach().mean().abs()) < 0.02
    assert pointer.vector.shape == (1, 256)


def test_a_width_of_zero_is_refused():
    with pytest.raises(ValueError, match="PointerAttention: hidden_dim 0; give a positive width"):
        PointerAttention(8, hidden_dim=0)
