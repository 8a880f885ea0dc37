"""Additive, general and location-based scores are released layers' and the formulas; coverage spreads attention."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn import AdditiveAttention, GeneralAttention, LocationAttention, MultiHeadAttention
from regard.nn.scores.alignment import coverage_loss
from regard.ops.masks import Causal, Padding, Segments

GOLDEN = Path(__file__).parents[1] / "golden" / "alignment.safetensors"
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Ours by the names of OpenNMT-py's GlobalAttention and of a port of See et al.'s attention.
RELEASED = {
    "mlp": {
        "query.weight": "linear_query.weight",
        "query.bias": "linear_query.bias",
        "key.weight": "linear_context.weight",
        "vector": "v.weight",
    },
    "general": {"query.weight": "linear_in.weight"},
    "coverage": {
        "query.weight": "decode_proj.weight",
        "query.bias": "decode_proj.bias",
        "key.weight": "W_h.weight",
        "vector": "v.weight",
        "coverage": "W_c.weight",
    },
}


def released() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def layer_of(case: str, kept: dict[str, torch.Tensor]):
    """One head whose values and output are the context itself, as in the released layers."""
    options = {"heads": 1, "dtype": torch.float64}
    layer = (
        GeneralAttention(6, **options)
        if case == "general"
        else AdditiveAttention(6, bias=True, coverage=case == "coverage", **options)
    )
    own = dict(layer.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            if name in RELEASED[case]:
                parameter.copy_(kept[f"{case}.weight.{RELEASED[case][name]}"].view_as(parameter))
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.copy_(torch.eye(6))
    return layer, {name: own[name] for name in RELEASED[case]}


@pytest.mark.parametrize("case", RELEASED)
def test_weights_outputs_and_gradients_are_those_of_released_layers(case):
    kept = released()
    layer, leaves = layer_of(case, kept)
    x, context = kept["x"].requires_grad_(), kept["context"].requires_grad_()
    mask = Padding(kept["lengths"]) if case == "coverage" else None
    weights, _ = layer.attention_map(x, context, mask=mask)
    assert_close(weights[:, 0], kept[f"{case}.weights"], **EXACT)
    out = layer(x, context, mask=mask)
    out = out.tanh() if case == "general" else out  # their layer ends in a tanh
    assert_close(out, kept[f"{case}.out"], **EXACT)
    found = torch.autograd.grad(out, [x, context, *leaves.values()], kept["seed"])
    names = ["x", "context", *RELEASED[case].values()]
    for name, gradient in zip(names, found, strict=True):
        assert_close(gradient, kept[f"{case}.grad.{name}"].view_as(gradient), rtol=1e-10, atol=1e-11)
    if case == "coverage":
        loss = coverage_loss(weights)
        assert_close(loss[:, 0], kept["coverage.loss"], **EXACT)
        found = torch.autograd.grad(loss.sum(), [x, context, *leaves.values()])
        for name, gradient in zip(names, found, strict=True):
            assert_close(gradient, kept[f"coverage.loss_grad.{name}"].view_as(gradient), rtol=1e-10, atol=1e-11)


def moved(layer: torch.nn.Module) -> torch.nn.Module:
    """Weights of size 1 in place of the initial ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


@pytest.mark.parametrize("causal", [False, True])
def test_additive_scores_are_the_formula_head_by_head(causal):
    layer = moved(AdditiveAttention(8, heads=2, hidden_dim=3, bias=True, causal=causal, dtype=torch.float64))
    x, context = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    weights, _ = layer.attention_map(x, context)
    query, key = layer.query(x).unflatten(-1, (2, 3)), layer.key(context).unflatten(-1, (2, 3))
    scores = (torch.tanh(query[:, :, None] + key[:, None]) * layer.vector).sum(-1).permute(0, 3, 1, 2)
    if causal:
        scores = scores.masked_fill(~torch.ones(5, 7, dtype=torch.bool).tril(2), -torch.inf)
    assert_close(weights, scores.softmax(-1), **EXACT)


def test_additive_attention_starts_with_equal_weights():
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    weights, _ = AdditiveAttention(16, heads=4, dtype=torch.float64).attention_map(x)
    assert torch.equal(weights, weights[..., :1].expand_as(weights))


@pytest.mark.parametrize("causal", [False, True])
def test_general_attention_is_multi_head_where_its_form_is_a_product_of_projections(causal):
    """W_h = W_hᴷᵀ W_hᑫ / √d_h. (With one head and W^K = W^Q = I that is W = I / √d.)"""
    peer = MultiHeadAttention(8, heads=2, causal=causal, dtype=torch.float64)
    layer = GeneralAttention(8, heads=2, causal=causal, dtype=torch.float64)
    query, key = (projection.weight.unflatten(0, (2, 4)) for projection in (peer.query, peer.key))
    own = dict(layer.named_parameters())
    with torch.no_grad():
        own["query.weight"].copy_((key.mT @ query).flatten(0, 1) / 4**0.5)
        for name in ("value.weight", "output.weight"):
            own[name].copy_(dict(peer.named_parameters())[name])
    x, context = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 9, 8, dtype=torch.float64)
    for given in ((x,), (x, context)):
        assert_close(layer(*given), peer(*given), **EXACT)


def test_a_head_of_general_attention_has_scores_of_full_rank():
    """A head of multi-head attention stops at its width, 2 of 8."""
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    ranks = {}
    for kind in (GeneralAttention, MultiHeadAttention):
        layer = kind(8, heads=4, dtype=torch.float64)
        query, key, _ = layer.project(x, None, None, None)
        ranks[kind] = torch.linalg.matrix_rank(query @ key.mT).unique().tolist()
    assert ranks == {GeneralAttention: [8], MultiHeadAttention: [2]}


