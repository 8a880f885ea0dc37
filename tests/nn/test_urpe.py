"""URPE attention is the authors' layer and the dense formula, and says what relative biases cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from regard.nn import MultiHeadAttention
from regard.nn.scores.urpe import URPEAttention
from regard.ops.biases import RelativeBias
from regard.ops.masks import Causal, Padding
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "urpe.safetensors"
AUTHORS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}


class OffsetBias(URPEAttention):
    """With the release's b: one per offset, like c."""

    def score_bias(self):
        return RelativeBias(self.offset_bias, self.max_distance)


def test_outputs_and_gradients_are_those_of_the_authors_layer():
    kept = load_file(GOLDEN)
    layer = OffsetBias(12, heads=3, position=None, max_distance=6, bias=True, dtype=torch.float64)
    layer.offset_bias = torch.nn.Parameter(kept["b"])
    projections = {
        f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in AUTHORS.items() for part in ("weight", "bias")
    }
    loaded = {ours: kept[f"weight.{theirs}"] for ours, theirs in projections.items()}
    layer.load_state_dict({**loaded, "factor": kept["c"], "offset_bias": kept["b"]})
    x, mask = kept["x"].requires_grad_(), Padding(kept["lengths"])
    out = layer(x, mask=mask)
    real = mask.real(7)
    assert_close(out[real], kept["out"][real], rtol=1e-12, atol=1e-12)
    names = {**projections, "factor": "c", "offset_bias": "b"}
    leaves = dict(layer.named_parameters())
    found = torch.autograd.grad(out, [x, *(leaves[name] for name in names)], kept["seed"])
    for name, gradient in zip(["x", *names.values()], found, strict=True):
        assert_close(
            gradient, kept[f"grad.{name}"], rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def dense(layer: URPEAttention, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """The paper's formula with the map as a matrix, every offset looked up by hand."""

    def heads(tensor):
        return tensor.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    query, key, value = heads(layer.query(x)), heads(layer.key(context)), heads(layer.value(context))
    queries, keys = x.shape[1], context.shape[1]
    offset = torch.arange(keys) - (torch.arange(queries) + keys - queries)[:, None]
    scores = query @ key.mT / layer.head_dim**0.5
    if layer.causal:
        scores = scores.masked_fill(offset > 0, -torch.inf)
    factor = layer.factor[:, offset.clamp(-layer.max_distance, layer.max_distance) + layer.max_distance]
    mixed = (scores.softmax(-1) * factor) @ value
    return layer.output(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sign", ["mixed", "positive", "zeros", "all zero"])
def test_output_and_gradients_equal_the_dense_formula(causal, sign):
    layer = URPEAttention(8, heads=2, causal=causal, position=None, max_distance=4, dtype=torch.float64)
    with torch.no_grad():
        layer.factor.normal_(std=3)
        if sign == "positive":
            layer.factor.abs_()
        if sign in ("zeros", "all zero"):
            layer.factor[:, ::2] = 0
        if sign == "all zero":
            layer.factor.zero_()
    x, context = torch.randn(2, 9, 8, dtype=torch.float64), torch.randn(2, 14, 8, dtype=torch.float64)
    for source in (x, context):
        ours, theirs = layer(x, source), dense(layer, x, source)
        assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
        parameters = list(layer.parameters())
        found, wanted = (torch.autograd.grad(out.sin().sum(), parameters) for out in (ours, theirs))
        for gradient, expected in zip(found, wanted, strict=True):
            assert_close(gradient, expected, rtol=1e-9, atol=1e-11)


def test_an_untrained_factor_leaves_relative_attention():
    layer = URPEAttention(16, heads=4, dtype=torch.float64)
    plain = MultiHeadAttention(16, heads=4, position="relative", dtype=torch.float64)
    plain.load_state_dict({name: value for name, value in layer.state_dict().items() if name != "factor"})
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


def test_buckets_are_those_of_t5():
    layer = URPEAttention(8, heads=2, position=None, buckets=8, max_distance=20, dtype=torch.float64)
    torch.nn.init.normal_(layer.factor)
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    table = RelativeBias(layer.factor, 20, None, True).dense(30, 30, batch=1, heads=2, device=x.device)
    weights, _ = layer.attention_map(x)
    layer.factor.data.fill_(1.0)
    assert_close(weights, layer.attention_map(x)[0] * table, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("position", ["relative", "alibi"])
def test_identical_tokens_come_out_by_their_place_which_no_relative_bias_can_do(position):
    """The paper's counterexample: a right stochastic map sends equal tokens to equal tokens."""
    x = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 20, 8)
    plain = MultiHeadAttention(8, heads=2, position=position, dtype=torch.float64)
    if position == "relative":
        torch.nn.init.normal_(plain.relative, std=5)
    out = plain(x)
    assert_close(out, out[:, :1].expand_as(out), rtol=1e-12, atol=1e-12)

    layer = URPEAttention(8, heads=2, position=None, dtype=torch.float64)
    with torch.no_grad():
        layer.factor[:, 129:] = 0  # only what stands before counts
    out, whole = layer(x), layer.output(layer.value(x[:, :1]))
    share = torch.arange(1, 21, dtype=torch.float64)[:, None] / 20
    assert_close(out, share * whole, rtol=1e-12, atol=1e-12)


def test_rows_sum_to_anything():
    layer = URPEAttention(8, heads=2, dtype=torch.float64)
    sums = torch.tensor([-2.0, 3.0], dtype=torch.float64)
    layer.factor.data.copy_(sums[:, None])
    weights, _ = layer.attention_map(torch.randn(1, 12, 8, dtype=torch.float64))
    assert_close(weights.sum(-1), sums[None, :, None].expand(1, 2, 12))


def test_dropout_drops_weights_of_the_product():
    """Values that are one-hot show the weights: each is 0 or 1 / (1 − p) times what it is in eval mode."""
    torch.manual_seed(0)
    layer = URPEAttention(16, heads=1, position=None, max_distance=5, dropout=0.4, dtype=torch.float64)
    torch.nn.init.normal_(layer.factor, std=2)
    query, key = torch.randn(2, 2, 1, 16, 16, dtype=torch.float64)
    value = torch.eye(16, dtype=torch.float64).expand(2, 1, 16, 16)
    weights = layer.eval().mix(query, key, value, Causal())
    dropped = layer.train().mix(query, key, value, Causal())
    kept = dropped.abs() > 1e-9
    assert_close(dropped, torch.where(kept, weights / 0.6, 0.0), rtol=1e-6, atol=1e-6)  # factors are float32
    assert 0.5 < kept.sum() / (weights.abs() > 1e-9).sum() < 0.7


def test_no_map_is_built():
    length = 4096
    layer, x = URPEAttention(16, heads=2), torch.randn(1, length, 16, requires_grad=True)
    assert peak_bytes(lambda: layer(x).sum().backward()) < length * length * 4 / 4


def test_a_distance_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"URPEAttention: max_distance 0; give a positive number"):
        URPEAttention(8, max_distance=0)
