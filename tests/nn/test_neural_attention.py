"""Neural attention is the authors' layer (golden), keeps no hidden values, and scores what no dot product can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from regard.nn.scores.neural_attention import NeuralAttention, NeuralScores
from regard.ops.attention import attention
from regard.ops.masks import Causal
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "neural_attention.safetensors"
AUTHORS = {
    "output.weight": "W_out.weight",
    "narrow_query.weight": "q_proj.weight",
    "narrow_query.bias": "q_proj.bias",
    "narrow_key.weight": "k_proj.weight",
    "narrow_key.bias": "k_proj.bias",
    "first.weight": "linear1.weight",
    "first.bias": "linear1.bias",
    "second.weight": "linear2.weight",
    "second.bias": "linear2.bias",
    "last.weight": "linear3.weight",
}


@pytest.mark.parametrize(("case", "width"), [("causal", 2), ("plain", 4)])
def test_output_and_gradients_are_those_of_the_authors_layer(case, width):
    kept = load_file(GOLDEN)

    def theirs(kind: str, name: str) -> torch.Tensor:
        if name in AUTHORS:
            return kept[f"{case}.{kind}.{AUTHORS[name]}"]
        # Their rows run over (feature, which of the three, head).
        rows = kept[f"{case}.{kind}.to_qkv.weight"].unflatten(0, (4, 3, 3))
        return rows[:, ("query", "key", "value").index(name.removesuffix(".weight"))].transpose(0, 1).flatten(0, 1)

    layer = NeuralAttention(12, heads=3, causal=case == "causal", projection_dim=width, dtype=torch.float64)
    leaves = dict(layer.named_parameters())
    layer.load_state_dict({name: theirs("weight", name) for name in leaves})
    x = kept[f"{case}.x"].requires_grad_()
    out = layer(x)
    assert_close(out, kept[f"{case}.out"], rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out, [x, *leaves.values()], kept[f"{case}.seed"])
    assert_close(found[0], kept[f"{case}.grad.x"], rtol=1e-11, atol=1e-12)
    for name, gradient in zip(leaves, found[1:], strict=True):
        assert_close(gradient, theirs("grad", name), rtol=1e-11, atol=1e-12)
    assert kept[f"{case}.grad.linear3.bias"].abs().max() < 1e-12  # why ours has none


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (6, 6), (5, 9), (9, 5)])
def test_a_tile_is_the_score_of_every_pair(queries, keys):
    bias = NeuralScores(
        torch.randn(2, 3, queries, 4), torch.randn(2, 3, keys, 4), torch.randn(2, 4), torch.randn(2), torch.randn(2)
    )
    sample, head = torch.arange(2).view(-1, 1, 1, 1), torch.arange(3).view(-1, 1, 1)
    pairs = bias.score(sample, head, torch.arange(keys - queries, keys).view(-1, 1), torch.arange(keys))
    assert_close(bias.dense(queries, keys, batch=2, heads=3, device=torch.device("cpu")), pairs)
    part = bias.tile((1, 2), (1, 3), (keys - 1, keys), (0, keys), torch.device("cpu"))
    assert_close(part, pairs[1:2, 1:3, -1:])


def test_tiles_give_outputs_and_gradients_of_the_whole_row():
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    leaves = [leaf(1, 2, 200, 4), leaf(1, 2, 200, 4), leaf(2, 4), leaf(2), leaf(2), leaf(1, 2, 200, 3)]
    nothing = torch.zeros(1, 2, 200, 1, dtype=torch.float64)
    results = []
    for backend in ("reference", "tiled"):
        bias = NeuralScores(*leaves[:5])
        out = attention(nothing, nothing, leaves[5], mask=Causal(), bias=bias, backend=backend)
        results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for tiled, whole in zip(results[1], results[0], strict=True):
        assert_close(tiled, whole, rtol=1e-9, atol=1e-11)


def test_scores_may_be_a_distance_which_no_dot_product_is():
    """s = −|q − k| puts every query on the key that equals it; the matrix of scores has full rank from width 1."""
    place = torch.arange(12, dtype=torch.float64).view(1, 1, 12, 1)
    both = torch.tensor([1.0, -1.0], dtype=torch.float64)
    eye, zero, minus = torch.eye(2).double(), torch.zeros(2).double(), -torch.ones(2).double()
    scores = NeuralScores(place * both, -place * both, eye, zero, minus).dense(
        12, 12, batch=1, heads=1, device=place.device
    )[0, 0]
    assert_close(scores, -(place - place.mT)[0, 0].abs())
    assert torch.linalg.matrix_rank(scores) == 12
    assert torch.equal(scores.argmax(-1), torch.arange(12))


def test_two_hidden_layers_contain_one():
    """The formula w_a · ReLU(W_h [q; k] + b_h), up to a constant that the softmax takes off."""
    query, key = torch.randn(1, 1, 5, 4, dtype=torch.float64), torch.randn(1, 1, 7, 4, dtype=torch.float64)
    outer = torch.randn(4, dtype=torch.float64)
    weight = torch.stack([outer, torch.zeros(4, dtype=torch.float64)])
    bias, last = torch.tensor([100.0, 0.0]).double(), torch.tensor([1.0, 1.0]).double()
    found = NeuralScores(query, key, weight, bias, last).dense(5, 7, batch=1, heads=1, device=query.device)
    assert_close(found - 100, torch.relu(query[:, :, :, None] + key[:, :, None]) @ outer)


@pytest.mark.parametrize(("width", "dead"), [(2, 0.2), (4, 0.02)])
def test_the_network_seldom_starts_without_a_gradient(width, dead):
    """With torch's own start of the second layer more than `dead` of the networks do, with ours almost none."""

    def silent(layer: NeuralAttention) -> bool:
        out = layer(torch.randn(1, 16, 32))
        return not torch.autograd.grad(out.square().sum(), layer.first.weight)[0].any()

    torch.manual_seed(0)
    layers = [NeuralAttention(32, heads=1, projection_dim=width) for _ in range(100)]
    ours = [silent(layer) for layer in layers]
    for layer in layers:
        layer.second.reset_parameters()
    theirs = [silent(layer) for layer in layers]
    assert sum(ours) <= 3
    assert sum(theirs) > 100 * dead


def test_hidden_values_are_never_kept():
    """The memory claim: less than the maps of its two heads, let alone their n × n × d' hidden values."""
    length = 2048
    layer, x = NeuralAttention(16, heads=2, projection_dim=8), torch.randn(1, length, 16, requires_grad=True)
    assert peak_bytes(lambda: layer(x).sum().backward()) < 4 * length * length * 2


def test_a_width_of_one_is_refused():
    with pytest.raises(ValueError, match=r"NeuralAttention: projection_dim 1; give at least 2"):
        NeuralAttention(8, projection_dim=1)
