"""Aaren against softmax attention of its one query over every prefix, and against the paper's recurrence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regard.nn import Aaren, MultiHeadAttention
from regard.ops.masks import Segments


def parts(layer: Aaren, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (batch, heads, length) and value heads, as the equations say."""

    def heads(tensor):
        return tensor.unflatten(-1, (layer.heads, -1)).transpose(-3, -2)

    query = heads(layer.query(layer.token)[None])
    return (heads(layer.key(x)) * query).sum(-1) / layer.head_dim**0.5, heads(layer.value(x))


def by_definition(layer: Aaren, x: Tensor) -> Tensor:
    """A softmax over the scores of every prefix."""
    score, value = parts(layer, x)
    mixed = [score[..., :end].softmax(-1).unsqueeze(-2) @ value[..., :end, :] for end in range(1, x.shape[1] + 1)]
    return layer.output(torch.cat(mixed, -2).transpose(1, 2).flatten(2))


def by_recurrence(layer: Aaren, x: Tensor) -> Tensor:
    """The paper's loop over a (weighted sum), c (sum) and m (maximum)."""
    score, value = parts(layer, x)
    a, c, m = torch.zeros_like(value[:, :, 0]), torch.zeros_like(score[..., 0]), torch.full_like(score[..., 0], -1e300)
    outputs = []
    for s, v in zip(score.unbind(-1), value.unbind(-2), strict=True):
        before, m = m, torch.maximum(m, s)
        a = a * (before - m).exp().unsqueeze(-1) + v * (s - m).exp().unsqueeze(-1)
        c = c * (before - m).exp() + (s - m).exp()
        outputs.append(a / c.unsqueeze(-1))
    return layer.output(torch.stack(outputs, 2).transpose(1, 2).flatten(2))


def assert_equal_with_gradients(layer: Aaren, x: Tensor, found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    leaves = [x, *layer.parameters()]
    gradients = [torch.autograd.grad(out.sin().sum(), leaves, materialize_grads=True) for out in (found, wanted)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("definition", [by_definition, by_recurrence])
@pytest.mark.parametrize(("length", "bias"), [(1, True), (2, False), (63, True), (100, False)])
def test_every_output_is_softmax_attention_over_its_prefix(definition, length, bias):
    layer = Aaren(24, heads=4, bias=bias, dtype=torch.float64)
    x = torch.randn(2, length, 24, dtype=torch.float64, requires_grad=True)
    assert_equal_with_gradients(layer, x, layer(x), definition(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_ten_thousand_either_way_are_softmax_too(dtype):
    layer = Aaren(8, heads=2, dtype=dtype)
    x = torch.randn(1, 40, 8, dtype=dtype)
    score = parts(layer, x)[0].abs().max().item()
    x = (x * (1e4 / score)).requires_grad_()
    assert parts(layer, x)[0].amin() < -5e3
    assert parts(layer, x)[0].amax() > 5e3
    found, wanted = layer(x), by_definition(layer, x)
    gradients = [torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for out in (found, wanted)]
    # A float32 near 1e4 is rounded to a thousandth, which is what its weight is off by.
    for a, b in ((found, wanted), gradients):
        scale = b.detach().abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=scale * (1e-2 if dtype == torch.float32 else 1e-10))
    for gradient in torch.autograd.grad(found.sum(), list(layer.parameters())):
        assert gradient.isfinite().all()


def test_a_sequence_after_one_with_huge_logits_starts_afresh():
    layer = Aaren(8, heads=2, dtype=torch.float64)
    first, second = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    packed = layer(torch.cat([1e6 * first, second], 1), mask=Segments.from_lengths([9, 9]))
    torch.testing.assert_close(packed[:, 9:], layer(second), rtol=1e-12, atol=1e-12)


def test_what_came_before_counts_as_a_set():
    layer = Aaren(16, heads=2, dtype=torch.float64)
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    moved = x[:, torch.randperm(20)]
    torch.testing.assert_close(layer(moved)[:, -1], layer(x)[:, -1], rtol=1e-12, atol=1e-12)


def test_it_has_a_transformers_parameters_and_one_token_more():
    """Section 4.5: 3 152 384 for a Transformer layer of width 512, 3 152 896 with Aaren in it."""

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    aaren, plain = Aaren(512, bias=True), MultiHeadAttention(512, bias=True)
    assert size(aaren) == size(plain) + 512
    whole = nn.TransformerEncoderLayer(512, nhead=8, dim_feedforward=2048)
    assert size(whole) == 3_152_384
    assert size(whole) - size(whole.self_attn) + size(aaren) == 3_152_896


def test_a_stack_is_fed_token_by_token_with_constant_memory():
    layers = nn.ModuleList(Aaren(16, heads=4, dtype=torch.float64) for _ in range(2))
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    states = [layer.init_state(1) for layer in layers]
    for position in range(12):
        token = x[:, position : position + 1]
        for index, layer in enumerate(layers):
            token, states[index] = layer.step(token, states[index])
        assert sum(known.numel() for state in states for known in state) == 2 * (16 + 2 * 4)
        torch.testing.assert_close(token[:, 0], layers[1](layers[0](x))[:, position], rtol=1e-12, atol=1e-12)
