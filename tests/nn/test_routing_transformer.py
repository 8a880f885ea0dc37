"""Routing attention is its port, equals its dense formula, and its centroids follow the tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn import RoutingAttention
from regard.ops import attention
from regard.ops.masks import Causal, Padding

GOLDEN = Path(__file__).parents[1] / "golden" / "routing_transformer.safetensors"


@pytest.fixture(scope="module")
def kept():
    return load_file(GOLDEN)


def port(kept, **options):
    """Query, key and value are parts of a token of width 24: two routing heads of width 4 beside four local ones."""
    layer = RoutingAttention(24, heads=6, local_heads=4, clusters=3, dtype=torch.float64, **options)
    layer.centroids.copy_(kept["means"])
    for part, projection in enumerate((layer.query, layer.key, layer.value)):
        torch.nn.init.zeros_(projection.weight)
        projection.weight.data[:, 8 * part : 8 * part + 8] = torch.eye(8)
    x = torch.cat([kept[name].transpose(1, 2).flatten(2) for name in "qkv"], dim=-1)
    return layer, x


def test_outputs_and_gradients_inside_clusters_are_the_ports(kept):
    layer, _ = port(kept)
    tensors = [kept[name].clone().requires_grad_() for name in "qkv"]
    out = layer.attend(*tensors)
    assert_close(out, kept["out"], rtol=1e-12, atol=1e-12)
    for name, grad in zip("qkv", torch.autograd.grad(out, tensors, kept["seed"]), strict=True):
        assert_close(grad, kept[f"grad.{name}"], rtol=1e-10, atol=1e-12)


def test_clusters_and_their_loss_are_the_ports(kept):
    layer, x = port(kept, decay=0.0)
    # The port takes the mean over queries and keys of unit length.
    assert_close(layer.commitment_loss(x), 2 * 4 * kept["loss"], rtol=1e-5, atol=0)
    layer.follow(kept["q"], kept["k"])
    # LayerNorm's ε leaves our tokens a little short of one length.
    assert_close(F.normalize(layer.centroids, dim=-1), kept["new_means"], rtol=1e-4, atol=1e-5)


def layer_of(**options):
    torch.manual_seed(0)
    return RoutingAttention(16, dtype=torch.float64, **{"heads": 4, "local_heads": 0, "clusters": 3, **options})


def formula(layer, x):
    """The paper's for one sequence, query by query."""
    length = len(x)
    query, key, value = (part[0] for part in layer.project(x[None], None, None, None))
    out = torch.zeros_like(value)
    for head in range(layer.routing_heads):
        means = F.normalize(layer.centroids[head], dim=-1)
        near_query, near_key = query[head] @ means.T, key[head] @ means.T
        size = -(-length // layer.clusters)
        for row in range(length):
            made = []
            for cluster in range(layer.clusters):
                if layer.causal:
                    mine, members = near_query[row].argmax() == cluster, near_key.argmax(-1) == cluster
                else:
                    mine = row in near_query[:, cluster].topk(size).indices
                    members = torch.zeros(length, dtype=torch.bool)
                    members[near_key[:, cluster].topk(size).indices] = True
                if layer.causal or layer.masked:
                    members = members & (torch.arange(length) <= row)
                if mine:
                    scores = key[head][members] @ query[head, row] * layer.head_dim**-0.5
                    made.append(scores.softmax(-1) @ value[head][members])
            if made:
                out[head, row] = torch.stack(made).mean(0)
    return layer.output(out.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("order", [{}, {"masked": True}, {"causal": True}])
@pytest.mark.parametrize("length", [1, 2, 14])
def test_output_equals_the_dense_formula(shared, order, length):
    layer = layer_of(shared=shared, **order).eval()
    x = torch.randn(2, length, 16, dtype=torch.float64)
    assert_close(layer(x), torch.stack([formula(layer, sample) for sample in x]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("order", [{}, {"masked": True}, {"masked": True, "shared": False}, {"causal": True}])
def test_the_size_of_clusters_follows_the_real_length(order):
    layer, lengths = layer_of(**order).eval(), [13, 7, 1, 0]
    x = torch.randn(4, 13, 16, dtype=torch.float64)
    out = layer(x, mask=Padding(torch.tensor(lengths)))
    for sample, length in enumerate(lengths):
        wanted = formula(layer, x[sample, :length]) if length else x[sample, :0]
        assert_close(out[sample, :length], wanted, rtol=1e-11, atol=1e-12)
        assert not out[sample, length:].any()


@pytest.mark.parametrize("order", [{}, {"masked": True}, {"causal": True}])
def test_one_cluster_is_full_attention_between_normalised_tokens(order):
    layer = layer_of(clusters=1, shared=False, **order).eval()
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    query, key, value = layer.project(x, None, None, None)
    assert_close(query.square().sum(-1), torch.full((2, 4, 11), 4.0, dtype=torch.float64), rtol=1e-3, atol=0)
    full = attention(query, key, value, mask=Causal() if order else None)
    assert_close(layer(x), layer.merge(full), rtol=1e-11, atol=1e-12)


def test_square_root_many_clusters_look_at_n_to_the_three_halves_pairs():
    layer, length = layer_of(clusters=16), 256
    query, key, _ = layer.project(torch.randn(1, length, 16, dtype=torch.float64), None, None, None)
    groups = layer.groups(query, key)
    assert groups.query.shape == groups.key.shape == (1, 4, 16, 16)
    assert groups.query.shape[2] * groups.query.shape[3] ** 2 == length**1.5


def test_masked_outputs_have_no_gradient_for_later_tokens_and_yet_depend_on_them():
    layer = layer_of(masked=True).eval()
    x = torch.randn(1, 16, 16, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[:, :10].square().sum(), x)
    assert grad[:, 10:].abs().max() == 0
    later = x.detach().clone()
    later[:, 10:] = torch.randn(1, 6, 16)
    assert not torch.equal(layer(later)[:, :10], layer(x)[:, :10])


def test_centroids_move_by_the_papers_rule_in_training_only():
    layer = layer_of(decay=0.9)
    x, before = torch.randn(2, 9, 16, dtype=torch.float64), layer.centroids.clone()
    layer.eval()(x)
    assert torch.equal(layer.centroids, before)
    query, key, _ = layer.project(x, None, None, None)
    wanted = 0.9 * before
    for tokens in (query, key):
        for head in range(4):
            nearest = (tokens[:, head] @ F.normalize(before[head], dim=-1).T).argmax(-1)
            for cluster in range(3):
                wanted[head, cluster] += 0.1 / 2 * tokens[:, head][nearest == cluster].sum(0).detach()
    out = layer.train()(x)
    assert_close(layer.centroids, wanted, rtol=1e-12, atol=1e-12)
    assert out.requires_grad
    assert not layer.centroids.requires_grad


def test_a_centroid_without_tokens_stays():
    layer = layer_of(clusters=2, decay=0.0)
    layer.centroids[:, 1] = -layer.centroids[:, 0]
    tokens = layer.centroids[:, :1].expand(1, -1, -1, -1)  # one token a head, on the first centroid
    far = layer.centroids[:, 1].clone()
    layer.follow(tokens.clone(), tokens.clone())
    assert torch.equal(layer.centroids[:, 1], far)


def test_padding_moves_no_centroid():
    layer, alone = layer_of(decay=0.5), layer_of(decay=0.5)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    x[1, 5:] = torch.inf
    query, key, _ = layer.project(x, None, None, None)
    layer.follow(query, key, Padding(torch.tensor([9, 5])))
    real = [torch.cat([part[0], part[1, :, :5]], dim=1)[None] for part in (query, key)]
    alone.follow(*real)
    assert_close(layer.centroids, alone.centroids, rtol=1e-12, atol=1e-12)


def test_training_gathers_tokens_of_two_kinds_around_two_centroids():
    layer = layer_of(clusters=2, heads=1, decay=0.8, shared=True)
    directions, noise = torch.randn(2, 16, dtype=torch.float64), torch.Generator().manual_seed(1)
    kinds = torch.arange(40) % 2
    query, _, _ = layer.project(directions[None], None, None, None)
    layer.centroids.copy_(query[0] + torch.randn(1, 2, 16, generator=noise, dtype=torch.float64))
    assert layer.similarities(query).amax(-1).max() < 0.9 * 16**0.5
    for _ in range(30):
        layer(directions[kinds] + 0.1 * torch.randn(1, 40, 16, generator=noise, dtype=torch.float64))
    query, _, _ = layer.project(directions[kinds][None], None, None, None)
    found = layer.similarities(query)
    assert torch.equal(found.argmax(-1)[0, 0] == found.argmax(-1)[0, 0, 0], kinds == 0)
    assert found.amax(-1).min() > 0.95 * 16**0.5


def test_centroids_stay_in_full_precision_in_a_half_type():
    layer = RoutingAttention(16, heads=4, dtype=torch.bfloat16)
    assert layer.query.weight.dtype == torch.bfloat16
    assert layer.centroids.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"local_heads": 4}, "local_heads 4 of heads 4"),
        ({"clusters": 0}, "clusters 0; give a positive number"),
        ({"decay": 1.5}, "decay 1.5"),
        ({"causal": True, "masked": True}, "masked=True with causal=True"),
        ({"position": "rotary", "local_heads": 0}, "position 'rotary' with local_heads 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"RoutingAttention: {message}"):
        RoutingAttention(16, heads=4, **arguments)
