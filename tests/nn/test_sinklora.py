"""SinkLoRA: groups, shifted heads and sinks as written out, released S²-Attn and H2O, two decoding states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regard.nn import GroupedQueryAttention, MultiHeadAttention, ShiftedSparseAttention
from regard.ops.masks import Causal, Segments, Tiles, plan
from regard.testing.checks.decoding import state_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "sinklora.safetensors"


def sinklora(**changes: object) -> ShiftedSparseAttention:
    torch.manual_seed(0)
    given = {"heads": 8, "block_size": 4, "sinks": 2, "causal": True, "dtype": torch.float64, **changes}
    return ShiftedSparseAttention(16, **given).eval()  # pyright: ignore[reportArgumentType]


def allowed(layer: ShiftedSparseAttention, length: int) -> Tensor:
    """The docstring's rule for each head: the last of them begin their groups half a group later."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    size, half = layer.block_size, layer.heads // 2
    rules = []
    for head in range(layer.heads):
        shifted = head >= half + int(layer.unshifted * half)
        shift = size // 2 if shifted else 0
        rules.append((query + shift) // size == (key + shift) // size)
    seen = torch.stack(rules) | (query < layer.sinks) | (key < layer.sinks)
    return seen & (key <= query) if layer.causal else seen


def by_definition(layer: ShiftedSparseAttention, x: Tensor) -> Tensor:
    query, key, value = layer.split(x, x)
    key, value = (tokens.repeat_interleave(layer.heads // layer.kv_heads, 1) for tokens in (key, value))
    scores = (query @ key.mT * layer.head_dim**-0.5).masked_fill(~allowed(layer, x.shape[1]), -torch.inf)
    return layer.combine(scores.softmax(-1) @ value)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"unshifted": 0.0, "sinks": 0}, {"unshifted": 1.0}, {"block_size": 5, "unshifted": 0.3}, {"kv_heads": 2}],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 11, 290])
def test_outputs_and_gradients_are_the_equations(length, options, causal):
    layer = sinklora(causal=causal, **options)
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    found, wanted = layer(x), by_definition(layer, x)
    torch.testing.assert_close(found, wanted)
    leaves = [x, *layer.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)))


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def released(golden: dict[str, Tensor], **options: object) -> ShiftedSparseAttention:
    layer = sinklora(heads=4, sinks=0, unshifted=0.0, **options)
    names = ("query", "key", "value", "output")
    layer.load_state_dict({f"{name}.weight": golden[f"s2.{name}"] for name in names})
    return layer


def test_without_sinks_and_unshifted_heads_it_is_the_released_s2_attention(golden):
    """But for the first half group, whose tokens see the end of the sequence there."""
    layer, x = released(golden), golden["s2.x"].requires_grad_()
    out = layer(x)
    torch.testing.assert_close(out[:, 2:], golden["s2.y"][:, 2:])
    weights = {name: getattr(layer, name).weight for name in ("query", "key", "value", "output")}
    grads = torch.autograd.grad(out, [x, *weights.values()], golden["s2.seed"])
    torch.testing.assert_close(list(grads), [golden[f"s2.grad_{name}"] for name in ("x", *weights)])


def test_the_release_looks_ahead_where_this_does_not(golden):
    assert (released(golden)(golden["s2.x"]) - golden["s2.y"])[:, :2].abs().amin() > 1e-4


def test_the_cache_evicts_as_the_released_h2o(golden):
    """Outputs, keys, values and the attention each had: a prompt of 10 tokens and 14 steps, of which 7 are kept."""
    layer = released(golden)
    state, outputs = layer.init_state(1, budget=7), []
    for piece in golden["h2o.x"].split([10] + [1] * 14, dim=1):
        out, state = layer.step(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), golden["h2o.y"])
    torch.testing.assert_close((state.key, state.value), (golden["h2o.key"], golden["h2o.value"]))
    torch.testing.assert_close(state.mass, golden["h2o.score"])


def test_one_group_is_full_attention():
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    for causal in (True, False):
        layer = sinklora(block_size=60, unshifted=1.0, causal=causal)
        full = MultiHeadAttention(16, heads=8, causal=causal, dtype=torch.float64)
        full.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), full(x))


def test_half_of_the_heads_is_shifted_and_a_share_of_those_returned():
    assert [sinklora(unshifted=share).shifted_heads for share in (0.0, 0.25, 0.5, 1.0)] == [4, 3, 2, 0]


def test_a_token_before_a_border_reaches_beyond_it_by_shifted_heads_only():
    layer = sinklora(sinks=0)
    weights, _ = layer.attention_map(torch.randn(1, 12, 16, dtype=torch.float64))
    assert (weights[0, :, 5, 3] > 0).tolist() == [False] * 6 + [True] * 2
    assert (weights[0, :, 7, 5] > 0).tolist() == [True] * 6 + [False] * 2


