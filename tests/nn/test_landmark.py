"""Landmark attention: the grouped softmax, its authors' layer and memory, and what a query reads of a long context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from regard.nn import LandmarkAttention, MultiHeadAttention
from regard.nn.memory.landmark import LandmarkState, insert_landmarks, remove_landmarks
from regard.ops.cache import KeyValueCache
from regard.ops.masks import Segments
from regard.ops.positions import rotary

GOLDEN = Path(__file__).parents[1] / "golden" / "landmark.safetensors"


def landmark(block_size: int = 3, **changes: object) -> LandmarkAttention:
    torch.manual_seed(0)
    given = {"heads": 2, "block_size": block_size, "dtype": torch.float64, **changes}
    layer = LandmarkAttention(16, **given).eval()  # pyright: ignore[reportArgumentType]
    if not layer.carried:
        nn.init.normal_(layer.landmark)
    return layer


def drawn(length: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, 16, dtype=torch.float64, generator=generator)


def placed(layer: LandmarkAttention, tokens: Tensor, positions: Tensor) -> Tensor:
    return tokens if layer.position is None else rotary(tokens, positions)


def with_landmarks(layer: LandmarkAttention, x: Tensor) -> Tensor:
    """The sequence the paper's layer would get: with landmarks that have read their blocks."""
    if layer.carried:
        return x
    stride = layer.block_size + 1
    x = insert_landmarks(x, layer.landmark, layer.block_size)
    pieces = []
    for start in range(0, x.shape[1], stride):
        section = x[:, start : start + stride]
        if section.shape[1] == stride:
            query, key, value = layer.split(section, section)
            query, key = (placed(layer, heads, torch.arange(stride)) for heads in (query, key))
            scores = query[:, :, -1:] @ key[:, :, :-1].mT * layer.head_dim**-0.5
            read = layer.combine(scores.softmax(-1) @ value[:, :, :-1])
            section = torch.cat([section[:, :-1], section[:, -1:] + read], dim=1)
        pieces.append(section)
    return torch.cat(pieces, dim=1)