def test_biased_general_adds_a_score_of_the_key_alone():
    layer = GeneralAttention(6, heads=1, bias=True, dtype=torch.float64)
    torch.nn.init.normal_(layer.query.bias)
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    scores = x[0] @ layer.query.weight.T @ x[0].T + x[0] @ layer.query.bias
    assert_close(layer.attention_map(x)[0][0, 0], scores.softmax(-1), **EXACT)


def test_general_attention_decodes_from_the_tokens_alone():
    layer = GeneralAttention(16, heads=4, causal=True)
    with torch.no_grad():
        _, state = layer.step(torch.randn(2, 5, 16), layer.init_state(2))
    assert state.key.shape == (2, 1, 5, 16)
    assert state.value.numel() == 0


def test_location_scores_are_the_formula():
    layer = moved(LocationAttention(8, heads=2, max_length=6, dtype=torch.float64))
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    weights, _ = layer.attention_map(x)
    for head in range(2):
        # Luong's W_a of a head, a row for each position.
        form = layer.key.weight[:, 4 * head : 4 * head + 4] @ layer.query.weight[4 * head : 4 * head + 4]
        assert_close(weights[0, head, :, :6], (x[0] @ form.T).softmax(-1), **EXACT)
    assert not weights[..., 6:].any()


def test_location_weights_ignore_what_stands_there():
    layer = moved(LocationAttention(8, heads=2, max_length=10))
    x, context, other = torch.randn(1, 3, 8), torch.randn(1, 9, 8), torch.randn(1, 9, 8)
    first, second = (layer.attention_map(x, source) for source in (context, other))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    longer, _ = layer.attention_map(x, torch.cat([context, other[:, :1]], 1))
    assert_close(longer[..., :9] / longer[..., :9].sum(-1, keepdim=True), first[0])


def test_positions_of_packed_sequences_start_anew_under_other_masks_too():
    layer = moved(LocationAttention(8, heads=2, max_length=4, dtype=torch.float64))
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    out = layer(x, mask=Causal() & Segments(torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1])))
    assert_close(out[:, 3:], layer(x[:, 3:], mask=Causal()), **EXACT)


@pytest.mark.parametrize("causal", [False, True])
def test_coverage_is_the_sum_of_earlier_weights(causal):
    layer = moved(AdditiveAttention(8, heads=2, causal=causal, coverage=True, dtype=torch.float64))
    x, context = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    layer.requires_grad_(False)
    found, _ = layer.attention_map(x, context)
    query, key = layer.query(x).unflatten(-1, (2, 4)), layer.key(context).unflatten(-1, (2, 4))
    for sample in range(2):
        for head in range(2):
            spent = [0.0] * 7
            for i in range(5):
                scores = []
                for j in range(7):
                    hidden = query[sample, i, head] + key[sample, j, head] + layer.coverage[head] * spent[j]
                    scores.append(layer.vector[head] @ hidden.tanh() if not causal or j <= i + 2 else -torch.inf)
                weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
                assert_close(found[sample, head, i], weights, **EXACT)
                loss = sum(min(weight, before) for weight, before in zip(weights.tolist(), spent, strict=True))
                assert_close(coverage_loss(found)[sample, head, i].item(), loss)
                spent = [before + weight for before, weight in zip(spent, weights.tolist(), strict=True)]


def test_coverage_of_nothing_is_additive_attention():
    plain, covered = (
        AdditiveAttention(8, heads=2, coverage=on, causal=True, dtype=torch.float64) for on in (False, True)
    )
    moved(plain)
    covered.load_state_dict({**plain.state_dict(), "coverage": torch.zeros(2, 4)})
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    assert_close(covered(x), plain(x), **EXACT)


def test_with_a_strong_coverage_weight_nothing_is_attended_twice():
    """Equal queries all want the same key; what coverage takes off makes each go for the next best."""
    layers = {on: AdditiveAttention(1, heads=1, coverage=on, dtype=torch.float64) for on in (False, True)}
    for layer in layers.values():
        with torch.no_grad():
            layer.query.weight.zero_()
            layer.key.weight.fill_(1.0)
            layer.vector.fill_(1e5)  # every softmax is one-hot, exactly
            if layer.coverage is not None:
                layer.coverage.fill_(-10.0)
    wanted = torch.tensor([0.2, 0.5, 0.1, 0.4, 0.3], dtype=torch.float64)
    x, context = torch.ones(1, 5, 1, dtype=torch.float64), wanted.view(1, 5, 1)
    plain, covered = (layers[on].attention_map(x, context)[0][0, 0] for on in (False, True))
    assert torch.equal(plain.argmax(-1), torch.full((5,), 1))
    assert coverage_loss(plain).tolist() == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert torch.equal(covered, F.one_hot(wanted.argsort(descending=True)).double())
    assert not coverage_loss(covered).any()


def test_coverage_loss_is_zero_exactly_where_no_key_is_shared():
    apart = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    shared = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.3, 0.6, 0.0, 0.1]])
    assert coverage_loss(apart).tolist() == [0.0, 0.0, 0.0]
    assert_close(coverage_loss(shared), torch.tensor([0.0, 0.0, 0.8]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AdditiveAttention(8, hidden_dim=0), "AdditiveAttention: hidden_dim 0; give a positive width"),
        (lambda: LocationAttention(8, max_length=0), "LocationAttention: max_length 0; give a positive number"),
        (
            lambda: AdditiveAttention(8, coverage=True)(torch.randn(1, 3, 8)),
            "coverage=True with causal=False and no context; build with causal=True or give a context",
        ),
        (
            lambda: AdditiveAttention(8, coverage=True, causal=True)(torch.randn(1, 3, 8), mask=Causal()),
            "mask Causal with coverage=True; give Padding or Segments",
        ),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
