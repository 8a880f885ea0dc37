"""Efficient attention is the authors' module, equals its n × n map and never builds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from regard.nn.linear.efficient_attention import EfficientAttention
from regard.ops.masks import Padding
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "efficient_attention.safetensors"
AUTHORS = {"query": "queries", "key": "keys", "value": "values", "output": "reprojection"}


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def dense(module: EfficientAttention, x: Tensor, length: int | None = None) -> Tensor:
    """The paper's formula for one sequence head by head, with the map as a matrix."""
    query, key, value = (
        projection(x).chunk(module.heads, dim=-1) for projection in (module.query, module.key, module.value)
    )
    mixed = []
    for one_query, one_key, one_value in zip(query, key, value, strict=True):
        over_positions = torch.zeros_like(one_key)
        over_positions[:length] = one_key[:length].exp() / one_key[:length].exp().sum(0)
        over_channels = one_query.exp() / one_query.exp().sum(1, keepdim=True)
        mixed.append((over_channels @ over_positions.mT) @ one_value)
    return x + module.output(torch.cat(mixed, dim=-1))


def test_output_and_gradients_equal_the_authors_code() -> None:
    golden = load_file(GOLDEN)
    module = EfficientAttention(6, heads=2, key_dim=8, value_dim=4, dtype=torch.float64)

    def authors(name: str, suffix: str = "") -> Tensor:
        layer, _, kind = name.rpartition(".")
        return golden[f"{AUTHORS[layer]}.{kind}{suffix}"].flatten(1 if kind == "weight" else 0)

    def as_tokens(feature_map: Tensor) -> Tensor:
        return feature_map.flatten(2).mT

    module.load_state_dict({name: authors(name) for name, _ in module.named_parameters()})
    x = as_tokens(golden["x"]).requires_grad_()
    out = module(x)
    out.backward(as_tokens(golden["output_gradient"]))
    assert_close(out, as_tokens(golden["output"]), rtol=1e-12, atol=1e-12)
    assert_close(x.grad, as_tokens(golden["x_gradient"]), rtol=1e-12, atol=1e-12)
    for name, parameter in module.named_parameters():
        assert_close(parameter.grad, authors(name, ".gradient"), rtol=1e-12, atol=1e-12)


def test_the_key_bias_left_out_has_no_effect_in_the_authors_code() -> None:
    golden = load_file(GOLDEN)
    assert golden["keys.bias"].abs().min() > 0
    assert golden["keys.bias.gradient"].abs().max() < 1e-14


@settings(deadline=None, max_examples=20)
@given(length=st.integers(1, 30), heads=st.integers(1, 3), key_width=st.integers(1, 5), value_width=st.integers(1, 5))
def test_output_equals_the_dense_formula(length: int, heads: int, key_width: int, value_width: int) -> None:
    module = EfficientAttention(
        7, heads=heads, key_dim=heads * key_width, value_dim=heads * value_width, dtype=torch.float64
    )
    x = tokens(2, length, 7)
    expected = torch.stack([dense(module, sample) for sample in x])
    assert_close(module(x), expected, rtol=1e-10, atol=1e-10)


def test_padding_takes_tokens_out_of_the_sums() -> None:
    module = EfficientAttention(8, heads=2, dtype=torch.float64)
    x, lengths = tokens(3, 9, 8), [9, 4, 0]
    out = module(x, mask=Padding(torch.tensor(lengths)))
    for sample, length in enumerate(lengths):
        assert_close(out[sample], dense(module, x[sample], length), rtol=1e-10, atol=1e-10)


def test_map_rows_are_distributions_though_there_is_no_softmax_over_keys() -> None:
    module = EfficientAttention(12, heads=3, residual=False, dtype=torch.float64)
    weights, _ = module.attention_map(5 * tokens(2, 11, 12))
    assert weights.min() >= 0
    assert_close(weights.sum(-1), torch.ones(2, 3, 11, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_map_has_no_more_rank_than_key_channels() -> None:
    module = EfficientAttention(12, heads=1, key_dim=3, residual=False, dtype=torch.float64)
    weights, _ = module.attention_map(tokens(1, 20, 12))
    assert torch.linalg.matrix_rank(weights[0, 0]) == 3


def test_one_key_channel_gives_every_token_the_same_vector() -> None:
    module = EfficientAttention(8, heads=2, key_dim=2, residual=False, dtype=torch.float64)
    out = module(tokens(1, 10, 8))
    assert_close(out, out[:, :1].expand_as(out), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", [None, Padding(torch.tensor([3000]))])
def test_peak_memory_is_far_below_one_map(mask: Padding | None) -> None:
    length = 4096
    module, x = EfficientAttention(16, heads=2), tokens(1, length, 16, dtype=torch.float32).requires_grad_()
    peak = peak_bytes(lambda: module(x, mask=mask).sum().backward())
    assert peak < length * length * x.element_size() / 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 3}, "heads 3 does not divide key_dim 8; change either"),
        ({"heads": 2, "value_dim": 5}, "heads 2 does not divide value_dim 5"),
        ({"heads": 0}, "heads 0"),
        ({"heads": 2, "key_dim": 0}, "key_dim 0; give a positive width"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"EfficientAttention: {message}"):
        EfficientAttention(8, **arguments)


def test_map_with_the_residual_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_map with residual=True.*residual=False"):
        EfficientAttention(8).attention_map(tokens(1, 4, 8))


def test_scaling_is_dot_product_attention_without_softmax():
    layer = EfficientAttention(12, heads=2, normalization="scaling", residual=False, dtype=torch.float64)
    x = torch.randn(2, 9, 12, dtype=torch.float64)

    def heads(tensor):
        return tensor.unflatten(-1, (2, 6)).transpose(1, 2)

    query, key, value = (heads(projection(x)) for projection in (layer.query, layer.key, layer.value))
    dense = layer.output((query @ key.mT @ value / 9).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), dense, rtol=1e-10, atol=1e-10)
    padded = layer(x, mask=Padding(torch.tensor([9, 4])))
    torch.testing.assert_close(padded[1:, :4], layer(x[1:, :4]), rtol=1e-10, atol=1e-10)
