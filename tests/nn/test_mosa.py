"""A mixture of sparse attention is the authors' layer, equals its dense formula, and costs the chosen tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from regard.nn import MixtureOfSparseAttention, MultiHeadAttention
from regard.ops.masks import Padding
from regard.ops.positions import rotary

GOLDEN = Path(__file__).parents[1] / "golden" / "mosa.safetensors"


@pytest.fixture(scope="module")
def kept():
    return load_file(GOLDEN)


def ours(tensors, kind):
    """The authors' tensors under our names: their dense heads hold query, key and value of a head side by side."""
    dense = tensors[f"{kind}.other_heads.W_QKV.weight"].unflatten(0, (2, 3, 4))
    return {
        "router.weight": tensors[f"{kind}.mosa_heads.r.0.weight"],
        "projections": tensors[f"{kind}.mosa_heads.QKV.W"],
        "output": tensors[f"{kind}.mosa_heads.O.W"],
        **{f"dense.{name}.weight": dense[:, i].flatten(0, 1) for i, name in enumerate(("query", "key", "value"))},
        "dense.output.weight": tensors[f"{kind}.other_heads.W_O.weight"],
    }


@pytest.mark.parametrize("case", ["plain", "first"])
def test_outputs_and_gradients_are_those_of_the_authors_layer(kept, case):
    options = {"heads": 3, "head_dim": 4, "dense_heads": 2, "sparsity": 4, "keep_first": case == "first"}
    layer = MixtureOfSparseAttention(8, masked=True, dtype=torch.float64, **options)
    layer.load_state_dict(ours(kept, f"{case}.weight"))
    x = kept[f"{case}.x"].clone().requires_grad_()
    out = layer(x)
    assert_close(out, kept[f"{case}.out"], rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out, [x, *layer.parameters()], kept[f"{case}.seed"])
    assert_close(found[0], kept[f"{case}.grad.x"], rtol=1e-10, atol=1e-12)
    wanted = ours(kept, f"{case}.grad")
    for (name, _), grad in zip(layer.named_parameters(), found[1:], strict=True):
        assert_close(grad, wanted[name], rtol=1e-10, atol=1e-12)


def layer_of(dim=16, **options):
    torch.manual_seed(0)
    layer = MixtureOfSparseAttention(dim, dtype=torch.float64, **{"heads": 4, "dense_heads": 0, **options})
    torch.nn.init.normal_(layer.router.weight)
    return layer


