"""RCMHA is the authors' layer (golden), its formula written out, and hears distance in two ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn.scores.rcmha import RelativeConvAttention, RelativeScores
from regard.ops.attention import attention
from regard.ops.masks import Causal, Segments
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "rcmha.safetensors"
AUTHORS = {
    "query.weight": "query.0.linear.weight",
    "key.weight": "key.0.linear.weight",
    "value.weight": "value.0.linear.weight",
    "value.bias": "value.0.linear.bias",
    "output.weight": "output.weight",
    "output.bias": "output.bias",
    "query_filter.weight": "query.1.conv.weight",
    "query_filter.bias": "query.1.conv.bias",
    "key_filter.weight": "key.1.conv.weight",
    "value_filter.weight": "value.1.conv.weight",
    "value_filter.bias": "value.1.conv.bias",
    "content": "query_pos_bias",
    "table": "key_pos_embeddings",
    "level": "key_pos_bias",
}


def randomised(dim: int = 8, **arguments) -> RelativeConvAttention:
    layer = RelativeConvAttention(dim, heads=2, max_distance=4, dtype=torch.float64, **arguments)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def ours(name: str, theirs: torch.Tensor) -> torch.Tensor:
    """Their (distances, heads, …) and (heads, width) as ours."""
    if name in ("table", "level"):
        return theirs.transpose(0, 1)
    return theirs[:, None] if name == "content" else theirs


@pytest.mark.parametrize("case", ["plain", "causal", "memory"])
def test_outputs_and_gradients_are_those_of_the_authors_layer(case):
    """Alone, causal, and with a Transformer-XL memory in front of the keys."""
    kept = load_file(GOLDEN)
    layer = RelativeConvAttention(12, heads=3, causal=case != "plain", max_distance=9, dtype=torch.float64)
    layer.load_state_dict({name: ours(name, kept[f"weight.{theirs}"]) for name, theirs in AUTHORS.items()})
    names = [name for name in ("x", "context") if f"{case}.{name}" in kept]
    inputs = [kept[f"{case}.{name}"].requires_grad_() for name in names]
    out = layer(*inputs)
    assert_close(out, kept[f"{case}.out"], rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out, [*inputs, *layer.parameters()], kept[f"{case}.seed"])
    for name, gradient in zip(names, found, strict=False):
        assert_close(gradient, kept[f"{case}.grad.{name}"], rtol=1e-11, atol=1e-12)
    for (name, _), gradient in zip(layer.named_parameters(), found[len(inputs) :], strict=True):
        assert_close(gradient, ours(name, kept[f"{case}.grad.{AUTHORS[name]}"]), rtol=1e-11, atol=1e-12)
    assert kept[f"{case}.grad.key.1.conv.bias"].abs().max() < 1e-12  # why ours has none


def dense(layer: RelativeConvAttention, x: torch.Tensor) -> torch.Tensor:
    """The formula head by head and pair by pair, with torch's own convolution."""
    length, width = x.shape[0], layer.head_dim

    def convolved(projection, own, head):
        rows = projection(x)[:, head * width : head * width + width]
        return F.conv1d(F.pad(rows.mT[None], (2, 0)), own.weight, own.bias, groups=width)[0].mT

    mixed = []
    for head in range(layer.heads):
        query, key, value = (
            convolved(getattr(layer, name), getattr(layer, f"{name}_filter"), head)
            for name in ("query", "key", "value")
        )
        scores = torch.empty(length, length, dtype=x.dtype)
        for i in range(length):
            for j in range(length):
                entry = max(-4, min(4, j - i)) + 4
                score = (query[i] + layer.content[head, 0]) @ key[j] + query[i] @ layer.table[head, entry]
                scores[i, j] = (score + layer.level[head, entry]) / width**0.5
        if layer.causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        mixed.append(scores.softmax(-1) @ value)
    return layer.output(torch.cat(mixed, dim=-1))