def by_definition(layer: LandmarkAttention, x: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output and weights, query by query and block by block; `chosen` (batch, heads, n, sections) allows sections."""
    stride, size = layer.block_size + 1, layer.block_size
    tokens = with_landmarks(layer, x)
    length = tokens.shape[1]
    query, key, value = layer.split(tokens, tokens)
    query, key = (placed(layer, heads, torch.arange(length)) for heads in (query, key))
    scores = query @ key.mT * layer.head_dim**-0.5
    rows = []
    for i in range(length):
        own = i // stride
        marks = scores[:, :, i, size : own * stride : stride]
        if chosen is not None:
            marks = marks.masked_fill(~chosen[:, :, i, :own], -torch.inf)
        direct = scores[:, :, i, own * stride : min(i + 1, own * stride + size)]
        group = torch.cat([marks, direct], dim=-1).softmax(-1)
        row = torch.zeros_like(scores[:, :, i])
        parts = [row[..., :0]]
        for s in range(own):
            inside = scores[:, :, i, s * stride : s * stride + size].softmax(-1)
            parts += [group[..., s : s + 1] * inside, row[..., :1]]
        parts += [group[..., own:], row[..., own * stride + direct.shape[-1] :]]
        rows.append(torch.cat(parts, dim=-1))
    weights = torch.stack(rows, dim=2)
    out = layer.combine(weights @ value)
    if layer.carried:
        return out, weights
    keep = torch.arange(length) % stride != size
    return out[:, keep], weights[:, :, keep][..., keep]


@pytest.mark.parametrize("length", [1, 3, 4, 13, 70])
@pytest.mark.parametrize("options", [{}, {"position": "rotary"}, {"carried": True}, {"block_size": 1}], ids=str)
def test_outputs_and_gradients_are_the_grouped_softmax(length, options):
    layer = landmark(**options)
    x = drawn(length).requires_grad_()
    found, (wanted, _) = layer(x), by_definition(layer, x)
    assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    leaves = [x, *layer.parameters()]
    grads = (torch.autograd.grad(out.sin().sum(), leaves, materialize_grads=True) for out in (found, wanted))
    assert_close(*grads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"carried": True, "position": "rotary"}], ids=str)
def test_the_map_is_the_grouped_softmax_and_loses_no_mass(options):
    layer, x = landmark(**options), drawn(29)
    weights, _ = layer.attention_map(x)
    assert_close(weights, by_definition(layer, x)[1], rtol=1e-11, atol=1e-12)
    assert_close(weights.sum(-1), torch.ones(2, 2, 29, dtype=torch.float64))


def authors_layer() -> tuple[LandmarkAttention, dict[str, Tensor]]:
    kept = load_file(GOLDEN)
    layer = LandmarkAttention(8, heads=2, block_size=3, carried=True, position="rotary", dtype=torch.float64).eval()
    for kind in ("weight", "grad"):
        query, key, kept[f"{kind}.value"] = kept[f"{kind}.qkv"].chunk(3)
        # Their rotary turns neighbouring features, ours the halves.
        for name, part in (("query", query), ("key", key)):
            kept[f"{kind}.{name}"] = part.view(2, 2, 2, 8).transpose(1, 2).reshape(8, 8)
    names = {"query": "query", "key": "key", "value": "value", "output": "out"}
    layer.load_state_dict({f"{ours}.weight": kept[f"weight.{theirs}"] for ours, theirs in names.items()})
    return layer, kept


def test_outputs_and_gradients_are_those_of_the_authors_layer():
    layer, kept = authors_layer()
    x = kept["x"].requires_grad_()
    out = layer(x)
    assert_close(out, kept["out"], rtol=1e-12, atol=1e-12)
    projections = [layer.query.weight, layer.key.weight, layer.value.weight, layer.output.weight]
    found = torch.autograd.grad(out, [x, *projections], kept["seed"])
    wanted = [kept[f"grad.{name}"] for name in ("x", "query", "key", "value", "out")]
    for gradient, expected in zip(found, wanted, strict=True):
        assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 2])
def test_retrieval_with_stingy_positions_is_that_of_the_authors_memory(blocks):
    """Where it holds more blocks than are retrieved; before, their code places the last block beside the query."""
    layer, kept = authors_layer()
    layer.retrieved = blocks
    start = (blocks + 1) * 4
    with torch.no_grad():
        found = layer(kept["x"])
    assert_close(found[:, start:], kept[f"retrieved.{blocks}"][:, start:], rtol=1e-12, atol=1e-12)
    full = layer.attention_map(kept["x"])[0]
    layer.retrieved = None
    assert (full - layer.attention_map(kept["x"])[0]).abs().amax() > 0.01


@pytest.mark.parametrize("carried", [False, True])
def test_retrieval_reads_the_blocks_whose_landmarks_score_highest(carried):
    layer, x = landmark(carried=carried, retrieved=2), drawn(27)
    tokens = with_landmarks(layer, x)
    query, key, _ = layer.split(tokens, tokens)
    marks = query @ key[:, :, 3::4].mT
    section = torch.arange(tokens.shape[1]) // 4
    marks = marks.masked_fill(torch.arange(marks.shape[-1]) >= section[:, None], -torch.inf)
    chosen = torch.zeros_like(marks, dtype=torch.bool).scatter(-1, marks.topk(2).indices, True)
    assert_close(layer(x), by_definition(layer, x, chosen)[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"position": "rotary"}, {"position": "rotary", "carried": True}], ids=str)
@pytest.mark.parametrize("blocks", [30, 1000])
def test_retrieval_of_all_blocks_is_no_retrieval(options, blocks):
    layer, x = landmark(**options), drawn(91)
    full = layer(x)
    layer.retrieved = blocks
    assert_close(layer(x), full, rtol=1e-11, atol=1e-11)


def test_up_to_the_first_landmark_a_converted_layer_is_what_it_was():
    torch.manual_seed(0)
    dense = MultiHeadAttention(16, heads=2, causal=True, position="rotary", bias=True, dtype=torch.float64)
    layer, x = LandmarkAttention.from_multi_head(dense, block_size=10), drawn(14)
    assert_close(layer(x)[:, :10], dense(x)[:, :10])
    assert (layer(x)[:, 10:] - dense(x)[:, 10:]).abs().amax() > 1e-3
    with pytest.raises(ValueError, match="causal=False"):
        LandmarkAttention.from_multi_head(MultiHeadAttention(16, heads=2))


def finder(**changes: object) -> LandmarkAttention:
    """Keys are the tokens themselves, a landmark is the mean of its block, and feature 5 asks for feature 3."""
    layer = landmark(block_size=4, heads=1, **changes)
    with torch.no_grad():
        for projection in (layer.query, layer.key, layer.value, layer.output):
            projection.weight.copy_(torch.eye(16))
        layer.query.weight[[3, 5]] = layer.query.weight[[5, 3]]
        layer.landmark.zero_()
    return layer


def haystack(blocks: int, needle: int) -> Tensor:
    """Blocks of noise, one token of which, in block `needle`, is what the last token asks for."""
    x = 0.1 * drawn(4 * blocks + 1, batch=1)
    x[:, [4 * needle + 2, -1]] = 12.0 * torch.eye(16, dtype=torch.float64)[[3, 5]]
    return x


@pytest.mark.parametrize("needle", [0, 7, 37, 99])
@pytest.mark.parametrize("position", [None, "rotary"])
def test_a_token_many_blocks_back_is_found_through_its_landmark(needle, position):
    layer, x = finder(retrieved=1, position=position), haystack(100, needle)
    (last,) = layer.attention_map(x)[0][0, :, -1]
    touched = (last > 0).nonzero().flatten().tolist()
    assert touched == [*range(4 * needle, 4 * needle + 4), 400]
    assert last[4 * needle + 2] > 0.9


def spoiled(cache: KeyValueCache, blocks: list[int]) -> KeyValueCache:
    """NaN in all blocks but these."""
    kept = (torch.arange(cache.length)[:, None] // 4 == torch.tensor(blocks)).any(-1)[:, None]
    key, value = (tokens.where(kept, torch.nan) for tokens in (cache.key, cache.value))
    return KeyValueCache(key, value, cache.length, [cache.length])


def test_a_step_reads_as_many_blocks_as_it_retrieves_and_nothing_else():
    layer, x = finder(retrieved=2, position="rotary"), haystack(60, 11)
    with torch.no_grad():
        _, state = layer.step(x[:, :-1], layer.init_state(1))
        wanted, _ = layer.step(x[:, -1:], state)
        (last,) = layer.attention_map(x)[0][0, :, -1]
        chosen = sorted({token // 4 for token in (last > 0).nonzero().flatten().tolist()} - {60})
        assert len(chosen) == 2
        assert 11 in chosen
        found, _ = layer.step(x[:, -1:], replace(state, blocks=spoiled(state.blocks, chosen)))
        assert_close(found, wanted)
        missed, _ = layer.step(x[:, -1:], replace(state, blocks=spoiled(state.blocks, chosen[:1])))
    assert missed.isnan().any()
    # What stays beside the weights is a key for every block, and the open section.
    assert (state.landmarks.length, state.blocks.length, state.key.shape[2]) == (60, 240, 0)


def test_stingy_positions_do_not_know_how_far_away_a_retrieved_block_is():
    """However many blocks lie between, so that no position is larger than in training; full attention does know."""
    outputs, x = {}, haystack(6, 3)
    for retrieved in (1, None):
        layer = finder(retrieved=retrieved, position="rotary")
        for blocks in (10, 500):
            between = torch.zeros(1, 4 * blocks, 16, dtype=torch.float64)
            outputs[retrieved, blocks] = layer(torch.cat([x[:, :16], between, x[:, -1:]], dim=1))[:, -1]
    assert_close(outputs[1, 10], outputs[1, 500], rtol=1e-12, atol=1e-12)
    assert (outputs[None, 10] - outputs[None, 500]).abs().amax() > 1e-3


@pytest.mark.parametrize("options", [{"retrieved": 2, "position": "rotary"}, {"carried": True}], ids=str)
@pytest.mark.parametrize("pieces", [[50], [13, 1, 36], [1] * 50], ids=str)
def test_decoding_equals_the_forward(options, pieces):
    layer, x = landmark(**options), drawn(50)
    outputs, state = [], layer.init_state(2)
    with torch.no_grad():
        for piece in x.split(pieces, dim=1):
            out, state = layer.step(piece, state)
            outputs.append(out)
        assert_close(torch.cat(outputs, 1), layer(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_offloaded_blocks_leave_the_device_and_landmarks_stay():
    layer = landmark(retrieved=2, position="rotary", offload="cpu").cuda()
    x = drawn(50).cuda()
    with torch.no_grad():
        out, state = layer.step(x[:, :40], layer.init_state(2))
        more, state = layer.step(x[:, 40:], state)
        assert isinstance(state, LandmarkState)
        assert state.blocks.key.device.type == "cpu"
        assert state.landmarks.key.is_cuda
        assert state.key.is_cuda
        assert_close(torch.cat([out, more], 1), layer(x))


def test_landmarks_in_the_sequence_are_taken_out_again_and_know_their_block():
    x = drawn(11).requires_grad_()
    longer = insert_landmarks(x, torch.full((16,), 7.0, dtype=torch.float64), 3)
    assert longer.shape[1] == 14
    assert (longer[:, 3::4] == 7).all()
    assert torch.equal(remove_landmarks(longer, 3), x)
    (gradient,) = torch.autograd.grad(landmark(carried=True)(longer)[:, 7].sum(), x)
    assert (gradient[:, 3:6].abs().amax(-1) > 0).all()


def test_sizes_that_make_no_blocks_are_refused():
    for name in ("block_size", "retrieved"):
        with pytest.raises(ValueError, match=f"LandmarkAttention: {name} 0"):
            landmark(**{name: 0})
    with pytest.raises(ValueError, match="position 'alibi'"):
        landmark(position="alibi")
    with pytest.raises(ValueError, match="query_ids"):
        landmark()(drawn(4), mask=Segments(torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.long)))