def formula(layer, x, positions=None):
    """The paper's, over all pairs of one sequence: what is not chosen is masked."""
    length = len(x)
    scores = (x @ layer.router.weight.T).sigmoid()
    count = min(max(length // layer.sparsity, 2), length)
    out = torch.zeros_like(x)
    for head in range(layer.heads):
        chosen = torch.zeros(length, dtype=torch.bool)
        order = scores[:, head].argsort(descending=True).tolist()
        if layer.keep_first:
            order = [0, *(token for token in order if token)]
        chosen[order[:count]] = True
        query, key, value = (x @ layer.projections[head]).chunk(3, dim=-1)
        if layer.rotary_dim:
            places = torch.arange(length) if positions is None else positions
            query, key = (rotary(each[None, None], places, rotary_dim=layer.rotary_dim)[0, 0] for each in (query, key))
        allowed = chosen[:, None] & chosen
        weights = (query @ key.T * layer.head_dim**-0.5).masked_fill(
            ~(allowed.tril() if layer.masked else allowed), -1e30
        )
        made = weights.softmax(-1) @ value @ layer.output[head]
        out = out + made * (scores[:, head] * chosen)[:, None]
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keep_first", [False, True])
@pytest.mark.parametrize(("length", "sparsity"), [(1, 4), (5, 4), (20, 3), (6, 1)])
def test_output_equals_the_dense_formula(masked, keep_first, length, sparsity):
    layer = layer_of(masked=masked, keep_first=keep_first, sparsity=sparsity)
    x = torch.randn(2, length, 16, dtype=torch.float64)
    wanted = torch.stack([formula(layer, sample) for sample in x])
    assert_close(layer(x), wanted, rtol=1e-11, atol=1e-12)


def test_positions_turn_the_chosen_tokens():
    layer, positions = layer_of(sparsity=2, rotary_fraction=1.0), torch.randint(100, (2, 9))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    wanted = torch.stack([formula(layer, *pair) for pair in zip(x, positions, strict=True)])
    assert_close(layer(x, positions=positions), wanted, rtol=1e-11, atol=1e-12)


def test_the_number_of_tokens_follows_the_real_length():
    layer = layer_of(sparsity=4, masked=True)
    x, lengths = torch.randn(4, 21, 16, dtype=torch.float64), [21, 13, 1, 0]
    chosen = layer.choose(x, Padding(torch.tensor(lengths)))
    assert chosen.counts.tolist() == [5, 3, 1, 0]
    out = layer(x, mask=Padding(torch.tensor(lengths)))
    for sample, length in enumerate(lengths):
        wanted = formula(layer, x[sample, :length])
        assert_close(out[sample], torch.cat([wanted, torch.zeros_like(x[sample, length:])]), rtol=1e-11, atol=1e-12)


def test_every_head_choosing_everything_is_multi_head_attention_weighed_by_the_router():
    layer = layer_of(sparsity=1, masked=True, rotary_fraction=1.0)
    torch.nn.init.zeros_(layer.router.weight)
    dense = MultiHeadAttention(16, heads=4, causal=True, position="rotary", dtype=torch.float64)
    query, key, value = (part.mT.flatten(0, 1) for part in layer.projections.detach().chunk(3, dim=-1))
    weights = {"query": query, "key": key, "value": value, "output": layer.output.detach().flatten(0, 1).T}
    dense.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    assert_close(layer(x), dense(x) / 2, rtol=1e-11, atol=1e-12)


def test_the_hybrid_is_the_sum_of_its_parts():
    layer = layer_of(sparsity=3, dense_heads=2, window=5, masked=True)
    x = torch.randn(2, 14, 16, dtype=torch.float64)
    chosen = torch.stack([formula(layer, sample) for sample in x])
    assert_close(layer(x), chosen + layer.dense(x), rtol=1e-11, atol=1e-12)
    later = x.clone()
    later[:, 5] += 1
    same = (layer.dense(later) - layer.dense(x)).abs().amax((0, 2)) < 1e-12
    assert same.tolist() == [not 5 <= token < 10 for token in range(14)]


def test_a_token_no_head_chooses_gets_nothing():
    layer = layer_of(sparsity=10)
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    chosen = torch.zeros(40, dtype=torch.bool)
    chosen[layer.choose(x).index.flatten()] = True
    assert chosen.sum() <= 16
    assert torch.equal(layer(x)[0].abs().amax(-1) > 0, chosen)


def test_masked_outputs_have_no_gradient_for_later_tokens_and_yet_depend_on_them():
    layer = layer_of(sparsity=4, masked=True)
    x = torch.randn(1, 16, 16, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[:, :10].square().sum(), x)
    assert grad[:, 10:].abs().max() == 0
    later = x.detach().clone()
    later[:, 10:] = 5 * layer.router.weight.detach().sum(0)  # every head now prefers these
    assert not torch.equal(layer(later)[:, :10], layer(x)[:, :10])


def test_projections_cost_the_chosen_tokens_and_the_router_all():
    """The paper's 8 h h' k + 2 h T a head; the counter does not know fused attention, 4 h' k² of k tokens."""
    length, dim, width, heads, sparsity = 256, 32, 8, 4, 8
    layer, count = MixtureOfSparseAttention(dim, heads=heads, sparsity=sparsity, dense_heads=0), length // sparsity
    x = torch.randn(1, length, dim)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        layer(x)
    assert counted.get_total_flops() == heads * (8 * dim * width * count + 2 * dim * length)
    assert all(part.shape == (1, heads, count, width) for part in layer.project(x, layer.choose(x)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0}, "sparsity 0; give 1 or more"),
        ({"dense_heads": -1}, "dense_heads -1; give 0 or more"),
        ({"window": 4, "dense_heads": 0}, "window 4 with dense_heads 0"),
        ({"rotary_fraction": 1.5}, "rotary_fraction 1.5"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"MixtureOfSparseAttention: {message}"):
        MixtureOfSparseAttention(16, heads=4, **arguments)
