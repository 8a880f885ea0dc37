"""Combiner: the factorised weights written out, the released JAX layers, full support, and what is small about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regard.nn import CombinerAttention, MultiHeadAttention
from regard.ops.masks import Padding, Segments
from regard.testing.checks.decoding import state_bytes
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "combiner.safetensors"
RELEASED = ("fixed", "logsparse", "axial_rowmajor")
PLANS = (*RELEASED, "axial_vertical", "axial_horizontal")


def combiner(plan, **changes) -> CombinerAttention:
    torch.manual_seed(0)
    given = {"heads": 2, "block_size": 4, "dtype": torch.float64, **changes}
    return CombinerAttention(16, plan=plan, **given).eval()


def spans_of(plan: str, query: int, length: int, size: int, causal: bool) -> tuple[list[int], list[list[int]]]:
    """Ω⁰ of a query, and its other supports in the order of their tokens."""
    row, column = divmod(query, size)
    if plan in ("axial_vertical", "axial_horizontal"):
        seen = range(query + 1 if causal else length)
        direct = [j for j in seen if j // size == row or j % size == column]
        rest = [j for j in seen if j not in direct]
        kinds = {j % size if plan == "axial_vertical" else j // size for j in rest}
        return direct, [
            [j for j in rest if (j % size if plan == "axial_vertical" else j // size) == kind] for kind in sorted(kinds)
        ]
    if plan == "logsparse":
        blocks = [((query >> level) ^ 1, 1 << level) for level in range(length.bit_length())]
        direct = [query]
    else:
        blocks = [(block, size) for block in range(-(-length // size)) if block != query // size]
        direct = [j for j in range(length) if j // size == query // size]
    spans = [list(range(block * width, min((block + 1) * width, length))) for block, width in blocks]
    if causal:
        direct, spans = [j for j in direct if j <= query], [span for span in spans if span and span[-1] < query]
    return direct, [span for span in spans if span]


def by_definition(layer: CombinerAttention, x: Tensor) -> Tensor:
    """The effective weights q(j|i), one query at a time."""
    length, size, scale = x.shape[1], layer.block_size, layer.head_dim**-0.5
    query, key, value = layer.split(x, x)
    mixture = []
    for plan in layer.plans:
        rows = []
        for i in range(length):
            direct, spans = spans_of(plan, i, length, size, layer.causal)
            scores, inner = [(query[:, :, i, None] * key[:, :, direct]).sum(-1) * scale], []
            for span in spans:
                asked, place = query[:, :, span].amax(2), span[0] // size * size + i % size
                if plan == "axial_rowmajor":
                    asked = query[:, :, place] if place < length else torch.zeros_like(asked)
                weights = ((asked[:, :, None] * key[:, :, span]).sum(-1) * scale).softmax(-1)
                pooled = key[:, :, span].amax(2)
                if plan == "axial_rowmajor":
                    found = torch.einsum("bhj,bhjd->bhd", weights, value[:, :, span]).flatten(1)
                    row = layer.row_output(found) + (x[:, place] if place < length else 0.0)
                    pooled = layer.row_key(layer.row_norm(row)).unflatten(1, (layer.heads, -1))
                inner.append(weights)
                scores.append((query[:, :, i] * pooled).sum(-1, keepdim=True) * scale)
            mass = torch.cat(scores, -1).softmax(-1)
            found = torch.zeros(*mass.shape[:2], length, dtype=x.dtype)
            found[:, :, direct] = mass[..., : len(direct)]
            for index, (span, weights) in enumerate(zip(spans, inner, strict=True)):
                found[:, :, span] = mass[..., len(direct) + index, None] * weights
            rows.append(found)
        mixture.append(torch.stack(rows, 2))
    return torch.stack(mixture).mean(0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 12, 13, 17])
@pytest.mark.parametrize("plan", [*PLANS, PLANS], ids=str)
def test_weights_outputs_and_gradients_are_the_factorisation(plan, length, causal):
    layer = combiner(plan, causal=causal)
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    wanted = by_definition(layer, x)
    weights, value = layer.attention_map(x)
    torch.testing.assert_close(weights, wanted)
    outputs = layer(x), layer.combine(wanted @ value)
    torch.testing.assert_close(*outputs)
    leaves = [x, *layer.parameters()]
    # One token has no other span, for which the weights of rows would be needed.
    grads = (torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True, materialize_grads=True) for out in outputs)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("plan", RELEASED)
def test_causal_outputs_and_gradients_are_the_released_layers(plan):
    golden = {name.removeprefix(f"{plan}."): tensor for name, tensor in load_file(GOLDEN).items() if plan in name}
    layer = CombinerAttention(8, heads=2, plan=plan, block_size=4, causal=True, dtype=torch.float64)
    weights = dict(layer.named_parameters())
    layer.load_state_dict({name: golden[name] for name in weights})
    x = golden["x"].requires_grad_()
    out = layer(x)
    torch.testing.assert_close(out, golden["y"])
    found = torch.autograd.grad(out, [x, *weights.values()], golden["seed"])
    torch.testing.assert_close(list(found), [golden[f"grad.{name}"] for name in ("x", *weights)])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("plan", [*PLANS, PLANS], ids=str)
def test_the_support_is_full(plan, causal):
    """Every token that may be seen has a weight above 0 from every query in every head, and they sum to 1."""
    layer = combiner(plan, causal=causal, block_size=7)
    weights, _ = layer.attention_map(torch.randn(2, 60, 16, dtype=torch.float64))
    seen = torch.ones(60, 60).tril().bool() if causal else torch.ones(60, 60).bool()
    assert torch.equal(weights > 0, seen.expand_as(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 60, dtype=torch.float64))


def test_attention_to_another_block_has_rank_one_and_to_the_own_block_full_rank():
    layer = combiner("fixed", block_size=16, head_dim=32)
    weights, _ = layer.attention_map(torch.randn(1, 64, 16, dtype=torch.float64))
    blocks = weights[0, 0].unflatten(0, (4, 16)).unflatten(2, (4, 16)).transpose(1, 2)
    ranks = torch.linalg.matrix_rank(blocks / blocks.amax((2, 3), keepdim=True), atol=1e-9)
    assert torch.equal(ranks, torch.where(torch.eye(4).bool(), 16, 1))


def test_rows_asked_by_column_have_more_than_one_rank():
    layer = combiner("axial_rowmajor", block_size=16)
    weights, _ = layer.attention_map(torch.randn(1, 32, 16, dtype=torch.float64))
    assert torch.linalg.matrix_rank(weights[0, 0, 16:, :16], atol=1e-9) == 16


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("plan", "block_size", "length"),
    [
        ("fixed", 1, 30),
        ("fixed", 40, 30),
        ("axial_rowmajor", 40, 30),
        ("axial_vertical", 1, 30),
        ("axial_vertical", 40, 30),
        ("axial_horizontal", 1, 30),
        ("axial_horizontal", 40, 30),
        ("logsparse", 4, 2),
    ],
)
def test_spans_of_one_token_and_a_block_of_all_are_full_attention(plan, block_size, length, causal):
    layer = combiner(plan, block_size=block_size, causal=causal)
    full = MultiHeadAttention(16, heads=2, causal=causal, dtype=torch.float64)
    full.load_state_dict({name: tensor for name, tensor in layer.state_dict().items() if not name.startswith("row")})
    x = torch.randn(2, length, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), full(x))


@pytest.mark.parametrize("plan", PLANS)
def test_no_matrix_of_weights_is_built(plan):
    """8 heads of 4096 tokens, forward and backward: less than the weights of two heads, and little more by token."""

    def peak(length: int, block_size: int) -> int:
        layer = CombinerAttention(32, heads=8, plan=plan, block_size=block_size, causal=True)
        x = torch.randn(1, length, 32)
        return peak_bytes(lambda: layer(x).square().sum().backward())

    few, many = peak(1024, 32), peak(4096, 64)
    assert many < 2 * 4 * 4096**2
    assert many < 4 * 1.5 * few


@pytest.mark.parametrize("plan", [*PLANS, PLANS], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_and_padded_sequences_have_spans_of_their_own(plan, causal):
    layer = combiner(plan, causal=causal)
    splits = [[13, 1, 8, 9], [3, 20, 5, 3]]
    pieces = [[torch.randn(1, length, 16, dtype=torch.float64) for length in split] for split in splits]
    ids = torch.stack([Segments.from_lengths(split).ids for split in splits])
    packed = layer(torch.cat([torch.cat(row, 1) for row in pieces]), mask=Segments(ids))
    alone = torch.cat([torch.cat([layer(piece) for piece in row], 1) for row in pieces])
    torch.testing.assert_close(packed, alone)
    padded = layer(torch.cat(pieces[1], 1), mask=Padding(torch.tensor([22])))
    torch.testing.assert_close(padded[:, :22], layer(torch.cat(pieces[1], 1)[:, :22]))


@pytest.mark.parametrize("pieces", [[50], [13, 1, 36], [1] * 50, [4, 4, 42]], ids=str)
@pytest.mark.parametrize("plan", [*PLANS, PLANS], ids=str)
def test_decoding_equals_the_forward(plan, pieces):
    layer, x = combiner(plan, causal=True), torch.randn(2, 50, 16, dtype=torch.float64)
    outputs, state = [], layer.init_state(2)
    with torch.no_grad():
        for piece in x.split(pieces, dim=1):
            out, state = layer.step(piece, state)
            outputs.append(out)
        torch.testing.assert_close(torch.cat(outputs, 1), layer(x))


def test_the_state_of_fixed_blocks_holds_an_abstraction_a_block():
    """4096 tokens by blocks of 64: 64 keys and values, where full attention keeps 4096."""
    layer = CombinerAttention(16, heads=2, block_size=64, causal=True)
    with torch.no_grad():
        _, state = layer.step(torch.randn(1, 4096, 16), layer.init_state(1))
    assert state.plans[0].spans.length == 64
    assert state_bytes(state) == 2 * 64 * 16 * 4
    assert state.length == 4096


def test_dropout_drops_in_training_only():
    for plan in PLANS:
        layer, x = combiner(plan, dropout=0.5), torch.randn(1, 13, 16, dtype=torch.float64)
        assert torch.equal(layer(x), layer(x))
        assert not torch.allclose(layer.train()(x), layer(x))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"plan": "axial"}, "plan 'axial' is not known"),
        ({"plan": ()}, r"plan \(\)"),
        ({"plan": "fixed", "block_size": 0}, "block_size 0"),
    ],
)
def test_what_is_no_plan_is_refused(options, complaint):
    with pytest.raises(ValueError, match=f"CombinerAttention: {complaint}"):
        combiner(**options)


def test_segments_for_other_queries_are_refused():
    ids = torch.zeros(5, dtype=torch.long)
    with pytest.raises(ValueError, match="query_ids"):
        combiner("fixed")(torch.randn(1, 5, 16, dtype=torch.float64), mask=Segments(ids, ids))
