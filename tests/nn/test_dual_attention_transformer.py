"""Dual attention is the authors' layer, keeps relations apart from what tokens are like, and holds none of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from regard.nn import DualAttention
from regard.ops.masks import Dense, Segments
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "dual_attention_transformer.safetensors"
NAMES = {
    "value": "d.self_attention.wv.weight",
    "output": "d.self_attention.wo.weight",
    "symbol_value": "d.relational_attention.wv.weight",
    "relational_output": "d.relational_attention.wo.weight",
    "relation_query": "d.relational_attention.wq_rel.weight",
    "relation_key": "d.relational_attention.wk_rel.weight",
    "symbol_query": "s.q_proj.weight",
}


def ours(tensors):
    """The authors' tensors under our names: theirs has queries and keys for each kind of head."""
    named = {f"{name}.weight": tensors[theirs] for name, theirs in NAMES.items() if theirs in tensors}
    for name, theirs in (("query", "wq"), ("key", "wk")):
        halves = tensors[f"d.self_attention.{theirs}.weight"], tensors[f"d.relational_attention.{theirs}_attn.weight"]
        named[f"{name}.weight"] = torch.cat(halves)
    named["relation_value"] = tensors["d.relational_attention.wr"]
    libraries = ("s.symbol_library", "s.symbol_library.weight", "s.rel_pos_enc.rel_pos_embeddings")
    named["library"] = next(tensors[name] for name in libraries if name in tensors)
    if "s.template_features" in tensors:
        named |= {"templates": tensors["s.template_features"], "symbol_query.bias": tensors["s.q_proj.bias"]}
    return named


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("attention", {"library_size": 5}),
        ("positional", {"library_size": 8, "symmetric": True, "relations": 3, "causal": True}),
        ("relative", {"library_size": 7, "causal": True}),
    ],
)
def test_outputs_and_gradients_are_those_of_the_authors_layer(case, options):
    kept = {name.removeprefix(f"{case}."): tensor for name, tensor in load_file(GOLDEN).items()}
    weights, grads = (
        ours({name.removeprefix(kind): value for name, value in kept.items() if name.startswith(kind)})
        for kind in ("weight.", "grad.")
    )
    layer = DualAttention(12, heads=4, symbols=case, dtype=torch.float64, **options)
    if options.get("symmetric"):
        weights["relation_key.weight"] = weights["relation_query.weight"]
    layer.load_state_dict(weights)
    x = kept["x"].requires_grad_()
    out = layer(x)
    assert_close(out, kept["out"], rtol=1e-12, atol=1e-12)
    names = [name for name, _ in layer.named_parameters()]
    found = torch.autograd.grad(out, [x, *layer.parameters()], kept["seed"])
    assert_close(found[0], kept["grad.x"], rtol=1e-10, atol=1e-12)
    for name, grad in zip(names, found[1:], strict=True):
        assert_close(grad, grads[name], rtol=1e-10, atol=1e-12)


def layer_of(**options):
    torch.manual_seed(0)
    return DualAttention(32, heads=4, dtype=torch.float64, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("symbols", ["attention", "positional", "relative"])
def test_relational_heads_equal_the_dense_formula_over_pairs(causal, symbols):
    """With rotary positions, which turn what the weights are made of and no relation."""
    layer = layer_of(
        causal=causal, symbols=symbols, library_size=21, relational_heads=3, relations=4, position="rotary"
    )
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    query, key, _ = layer.project(x, None, None, None)
    scores = (query @ key.mT)[0, 1:] / 8**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    left, right = (side(x)[0].unflatten(-1, (4, 6)) for side in (layer.relation_query, layer.relation_key))
    relations = torch.einsum("ilp,jlp->ijl", left, right) / 6**0.5
    if symbols == "attention":
        asked = layer.symbol_query(x)[0].unflatten(-1, (4, 8)).transpose(0, 1)
        library, templates = (kept.unflatten(-1, (4, 8)).transpose(0, 1) for kept in (layer.library, layer.templates))
        read = (asked @ templates.mT / 8**0.5).softmax(-1) @ library
        tags = read.transpose(0, 1).flatten(1).expand(9, 9, 32)
    elif symbols == "positional":
        tags = layer.library[:9].expand(9, 9, 32)
    else:
        tags = layer.library[10 + torch.arange(9) - torch.arange(9)[:, None]]
    tags = layer.symbol_value(tags).unflatten(-1, (3, 8))
    values = torch.einsum("ijl,hdl->ijhd", relations, layer.relation_value) + tags
    read = torch.einsum("hij,ijhd->ihd", scores.softmax(-1), values).flatten(1)
    assert_close(layer(x)[0, :, 8:], read @ layer.relational_output.weight.T, rtol=1e-10, atol=1e-10)


def test_a_relational_half_sees_tokens_through_relations_only():
    """Where queries, relations and symbols cannot tell two inputs apart, neither can it; the sensory half can."""
    layer = layer_of(symbols="positional", library_size=20)
    blind = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0][:, :1]
    with torch.no_grad():
        for linear in (layer.query, layer.key, layer.relation_query, layer.relation_key):
            linear.weight -= linear.weight @ blind @ blind.T
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    moved = x + torch.randn(1, 9, 1, dtype=torch.float64) * blind.T
    assert_close(layer(moved)[..., 16:], layer(x)[..., 16:])
    assert (layer(moved)[..., :16] - layer(x)[..., :16]).abs().max() > 0.1


