"""multi_head, mqa and gqa: parity with torch and x-transformers, and what each paper claims."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from parity import assert_same, copy_weights

from regard.nn import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention
from regard.ops.masks import Padding
from regard.testing.checks.decoding import state_bytes

DIM, HEADS = 24, 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_multi_head_is_torchs_multi_head(causal, cross):
    x = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    context = torch.randn(2, 9 if not causal else 7, 20, dtype=torch.float64, requires_grad=True) if cross else None
    options = {"kdim": 20, "vdim": 20} if cross else {}
    peer = torch.nn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=torch.float64, **options)
    ours = MultiHeadAttention(
        DIM, heads=HEADS, causal=causal, bias=True, context_dim=20 if cross else None, dtype=torch.float64
    )
    if cross:
        projections = [peer.q_proj_weight, peer.k_proj_weight, peer.v_proj_weight]
    else:
        projections = list(peer.in_proj_weight.chunk(3))
    weights = [
        *zip((ours.query.weight, ours.key.weight, ours.value.weight), projections, strict=True),
        *zip((ours.query.bias, ours.key.bias, ours.value.bias), peer.in_proj_bias.chunk(3), strict=True),
        (ours.output.weight, peer.out_proj.weight),
        (ours.output.bias, peer.out_proj.bias),
    ]
    with torch.no_grad():
        peer.in_proj_bias.normal_()
    copy_weights(weights)
    source = x if context is None else context
    mask = torch.ones(7, source.shape[1], dtype=torch.bool).triu(1) if causal else None
    leaves = [parameter.detach().clone().requires_grad_() for _, parameter in weights]
    if cross:
        names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        packed = dict(zip(names, leaves[:3], strict=True))
    else:
        packed = {"in_proj_weight": torch.cat(leaves[:3])}
    packed |= {"in_proj_bias": torch.cat(leaves[3:6]), "out_proj.weight": leaves[6], "out_proj.bias": leaves[7]}
    wanted, _ = torch.func.functional_call(peer, packed, (x, source, source), {"attn_mask": mask})
    pairs = [(mine, leaf) for (mine, _), leaf in zip(weights, leaves, strict=True)]
    inputs = [x] if context is None else [x, context]
    assert_same(ours, ours(x, context), wanted, inputs, pairs)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_are_those_of_x_transformers(kv_heads, causal):
    peer_class = pytest.importorskip("x_transformers.x_transformers").Attention
    options = {"one_kv_head": True} if kv_heads == 1 else {"kv_heads": kv_heads}
    peer = peer_class(DIM, dim_head=6, heads=HEADS, causal=causal, **options).double()
    build = MultiQueryAttention if kv_heads == 1 else GroupedQueryAttention
    extra = {} if kv_heads == 1 else {"kv_heads": kv_heads}
    ours = build(DIM, heads=HEADS, causal=causal, dtype=torch.float64, **extra)
    leaves = [parameter.detach().clone().requires_grad_() for parameter in ours.parameters()]
    query, key, value, output = leaves

    def interleaved(weight):
        """Query heads of the peer go round the key heads; ours stand group by group."""
        return rearrange(weight, "(group member width) ... -> (member group width) ...", group=kv_heads, width=6)

    names = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight")
    weights = (interleaved(query), key, value, interleaved(output.T).T)
    x = torch.randn(2, 7, DIM, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(7) < torch.tensor([[5], [7]])
    wanted = torch.func.functional_call(peer, dict(zip(names, weights, strict=True)), (x,), {"mask": padding})
    found = ours(x, mask=Padding(torch.tensor([5, 7])))
    # The peer zeroes what stands at padding (what we put there means nothing), and its softmax is in float32.
    pairs = list(zip(ours.parameters(), leaves, strict=True))
    assert_same(ours, found * padding[..., None], wanted * padding[..., None], [x], pairs, tolerance=1e-5)


def test_sharing_one_key_head_divides_the_decoding_state_by_the_heads():
    def bytes_after(build, **options):
        layer = build(64, heads=8, causal=True, **options)
        with torch.no_grad():
            return state_bytes(layer.step(torch.randn(1, 64, 64), layer.init_state(1))[1])

    whole = bytes_after(MultiHeadAttention)
    assert bytes_after(MultiQueryAttention) * 8 == whole
    assert bytes_after(GroupedQueryAttention, kv_heads=2) * 4 == whole


def test_mean_pooling_averages_the_heads_of_a_group():
    layer = MultiHeadAttention(DIM, heads=4, bias=True)
    torch.nn.init.normal_(layer.key.bias)
    grouped = GroupedQueryAttention.from_multi_head(layer, 2)
    heads = layer.key.weight.view(4, 6, DIM)
    torch.testing.assert_close(grouped.key.weight.view(2, 6, DIM), torch.stack([heads[:2].mean(0), heads[2:].mean(0)]))
    torch.testing.assert_close(grouped.key.bias.view(2, 6), layer.key.bias.view(2, 2, 6).mean(1))
    assert torch.equal(grouped.query.weight, layer.query.weight)
    assert torch.equal(grouped.output.bias, layer.output.bias)


@pytest.mark.parametrize("position", [None, "rotary", "relative", "alibi"])
def test_conversion_is_exact_when_the_heads_of_a_group_agree(position):
    layer = MultiHeadAttention(DIM, heads=4, causal=True, position=position, head_dim=8)
    with torch.no_grad():
        for projection in (layer.key, layer.value):
            heads = projection.weight.view(2, 2, 8, DIM)
            heads[:, 1] = heads[:, 0]
    x = torch.randn(2, 9, DIM)
    torch.testing.assert_close(GroupedQueryAttention.from_multi_head(layer, 2)(x), layer(x))


def test_conversion_to_as_many_heads_changes_nothing():
    layer = MultiHeadAttention(DIM, heads=4)
    x = torch.randn(2, 9, DIM)
    assert torch.equal(GroupedQueryAttention.from_multi_head(layer, 4)(x), layer(x))


def test_conversion_names_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="kv_heads 3 does not divide heads 4"):
        GroupedQueryAttention.from_multi_head(MultiHeadAttention(DIM, heads=4), 3)


def test_head_dim_is_free_of_the_number_of_heads():
    layer = MultiHeadAttention(24, heads=5, head_dim=16)
    assert layer(torch.randn(1, 3, 24)).shape == (1, 3, 24)
    assert layer.query.weight.shape == (80, 24)


@pytest.mark.parametrize("position", ["rotary", "alibi", "relative"])
def test_positions_break_the_symmetry_between_tokens(position):
    layer = MultiHeadAttention(DIM, heads=4, position=position)
    x = torch.randn(1, 6, DIM)
    order = [3, 0, 4, 1, 5, 2]
    assert (layer(x[:, order]) - layer(x)[:, order]).abs().max() > 1e-4
