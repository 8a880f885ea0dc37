"""S2-Attention: copied shards give what the mask says, heads see everything together, the cache keeps a share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regard.nn import MultiHeadAttention, S2Attention
from regard.ops import attention
from regard.ops.masks import Causal, Dense, Keys, Mask, Padding, Segments, Window
from regard.testing.checks.decoding import state_bytes

SIZES = {"block_size": 4, "local_blocks": 2, "vertical_stride": 3}


def s2(**changes: object) -> S2Attention:
    torch.manual_seed(0)
    given = {"heads": 4, **SIZES, "dtype": torch.float64, **changes}
    return S2Attention(16, **given).eval()  # pyright: ignore[reportArgumentType]


def by_definition(layer: S2Attention, x: Tensor, extra: Tensor | None = None) -> Tensor:
    """The docstring's equation with an n × n mask for each head."""
    length, group = x.shape[1], layer.heads // layer.kv_heads
    block = torch.arange(length) // layer.block_size
    heads = torch.arange(layer.heads)[:, None, None] // group
    step = max(1, layer.vertical_stride // layer.heads)
    shard = (block + heads * step) % layer.vertical_stride == 0
    allowed = (shard | (block[:, None] - block < layer.local_blocks)) & torch.ones(length, length).tril().bool()
    allowed = allowed if extra is None else allowed & extra
    query, key, value = layer.split(x, x)
    key, value = (tokens.repeat_interleave(group, 1) for tokens in (key, value))
    scores = (query @ key.mT * layer.head_dim**-0.5).masked_fill(~allowed, -torch.inf)
    return layer.combine(scores.softmax(-1).nan_to_num() @ value)


@pytest.mark.parametrize("length", [1, 7, 12, 13, 100, 301])
@pytest.mark.parametrize(
    "options", [{}, {"kv_heads": 2}, {"vertical_stride": 9}, {"block_size": 16, "local_blocks": 1}], ids=str
)
def test_outputs_and_gradients_are_the_equations(length, options):
    layer = s2(**options)
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    found, wanted = layer(x), by_definition(layer, x)
    torch.testing.assert_close(found, wanted)
    leaves = [x, *layer.parameters()]
    grads = (torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "mask",
    [Padding(torch.tensor([90, 3])), Keys(torch.arange(90) % 3 > 0), ~Window(5), Dense(torch.rand(90, 90) < 0.4)],
    ids=lambda mask: type(mask).__name__,
)
def test_a_mask_is_asked_where_the_keys_come_from(mask: Mask):
    layer, x = s2(kv_heads=2), torch.randn(2, 90, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x, mask=mask), by_definition(layer, x, mask.dense(90, 90, batch=2)))


def test_copied_shards_are_the_mask_alone():
    layer, x = s2(position="rotary", head_dim=6), torch.randn(2, 70, 16, dtype=torch.float64)
    query, key, value = layer.project(x, None, None, None)
    wanted = layer.combine(attention(query, key, value, mask=layer.full_mask(None), backend="reference"))
    torch.testing.assert_close(layer(x), wanted)


def test_the_copy_is_walked_by_all_heads_at_once():
    """No tile differs by head, and the shards and the band are all that is computed."""
    from regard.ops.masks import Tiles, plan

    layer = S2Attention(64, heads=8, block_size=64, local_blocks=1, vertical_stride=8)
    length = 2**14
    mask = layer._mask(length, 0, length, None, torch.device("cpu"))
    made = plan(mask, Tiles(1, 8, length, length + length // 8, 128, 128))
    assert made.states.shape[1] == 1
    visited = made.density * (length + length // 8) / length
    assert 1 / 16 < visited < 1 / 11


@pytest.mark.parametrize(("heads", "seen"), [(3, 24), (2, 16)])
def test_heads_together_see_the_whole_context_when_there_are_as_many_as_shards(heads, seen):
    layer = S2Attention(12, heads=heads, block_size=2, local_blocks=1, vertical_stride=3)
    x = torch.randn(1, 24, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0, -1].square().sum(), x)
    assert (gradient[0].abs().sum(-1) > 0).sum() == seen


def test_one_shard_is_causal_attention():
    layer, x = s2(vertical_stride=1), torch.randn(2, 60, 16, dtype=torch.float64)
    full = MultiHeadAttention(16, heads=4, causal=True, dtype=torch.float64)
    full.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), full(x))


def test_packed_sequences_have_shards_of_their_own():
    layer = s2()
    pieces = [torch.randn(1, length, 16, dtype=torch.float64) for length in (30, 45)]
    packed = layer(torch.cat(pieces, 1), mask=Causal() & Segments.from_lengths([30, 45]))
    torch.testing.assert_close(packed, torch.cat([layer(piece) for piece in pieces], 1))


@pytest.mark.parametrize("pieces", [[50], [13, 1, 36], [1] * 50], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_decoding_with_the_shards_equals_the_forward(pieces, kv_heads):
    layer, x = s2(position="rotary", kv_heads=kv_heads, head_dim=6), torch.randn(2, 50, 16, dtype=torch.float64)
    outputs, state = [], layer.init_state(2)
    with torch.no_grad():
        for piece in x.split(pieces, dim=1):
            out, state = layer.step(piece, state)
            outputs.append(out)
        torch.testing.assert_close(torch.cat(outputs, 1), layer(x))


def test_the_cache_holds_a_shard_and_the_band():
    """At 4096 tokens with 8 shards: 1/8 of the tokens and the near blocks, where full attention keeps all."""
    layer = S2Attention(16, heads=8, block_size=16, local_blocks=2, vertical_stride=8)
    state = layer.init_state(1)
    with torch.no_grad():
        _, state = layer.step(torch.randn(1, 4096, 16), state)
        assert state.shard_key.shape[2] == 4096 / 8
        assert state.key.shape[2] == 16
        for _ in range(40):
            _, state = layer.step(torch.randn(1, 1, 16), state)
            assert state.key.shape[2] < 2 * 16
    assert state.shard_key.shape[2] == 4096 / 8 + 16
    assert state_bytes(state) < 4136 * 2 * 16 * 4 / 7


def test_sizes_that_make_no_blocks_are_refused():
    for name in SIZES:
        with pytest.raises(ValueError, match=f"S2Attention: {name} 0"):
            s2(**{name: 0})
    with pytest.raises(ValueError, match="position 'alibi'"):
        s2(position="alibi")