def test_symmetric_relations_are_symmetric_and_save_a_projection():
    layers = {symmetric: layer_of(symmetric=symmetric) for symmetric in (False, True)}
    counts = {symmetric: sum(p.numel() for p in layer.parameters()) for symmetric, layer in layers.items()}
    assert counts[False] - counts[True] == 32 * 16
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    for symmetric, layer in layers.items():
        weights, _ = layer.attention_map(x)
        relations = weights[:, 4:].unflatten(1, (2, 2)) / weights[:, 2:4, None]
        assert torch.allclose(relations, relations.mT) is symmetric


def test_no_relation_of_a_pair_is_kept():
    """Four times the tokens take four times the memory; the relations of all pairs would be larger than all of it."""
    layer = DualAttention(32, heads=4)
    peaks = {}
    for length in (1024, 4096):
        x = torch.randn(1, length, 32)
        with torch.no_grad():
            peaks[length] = peak_bytes(lambda x=x: layer(x))
    assert peaks[4096] < 4.6 * peaks[1024]
    assert peaks[4096] < 4 * 4096 * 4096 * layer.relations


def test_relative_symbols_tell_where_identical_tokens_stand():
    x = torch.randn(1, 1, 32, dtype=torch.float64).expand(1, 8, 32)
    for symbols, differ in (("attention", False), ("relative", True)):
        out = layer_of(symbols=symbols, library_size=5)(x)[0]
        assert torch.allclose(out[0], out[3]) is not differ


def test_positional_symbols_start_anew_in_every_packed_sequence():
    layer = layer_of(symbols="positional", library_size=5)
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    packed = layer(torch.cat([x[:, :3], x[:, 3:]], dim=1), mask=Segments(torch.tensor([0, 0, 0, 1, 1])))
    assert_close(packed, torch.cat([layer(x[:, :3]), layer(x[:, 3:])], dim=1))
    with pytest.raises(ValueError, match="DualAttention: length 6 with a symbol for each of library_size 5 positions"):
        layer(torch.randn(1, 6, 32, dtype=torch.float64))


@pytest.mark.parametrize("symbols", ["attention", "relative"])
def test_a_mask_of_single_heads_reaches_the_heads_of_its_numbers(symbols):
    layer = layer_of(symbols=symbols)
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    allowed = torch.ones(1, 4, 6, 6, dtype=torch.bool)
    allowed[:, 3, :, 0] = False
    plain, masked = layer(x), layer(x, mask=Dense(allowed))
    assert_close(masked[..., :16], plain[..., :16])
    assert (masked[..., 16:] - plain[..., 16:]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relational_heads": 4}, "relational_heads 4 of heads 4"),
        ({"relations": 5}, "relations 5 for relational heads of width 16"),
        ({"symbols": "relative", "library_size": 4}, "library_size 4 with symbols 'relative'"),
        ({"position": "alibi"}, "position 'alibi' is not known"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=f"DualAttention: {message}"):
        layer_of(**options)
