"""MoBA: the authors' numbers, the equations, the ties to full attention, and what a query is spared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from regard.models.language import Decoder
from regard.nn import GroupedQueryAttention, MixtureOfBlockAttention, MultiHeadAttention
from regard.ops import attention
from regard.ops.blocks import block_means
from regard.ops.masks import Causal, Padding, Segments

GOLDEN = Path(__file__).parents[1] / "golden" / "moba.safetensors"


def moba(block_size: int = 4, top_k: int = 3, **changes: object) -> MixtureOfBlockAttention:
    torch.manual_seed(0)
    given = {"heads": 4, "block_size": block_size, "top_k": top_k, "dtype": torch.float64, **changes}
    return MixtureOfBlockAttention(16, **given).eval()  # pyright: ignore[reportArgumentType]


def tokens(length: int, *, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full_attention(layer: MixtureOfBlockAttention) -> GroupedQueryAttention:
    given = {"heads": 4, "kv_heads": layer.kv_heads, "position": layer.position, "causal": True}
    full = GroupedQueryAttention(16, **given, dtype=torch.float64).eval()  # pyright: ignore[reportArgumentType]
    full.load_state_dict(layer.state_dict())
    return full


def by_definition(layer: MixtureOfBlockAttention, x: Tensor) -> Tensor:
    """The docstring's equations for each query by itself."""
    query, key, value = layer.project(x, None, None, None)
    key, value = (part.repeat_interleave(layer.heads // layer.kv_heads, 1) for part in (key, value))
    size, out = layer.block_size, torch.zeros_like(query)
    for at in [(b, h) for b in range(len(x)) for h in range(layer.heads)]:
        blocks = key[at].detach().split(size)
        for i, q in enumerate(query[at]):
            own = i // size
            scores = {c: float(q.detach() @ blocks[c].mean(0)) for c in range(own)}
            chosen = sorted(scores, key=lambda c: -scores[c])[: layer.top_k - 1]
            seen = torch.tensor([j for j in range(i + 1) if j // size in (*chosen, own)])
            weights = (key[at][seen] @ q * layer.head_dim**-0.5).softmax(-1)
            out[(*at, i)] = weights @ value[at][seen]
    return layer.combine(out)


def assert_same(layer: MixtureOfBlockAttention, x: Tensor, found: Tensor, wanted: Tensor) -> None:
    assert_close(found, wanted)
    leaves = [x, *layer.parameters()]
    assert_close(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)))


@pytest.mark.parametrize("length", [1, 4, 5, 31])
@pytest.mark.parametrize(
    "options", [{}, {"kv_heads": 2}, {"top_k": 1}, {"position": "rotary", "block_size": 3}], ids=str
)
def test_outputs_and_gradients_are_the_equations(length, options):
    layer, x = moba(**options), tokens(length).requires_grad_()
    assert_same(layer, x, layer(x), by_definition(layer, x))


def test_long_sequences_that_no_dense_mask_holds_are_the_equations():
    layer, x = moba(64, 2, heads=2, kv_heads=1), tokens(300, batch=1).requires_grad_()
    assert_same(layer, x, layer(x), by_definition(layer, x))


@pytest.mark.parametrize("keys", [23, 30])
def test_queries_choose_the_same_however_many_at_once(keys, monkeypatch):
    layer, query, key = moba(), torch.randn(2, 4, 23, 4), torch.randn(2, 4, keys, 4)
    means = block_means(key, 4)[:, :, : keys // 4]
    whole = layer.route(query, means, keys)
    monkeypatch.setattr("regard.nn.sparse.moba.AT_ONCE", 5)
    some = layer.route(query, means, keys)
    assert torch.equal(some.visits, whole.visits)
    assert some.offset is whole.offset is None or torch.equal(some.offset, whole.offset)


@pytest.mark.parametrize("how", ["packed", "one"])
def test_the_authors_naive_form_gives_the_same_numbers(how):
    kept = load_file(GOLDEN)
    layer = MixtureOfBlockAttention(12, heads=4, kv_heads=2, head_dim=4, block_size=4, top_k=3, dtype=torch.float64)
    layer.load_state_dict({f"{name}.weight": kept[f"weight.{name}"] for name in ("query", "key", "value", "output")})
    x = kept["x"].requires_grad_()
    out = layer(x, mask=Segments.from_lengths(kept["lengths"].tolist()) if how == "packed" else None)
    assert_close(out, kept[f"{how}.out"])
    grads = torch.autograd.grad(out, [x, *layer.parameters()], kept["seed"])
    names = ["x", *(f"weight.{name.removesuffix('.weight')}" for name, _ in layer.named_parameters())]
    for name, grad in zip(names, grads, strict=True):
        assert_close(grad, kept[f"{how}.grad.{name}"])


@pytest.mark.parametrize(("block_size", "top_k"), [(4, 9), (64, 1), (1, 33)])
def test_with_as_many_blocks_as_there_are_it_is_full_attention(block_size, top_k):
    layer, x = moba(block_size, top_k, kv_heads=2, position="rotary"), tokens(33).requires_grad_()
    full = full_attention(layer)
    assert_close(layer(x), full(x))
    packed = Segments.from_lengths([20, 13])
    assert_close(layer(x, mask=packed), full(x, mask=packed))


def test_packed_sequences_have_blocks_of_their_own_that_differ_by_sample():
    layer = moba(top_k=2)
    splits = [[17, 1, 15], [3, 3, 27]]
    x = tokens(33).requires_grad_()
    packed = layer(x, mask=Segments(torch.stack([Segments.from_lengths(split).ids for split in splits])))
    alone = [
        torch.cat([layer(part) for part in row[None].split(split, 1)], 1) for row, split in zip(x, splits, strict=True)
    ]
    assert_same(layer, x, packed, torch.cat(alone))


def test_many_short_sequences_in_a_row_have_no_earlier_blocks():
    layer, x = moba(8), tokens(30)
    each = Segments.from_lengths([3] * 10)
    assert_close(layer(x, mask=each), full_attention(layer)(x, mask=each))


def test_a_row_of_the_map_holds_the_chosen_blocks_and_no_more():
    """At most k blocks each, the own one among them, and in later blocks just k."""
    layer, x = moba(4, 3), tokens(40)
    weights, _ = layer.attention_map(x)
    visited = weights.unflatten(-1, (10, 4)).sum(-1) > 0
    own = torch.arange(40) // 4
    assert visited.gather(-1, own[None, None, :, None].expand(2, 4, -1, -1)).all()
    assert_close(visited.sum(-1), (own + 1).clamp(max=3).expand(2, 4, -1))
    assert (visited[:, 0] != visited[:, 1]).any()


def test_choosing_has_no_gradient():
    """A key of a block that nobody chooses has none, though it decides whether its block is chosen."""
    layer, x = moba(4, 1), tokens(24)
    query, key, value = (part.detach().requires_grad_() for part in layer.project(x, None, None, None))
    chosen = layer.route(query, block_means(key, 4), 24)
    assert not chosen.visits.requires_grad
    out = attention(query, key, value, mask=Causal() & chosen)
    (grad,) = torch.autograd.grad(out[:, :, 20:].square().sum(), key)
    assert (grad[:, :, :20] == 0).all()
    assert (grad[:, :, 20:] != 0).any()


@pytest.mark.parametrize("pieces", [[30], [3, 9, 18], [1] * 30], ids=str)
def test_decoding_chooses_among_cached_blocks(pieces):
    layer, x = moba(4, 2, kv_heads=2, position="rotary"), tokens(30)
    outputs, state = [], layer.init_state(2)
    with torch.no_grad():
        for piece in x.split(pieces, dim=1):
            out, state = layer.step(piece, state)
            outputs.append(out)
        assert_close(torch.cat(outputs, 1), layer(x))
    assert state.means.length == 7


def test_a_prompt_read_by_blocks_goes_on_with_full_attention_and_back():
    """The paper's evaluation: the state is the same, whichever way it was filled."""
    layer, x = moba(4, 2), tokens(30)
    full = full_attention(layer)
    with torch.no_grad():
        _, state = layer.step(x[:, :20], layer.init_state(2))
        layer.full = True
        out, state = layer.step(x[:, 20:29], state)
        assert_close(out, full(x)[:, 20:29])
        layer.full = False
        out, _ = layer.step(x[:, 29:], state)
        assert_close(out, layer(x)[:, 29:])


def test_a_trained_layer_is_converted_and_switched_at_any_time():
    torch.manual_seed(0)
    full = GroupedQueryAttention(16, heads=4, position="rotary", bias=True, causal=True, dtype=torch.float64)
    layer, x = MixtureOfBlockAttention.from_attention(full, block_size=4, top_k=2), tokens(30)
    assert_close(layer(x)[:, :8], full(x)[:, :8])
    assert (layer(x)[:, 8:] - full(x)[:, 8:]).abs().amax() > 1e-3
    layer.full = True
    assert_close(layer(x), full(x))
    padded = Padding(torch.tensor([30, 7]))
    assert_close(layer(x, mask=padded), full(x, mask=padded))
    with pytest.raises(ValueError, match="causal=False"):
        MixtureOfBlockAttention.from_attention(MultiHeadAttention(16, heads=4))


def test_the_last_layers_of_a_model_stay_full():
    model = Decoder(5, "moba", layers=4, options={"block_size": 2, "top_k": 1, "full_from": 3})
    assert [block.mixer.full for block in model.blocks] == [False, False, False, True]


def test_a_query_reads_k_blocks_however_long_the_context():
    """The claim: at a fixed k the keys read grow with n, not n². 3 blocks of 16 among 256 are 1.2 % of the pairs."""
    layer = MixtureOfBlockAttention(16, heads=2, block_size=16, top_k=3)
    query, key, _ = layer.project(torch.randn(1, 4096, 16), None, None, None)
    chosen = layer.route(query, block_means(key, 16), 4096)
    assert chosen.density == pytest.approx(3 / 256, rel=0.01)


def test_sizes_that_make_no_blocks_are_refused():
    for name in ("block_size", "top_k"):
        with pytest.raises(ValueError, match=f"MixtureOfBlockAttention: {name} 0"):
            moba(**{name: 0})
    with pytest.raises(ValueError, match="full_from -1"):
        moba(full_from=-1)
    with pytest.raises(ValueError, match="position 'alibi'"):
        moba(position="alibi")
