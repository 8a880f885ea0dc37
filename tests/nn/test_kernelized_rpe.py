"""Kernelized attention with relative positions is its dense formula, approaches softmax's and never builds either."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn import KernelizedRPEAttention
from regard.nn.linear import kernelized_rpe
from regard.ops import attention_weights, linear_attention
from regard.ops.biases import RelativeBias
from regard.ops.masks import Causal, Padding
from regard.testing.checks.memory import peak_bytes

OPTIONS = [
    {"causal": causal, **more}
    for causal in (False, True)
    for more in (
        {"max_distance": 200},
        {"max_distance": 3, "features": 11, "bias": True},
        {"max_distance": 30, "buckets": 8, "orthogonal": True, "features": 20},
    )
]


@pytest.fixture(autouse=True, params=[0, 512], ids=["by transforms", "written out"])
def few_keys(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute, at any length."""
    monkeypatch.setattr(kernelized_rpe, "FEW_KEYS", request.param)


def layer_of(dim: int = 12, heads: int = 3, dtype: torch.dtype = torch.float64, **options) -> KernelizedRPEAttention:
    torch.manual_seed(0)
    layer = KernelizedRPEAttention(dim, heads=heads, dtype=dtype, **options)
    torch.nn.init.normal_(layer.offsets)
    return layer


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def heads_of(layer: KernelizedRPEAttention, x: Tensor) -> list[Tensor]:
    return [part(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (layer.query, layer.key, layer.value)]


def dense(layer: KernelizedRPEAttention, x: Tensor) -> Tensor:
    """The paper's formula with all its matrices."""
    query, key, value = heads_of(layer, x)
    features = [
        (-0.5 + F.normalize(tensor, dim=-1) @ layer.directions.T).exp() / len(layer.directions) ** 0.5
        for tensor in (query, key)
    ]
    index = torch.arange(x.shape[1])
    bias = layer.relative_bias().score(index, torch.arange(layer.heads)[:, None, None], index[:, None], index)
    weights = features[0] @ features[1].mT * bias.exp()
    weights = weights.tril() if layer.causal else weights
    mixed = weights @ value / weights.sum(-1, keepdim=True)
    return layer.output(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 37, 150])
def test_output_and_gradients_are_those_of_the_dense_formula(length, options):
    layer, x = layer_of(**options), tokens(2, length, 12).requires_grad_()
    found, wanted, leaves = layer(x), dense(layer, x), [x, *layer.parameters()]
    assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)), strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_weights_approach_softmax_over_cosines_and_bias(causal):
    """The features are unbiased: with many of them the map is that of exact attention."""
    layer, x = layer_of(features=40_000, max_distance=20, causal=causal), tokens(1, 20, 12)
    query, key, _ = (F.normalize(tensor, dim=-1) for tensor in heads_of(layer, x))
    bias, mask = RelativeBias(layer.offsets, 20), Causal() if causal else None
    exact = attention_weights(query, key, bias=bias, mask=mask, scale=1.0)
    assert (layer.attention_map(x)[0] - exact).abs().max() < 0.02
    few = layer_of(features=4, max_distance=20, causal=causal).attention_map(x)[0]
    assert (few - exact).abs().max() > 0.05


def test_without_a_bias_it_is_linear_attention_of_the_features():
    for causal in (False, True):
        layer, x = layer_of(causal=causal, features=7), tokens(2, 30, 12)
        torch.nn.init.constant_(layer.offsets, 3.0)
        query, key, value = heads_of(layer, x)
        query, key = ((F.normalize(tensor, dim=-1) @ layer.directions.T).exp() for tensor in (query, key))
        mixed = linear_attention(query, key, value, causal=causal, normalize=True)
        assert_close(layer(x), layer.output(mixed.transpose(1, 2).flatten(2)), rtol=1e-10, atol=1e-10)


def test_the_size_of_queries_and_keys_does_not_matter():
    """The claim: normalised, the features have the same variance however far training drives the projections."""
    layer, x = layer_of(causal=True), tokens(1, 25, 12)
    before = layer(x)
    with torch.no_grad():
        layer.query.weight.mul_(1e4)
        layer.key.weight.mul_(1e4)
    assert_close(layer(x), before, rtol=1e-10, atol=1e-10)


def test_padding_takes_keys_out_of_both_sums():
    layer, x = layer_of(), tokens(3, 12, 12)
    out = layer(x, mask=Padding(torch.tensor([12, 5, 0])))
    for sample, length in enumerate((12, 5)):
        assert_close(out[sample, :length], dense(layer, x[sample : sample + 1, :length])[0], rtol=1e-10, atol=1e-10)
    assert (out[2] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_float32_is_accurate_from_the_first_token_on(causal):
    """One transform over all tokens would be off by a thousandth in the first ones of a causal sequence."""
    layer, x = layer_of(12, 1, torch.float32, features=8, causal=causal), tokens(1, 8192, 12, dtype=torch.float32)
    with torch.no_grad():
        single, exact = layer(x), layer.double()(x.double())
    assert ((single - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 2e-5


@pytest.mark.parametrize("causal", [False, True])
def test_biases_and_scores_of_any_size_stay_finite(causal):
    layer = layer_of(dtype=torch.float32, causal=causal, max_distance=5)
    x = (1e4 * tokens(1, 20, 12, dtype=torch.float32)).requires_grad_()
    for size in (1e4, -1e4):
        torch.nn.init.constant_(layer.offsets, size)
        with torch.no_grad():
            layer.offsets[:, ::2] = 0.0
        out = layer(x)
        assert out.isfinite().all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), [x, *layer.parameters()]))


def test_orthogonal_features_are_orthogonal_and_as_long_as_gaussian_ones():
    torch.manual_seed(0)
    layer = KernelizedRPEAttention(64, heads=2, features=200 * 32 + 5, orthogonal=True, dtype=torch.float64)
    block = layer.directions[:32] @ layer.directions[:32].T
    assert_close(block, torch.diag(block.diagonal()), rtol=0, atol=1e-10)
    squares = layer.directions.square().sum(-1)
    assert squares.mean().item() == pytest.approx(32, rel=0.02)
    assert squares.var().item() == pytest.approx(64, rel=0.1)


def test_redraw_changes_the_features_and_nothing_else():
    layer = layer_of()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.redraw()
    changed = [name for name, tensor in layer.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["directions"]


@pytest.mark.parametrize("causal", [False, True])
def test_peak_memory_is_below_one_map_for_any_number_of_features(causal):
    x = tokens(1, 4096, 16, dtype=torch.float32).requires_grad_()

    def peak(features: int) -> int:
        layer = layer_of(16, 1, torch.float32, features=features, causal=causal)
        return peak_bytes(lambda: layer(x).sum().backward())

    few, many = peak(8), peak(32)
    assert few < 4096**2 * 4 / 2
    assert many < 1.3 * few


def test_prompts_and_tokens_go_on_from_one_state():
    layer, x = layer_of(causal=True, features=9, max_distance=6), tokens(2, 40, 12)
    state, outputs = layer.init_state(2), []
    with torch.no_grad():
        for piece in x.split([21, 1, 1, 5, 12], dim=1):
            out, state = layer.step(piece, state)
            outputs.append(out)
    assert_close(torch.cat(outputs, 1), dense(layer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "KernelizedRPEAttention: features 0; give a positive number"),
        ({"max_distance": 0}, "KernelizedRPEAttention: max_distance 0"),
        ({"buckets": 600}, "RelativeBias: 300 buckets a direction with max_distance 128"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        KernelizedRPEAttention(12, heads=3, **options)