@pytest.mark.parametrize("causal", [False, True])
def test_output_equals_the_formula_written_out(causal):
    layer, x = randomised(causal=causal), torch.randn(2, 11, 8, dtype=torch.float64)
    assert_close(layer(x), torch.stack([dense(layer, sample) for sample in x]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (6, 1), (7, 7), (5, 9), (9, 5)])
def test_a_shifted_tile_is_the_score_of_every_pair(queries, keys):
    query, table, level = torch.randn(2, 3, queries, 4), torch.randn(3, 9, 4), torch.randn(3, 9)
    bias = RelativeScores(query, table, level, torch.empty(keys, 0, dtype=torch.long))
    sample, head = torch.arange(2).view(-1, 1, 1, 1), torch.arange(3).view(-1, 1, 1)
    place = torch.arange(keys - queries, keys).view(-1, 1)
    pairs = bias.score(sample, head, place, torch.arange(keys))
    assert_close(bias.dense(queries, keys, batch=2, heads=3, device=query.device), pairs)
    part = bias.tile((1, 2), (1, 3), (keys - 1, keys), (0, keys), query.device)
    assert_close(part, pairs[1:2, 1:3, -1:])


def test_tiles_give_outputs_and_gradients_of_the_whole_row():
    leaves = [torch.randn(2, 3, 200, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    tables = [torch.randn(3, 401, 4, dtype=torch.float64, requires_grad=True)]
    tables.append(torch.randn(3, 401, dtype=torch.float64, requires_grad=True))
    bias = RelativeScores(leaves[3], *tables, torch.empty(200, 0, dtype=torch.long))
    results = []
    for backend in ("reference", "tiled"):
        out = attention(*leaves[:3], mask=Causal(), bias=bias, backend=backend)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [*leaves, *tables])])
    for tiled, whole in zip(results[1], results[0], strict=True):
        assert_close(tiled, whole, rtol=1e-9, atol=1e-11)


def test_filters_and_scores_cost_what_the_paper_says():
    """Three filters of width 3 a feature that all heads share: their parameters do not grow with the heads."""
    few, many = RelativeConvAttention(64, heads=2, head_dim=8), RelativeConvAttention(64, heads=8, head_dim=8)
    for layer in (few, many):
        filters = (layer.query_filter, layer.key_filter, layer.value_filter)
        assert [own.weight.numel() for own in filters] == [3 * 8] * 3


def test_identical_tokens_attend_by_distance_which_multi_head_attention_cannot():
    layer = randomised(causal=True)
    with torch.no_grad():
        layer.level.zero_()
        layer.table.zero_()
        for own in (layer.query_filter, layer.key_filter, layer.value_filter):
            own.weight[..., :-1] = 0
    x = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 6, 8)
    flat, _ = layer.attention_map(x)
    assert_close(flat[0, 0, 5], torch.full((6,), 1 / 6, dtype=torch.float64))
    layer.level.data[:, 3] = 1e3  # the token before
    weights, _ = layer.attention_map(x)
    assert_close(weights[0, 0, 1:].diagonal(), torch.ones(5, dtype=torch.float64))


def test_filters_stay_within_a_packed_sequence():
    layer, x = randomised(), torch.randn(1, 9, 8, dtype=torch.float64)
    packed = layer(x, mask=Segments.from_lengths([4, 1, 4]))
    alone = torch.cat([layer(piece) for piece in x.split([4, 1, 4], dim=1)], dim=1)
    assert_close(packed, alone, rtol=1e-11, atol=1e-12)


def test_no_map_is_built():
    length = 4096
    layer = RelativeConvAttention(16, heads=2, max_distance=64)
    x = torch.randn(1, length, 16, requires_grad=True)
    assert peak_bytes(lambda: layer(x).sum().backward()) < length * length * 4 / 2


def test_a_distance_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"RelativeConvAttention: max_distance 0; give a positive number"):
        RelativeConvAttention(8, max_distance=0)