def test_all_causal_tokens_see_the_sinks_and_sinks_see_all_otherwise():
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    causal, both = (sinklora(causal=flag).attention_map(x)[0][0] for flag in (True, False))
    assert (causal[:, 2:, :2] > 0).all()
    assert (causal[:, :2, 2:] == 0).all()
    assert (both[:, :2] > 0).all()
    assert (both[:, :, :2] > 0).all()


def test_work_grows_with_the_groups_and_not_with_the_square():
    layer = ShiftedSparseAttention(64, block_size=512, causal=True)
    for length in (2**13, 2**14):
        made = plan(layer.full_mask(None), Tiles(1, 8, length, length, 128, 128))
        # Of a group half is visited, of the tiles the border of that, and the tile of the sinks.
        assert made.density * length < 512 * 0.75 + 128


def test_packed_sequences_have_groups_and_sinks_of_their_own():
    for causal in (True, False):
        layer = sinklora(causal=causal)
        pieces = [torch.randn(1, length, 16, dtype=torch.float64) for length in (7, 13, 22)]
        mask = Segments.from_lengths([7, 13, 22])
        packed = layer(torch.cat(pieces, 1), mask=Causal() & mask if causal else mask)
        torch.testing.assert_close(packed, torch.cat([layer(piece) for piece in pieces], 1))


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_a_pretrained_layer_keeps_its_weights_and_decodes_as_before_with_room_for_all(kv_heads):
    full = GroupedQueryAttention(16, heads=8, kv_heads=kv_heads, causal=True, position="rotary", dtype=torch.float64)
    layer = ShiftedSparseAttention.from_multi_head(full, block_size=4, sinks=2)
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    state, outputs = layer.init_state(2, budget=23), []
    for piece in x.split([5, 1, 1, 16], dim=1):
        out, state = layer.step(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), full(x))
    received = full.attention_map(x)[0].unflatten(1, (kv_heads, -1)).sum((2, 3))
    torch.testing.assert_close(state.mass, received)
    assert not torch.allclose(layer(x), full(x))


def test_a_heavy_hitter_stays_while_what_was_not_looked_at_goes():
    """Token 0 gets almost all attention; 20 tokens later it is there with the last ones, and 1 is not."""
    layer = sinklora(heads=1)
    with torch.no_grad():
        for name in ("query", "key", "value"):
            getattr(layer, name).weight.copy_(torch.eye(16))
    tokens = torch.zeros(1, 20, 16, dtype=torch.float64)
    tokens[:, :, 1] = 1
    tokens[:, 0, 1] = 50
    tokens[:, :, 2] = torch.arange(20)
    state = layer.init_state(1, budget=6)
    for token in tokens.split(1, dim=1):
        _, state = layer.step(token, state)
    assert state.value[0, 0, 0, 1] == 50
    assert state.value[0, 0, 3:, 2].tolist() == [17, 18, 19]


def test_states_stop_growing_at_the_group_and_at_the_budget():
    """The cache of H2O at a fifth of the tokens holds a fifth of what full attention keeps."""
    layer = sinklora()
    group, budgeted = layer.init_state(1), layer.init_state(1, budget=10)
    sizes = []
    with torch.no_grad():
        for _ in range(50):
            token = torch.randn(1, 1, 16, dtype=torch.float64)
            _, group = layer.step(token, group)
            _, budgeted = layer.step(token, budgeted)
            sizes.append((group.key.shape[2], budgeted.key.shape[2]))
    assert sizes[:7] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (5, 6), (5, 7)]
    assert sizes[-1] == (4 - 1 + 2, 10)
    full = 2 * 50 * 16 * 8
    assert state_bytes(budgeted) == full / 5 + 10 * 8 * 8


def test_half_types_keep_the_attention_that_was_had_in_float32():
    layer = sinklora(dtype=torch.bfloat16)
    _, state = layer.step(1e4 * torch.randn(2, 30, 16, dtype=torch.bfloat16), layer.init_state(2, budget=8))
    assert state.mass.dtype == torch.float32
    assert state.mass.isfinite().all()
    exact = sinklora()
    _, state = exact.step(torch.randn(2, 30, 16, dtype=torch.float64), exact.init_state(2, budget=40))
    torch.testing.assert_close(state.mass.sum(-1), torch.full((2, 8), 30.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"block_size": 0}, "block_size 0"),
        ({"sinks": -1}, "sinks -1"),
        ({"unshifted": 1.5}, "unshifted 1.5"),
        ({"position": "alibi"}, "position 'alibi'"),
    ],
)
def test_what_makes_no_groups_is_refused(options, complaint):
    with pytest.raises(ValueError, match=f"ShiftedSparseAttention: {complaint}"):
        sinklora(**options)


def test_an_empty_budget_and_a_layer_of_another_width_are_refused():
    with pytest.raises(ValueError, match="HeavyHitterCache: budget 0"):
        sinklora().init_state(1, budget=0)
    with pytest.raises(ValueError, match="context_dim=12"):
        ShiftedSparseAttention.from_multi_head(MultiHeadAttention(16, context_dim=12))
