"""Multi-token attention is the authors' layer (golden) and its formula, and finds what no single pair shows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from regard.nn import MultiHeadAttention
from regard.nn.scores.multi_token import MultiTokenAttention
from regard.ops.masks import Padding, Segments

GOLDEN = Path(__file__).parents[1] / "golden" / "multi_token.safetensors"
AUTHORS = {
    "query.weight": "wq.weight",
    "key.weight": "wk.weight",
    "value.weight": "wv.weight",
    "output.weight": "wo.weight",
    "before.kernel": "mta_kernel",
    "before.mixing": "wpsm.weight",
    "after.kernel": "mta_kernel_after_sm",
    "after.mixing": "head_kernel",
    "norm.weight": "subln.weight",
    "gate.weight": "gate.weight",
    "gate.bias": "gate.bias",
}


def ours(name: str, theirs: torch.Tensor) -> torch.Tensor:
    """Their head kernels, the second of which is (from, to), as (groups, to, from)."""
    if name == "before.mixing":
        return theirs[None]
    return theirs.mT if name == "after.mixing" else theirs


@pytest.mark.parametrize(("case", "norm"), [("gate", "gate"), ("depth", 3)])
def test_output_and_gradients_are_those_of_the_authors_layer(case, norm):
    kept = load_file(GOLDEN)
    layer = MultiTokenAttention(12, heads=4, causal=True, query_kernel=3, key_kernel=5, norm=norm, dtype=torch.float64)
    leaves = dict(layer.named_parameters())
    layer.load_state_dict({name: ours(name, kept[f"{case}.weight.{AUTHORS[name]}"]) for name in leaves})
    x = kept[f"{case}.x"].requires_grad_()
    out = layer(x)
    assert_close(out, kept[f"{case}.out"], rtol=1e-11, atol=1e-12)
    found = torch.autograd.grad(out, [x, *leaves.values()], kept[f"{case}.seed"])
    assert_close(found[0], kept[f"{case}.grad.x"], rtol=1e-10, atol=1e-11)
    for name, gradient in zip(leaves, found[1:], strict=True):
        assert_close(gradient, ours(name, kept[f"{case}.grad.{AUTHORS[name]}"]), rtol=1e-10, atol=1e-11)


def randomised(**arguments) -> MultiTokenAttention:
    layer = MultiTokenAttention(8, heads=4, query_kernel=3, key_kernel=3, dtype=torch.float64, **arguments)
    for stage in (layer.before, layer.after):
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return layer


def convolved(stage, scores, allowed):
    """Conv and mix of one sample, sum by sum."""
    queries, keys = scores.shape[1:]
    scores = scores * allowed
    out = scores
    if stage.kernel is not None:
        out = torch.zeros_like(scores)
        for i in range(queries):
            for j in range(keys):
                for a in range(3):
                    for b in range(-1, 2):
                        if i - a >= 0 and 0 <= j - b < keys:
                            out[:, i, j] += stage.kernel[:, 0, 2 - a, 1 - b] * scores[:, i - a, j - b]
    return out


def mixed(stage, scores):
    if stage.mixing is None:
        return scores
    size = stage.mixing.shape[-1]
    groups = [torch.einsum("dc,cnm->dnm", w, scores[g * size : g * size + size]) for g, w in enumerate(stage.mixing)]
    return torch.cat(groups)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"head_kernel": 2},
        {"convolve": "before", "mix_heads": "after"},
        {"convolve": "after", "mix_heads": "before"},
    ],
)
def test_map_equals_the_sums_of_the_formula(arguments, causal):
    layer, x = randomised(causal=causal, **arguments), torch.randn(1, 6, 8, dtype=torch.float64)
    query, key = (projection(x)[0].unflatten(-1, (4, 2)).transpose(0, 1) for projection in (layer.query, layer.key))
    allowed = torch.ones(6, 6, dtype=torch.bool).tril() if causal else torch.ones(6, 6, dtype=torch.bool)
    scores = mixed(layer.before, convolved(layer.before, query @ key.mT / math.sqrt(2), allowed))
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    expected = mixed(layer.after, convolved(layer.after, weights, allowed) * allowed)
    assert_close(layer.attention_map(x)[0][0], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("position", [None, "rotary"])
def test_an_untrained_layer_without_norm_is_multi_head_attention(position):
    layer = MultiTokenAttention(16, heads=4, causal=True, position=position, norm=None, dtype=torch.float64)
    plain = MultiHeadAttention(16, heads=4, causal=True, position=position, dtype=torch.float64)
    for name in ("query", "key", "value", "output"):
        getattr(plain, name).load_state_dict(getattr(layer, name).state_dict())
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    assert_close(layer(x), plain(x), rtol=1e-11, atol=1e-12)


def test_two_words_are_found_where_they_stand_together():
    """One head, orthogonal words: a query for b cannot tell "a b" from a lone "b" until the one before it helps."""
    words = torch.eye(8, dtype=torch.float64)
    a, b, other, ask_a, ask_b = words[:5]
    x = torch.stack([b, other, a, other, a, b, other, b, ask_a, ask_b])[None]
    layer = MultiTokenAttention(
        8, heads=1, causal=True, query_kernel=2, key_kernel=3, convolve="before", mix_heads=None, norm=None
    ).double()
    with torch.no_grad():
        layer.key.weight.copy_(words)
        layer.query.weight.zero_()
        layer.query.weight[0, 3] = layer.query.weight[1, 4] = 30 * math.sqrt(8)  # ask_a wants a, ask_b wants b
    lone, _ = layer.attention_map(x)
    assert_close(lone[0, 0, -1, [0, 5, 7]], torch.full((3,), 1 / 3, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        layer.before.kernel.zero_()
        layer.before.kernel[0, 0, 1, 1] = 1.0  # this query, this key
        layer.before.kernel[0, 0, 0, 0] = 1.0  # the query before, the key before
    together, _ = layer.attention_map(x)
    assert together[0, 0, -1, 5] > 1 - 1e-9


def test_heads_are_mixed_within_their_group_only():
    layer, x = randomised(head_kernel=2, convolve=None, mix_heads="after"), torch.randn(1, 5, 8, dtype=torch.float64)
    before, _ = layer.attention_map(x)
    layer.after.mixing.data[1] *= 2
    after, _ = layer.attention_map(x)
    assert_close(after[:, :2], before[:, :2])
    assert_close(after[:, 2:], 2 * before[:, 2:])


def test_weights_are_not_normalised_again():
    layer = randomised(convolve="after", mix_heads=None)
    with torch.no_grad():
        layer.after.kernel.zero_()[..., -1, 1] = 3.0
    weights, _ = layer.attention_map(torch.randn(1, 5, 8, dtype=torch.float64))
    assert_close(weights.sum(-1), torch.full((1, 4, 5), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("causal", [False, True])
def test_convolutions_stay_within_a_packed_sequence_and_its_length(causal):
    layer, x = randomised(causal=causal), torch.randn(1, 9, 8, dtype=torch.float64)
    alone = torch.cat([layer(piece) for piece in x.split([4, 5], dim=1)], dim=1)
    assert_close(layer(x, mask=Segments.from_lengths([4, 5])), alone, rtol=1e-11, atol=1e-12)
    assert_close(layer(x, mask=Padding(torch.tensor([4])))[:, :4], alone[:, :4], rtol=1e-11, atol=1e-12)


def test_a_state_keeps_no_more_queries_than_the_convolutions_need():
    layer = MultiTokenAttention(8, heads=2, causal=True, dtype=torch.float64)
    state = layer.init_state(1)
    for length in (3, 40):
        _, state = layer.step(torch.randn(1, length, 8, dtype=torch.float64), state)
    assert state.queries.shape == (1, 2, 10, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key_kernel": 4}, "key_kernel 4; give an odd number"),
        ({"query_kernel": 0}, "query_kernel 0; give a positive"),
        ({"head_kernel": 3}, "head_kernel 3 does not divide heads 8"),
        ({"norm": -1}, "norm -1; count layers from 0"),
        ({"norm": "gated"}, "norm 'gated' is not known; did you mean 'gate'"),
        ({"convolve": "around"}, "convolve 'around' is not known"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"MultiTokenAttention: {message}"):
        MultiTokenAttention(16, **arguments)
