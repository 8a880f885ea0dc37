"""Partial attention is its formula, and keeps hearing the source where plain attention hears it less and less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from regard.models.language import Decoder
from regard.nn import MultiHeadAttention, PartialAttention
from regard.ops.masks import Segments
from regard.ops.positions import rotary

DIM, HEADS = 12, 3
BARE = {"after": False, "feed_forward": False, "language": False}
VARIANTS = [
    {},
    BARE,
    {"after": False},
    {"feed_forward": False, "language": False},
    {"position": "rotary"},
    {**BARE, "position": "rotary", "head_dim": 6},
]


def layer_of(seed: int = 0, **options: object) -> PartialAttention:
    torch.manual_seed(seed)
    given = {"heads": HEADS, "causal": True, "source_length": 4, "dtype": torch.float64, **options}
    layer = PartialAttention(DIM, **given)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def tokens(length: int = 11, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(layer: PartialAttention, x: Tensor, source: int, positions: Tensor | None = None) -> Tensor:
    """The equations of the docstring with whole matrices, pairs allowed one by one."""
    length = x.shape[1]
    if positions is None:
        positions = torch.tensor([*range(source), *range(length - source)])
    if layer.language is not None:
        x = x + torch.stack([layer.language[0 if token < source else 1] for token in range(length)])

    def sees(query: int, key: int) -> bool:
        return key <= query or (not layer.causal and query < source and key < source)

    def attend(part, queries: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
        query, key, value = (
            projection(given).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for projection, given in ((part.query, queries), (part.key, keys), (part.value, keys))
        )
        if layer.position == "rotary":
            query, key = rotary(query, positions), rotary(key, positions[: key.shape[2]])
        scores = (query @ key.mT / layer.head_dim**0.5).masked_fill(~allowed, -torch.inf)
        return part.output((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    allowed = torch.tensor([[sees(query, key) for key in range(length)] for query in range(length)])
    attended = attend(layer, x, x, allowed)
    h = x if layer.norm is None else layer.norm(x + attended)
    kept = h[:, :source]
    if layer.feed_forward is not None:
        first = torch.tanh(kept @ layer.feed_forward.first.weight.T + layer.feed_forward.first.bias)
        kept = first + first @ layer.feed_forward.second.weight.T + layer.feed_forward.second.bias
    return attended + attend(layer.partial, h, kept, allowed[:, :source])


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "source sees itself"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_layer_is_the_dense_formula(options: dict[str, object], causal: bool):
    layer, x = layer_of(causal=causal, **options), tokens().requires_grad_()
    found, wanted = layer(x), dense(layer, x, 4)
    assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    leaves = [x, *layer.parameters()]
    gradients = (torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted))
    for gradient, expected in zip(*gradients, strict=True):
        assert_close(gradient, expected, rtol=1e-10, atol=1e-11)


def test_given_positions_count_from_the_start_of_source_and_target():
    layer, x = layer_of(position="rotary"), tokens()
    given = torch.tensor([[10, 12, 14, 16, 40, 43, 46, 49, 52, 55, 58], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
    stretched = torch.tensor([0, 2, 4, 6, 0, 3, 6, 9, 12, 15, 18])
    assert_close(layer(x, positions=given)[:1], dense(layer, x[:1], 4, stretched))
    assert_close(layer(x, positions=given)[1:], layer(x)[1:])


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("position", [None, "rotary"])
def test_without_partial_output_it_is_multi_head_attention(after: bool, position: str | None):
    layer, x = layer_of(after=after, language=False, position=position), tokens()
    with torch.no_grad():
        layer.partial.output.weight.zero_()
    plain = MultiHeadAttention(DIM, heads=HEADS, causal=True, position=position, dtype=torch.float64)
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    separate = torch.tensor([0, 1, 2, 3, *range(7)])
    assert_close(layer(x), plain(x, positions=separate if position else None))


def test_two_equal_attentions_to_a_source_that_is_all_there_is_are_twice_one():
    layer, x = layer_of(**BARE, source_length=20), tokens()
    layer.partial.load_state_dict({name: layer.state_dict()[name] for name in layer.partial.state_dict()})
    plain = MultiHeadAttention(DIM, heads=HEADS, causal=True, dtype=torch.float64)
    plain.load_state_dict(layer.partial.state_dict())
    assert_close(layer(x), 2 * plain(x))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_sample_may_have_a_source_of_its_own_length(options: dict[str, object], causal: bool):
    layer, x = layer_of(causal=causal, **options), tokens(batch=3)
    out = layer(x, source_length=torch.tensor([2, 11, 5]))
    for sample, length in enumerate((2, 11, 5)):
        assert_close(out[sample], layer(x[sample : sample + 1], source_length=length)[0])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_packed_rows_with_lengths_of_their_own_equal_each_alone(options: dict[str, object]):
    layer, x = layer_of(**options), tokens()
    mask = Segments.from_lengths([6, 2, 3])
    out = layer(x, mask=mask, source_length=torch.tensor([1, 3]))
    for sample, length in enumerate((1, 3)):
        pieces = [layer(piece, source_length=length) for piece in x[sample : sample + 1].split([6, 2, 3], dim=1)]
        assert_close(out[sample : sample + 1], torch.cat(pieces, dim=1))


@pytest.mark.parametrize("pieces", [[1] * 11, [3, 4, 4], [11], [6, 5]], ids=str)
def test_lengths_given_to_a_state_hold_for_its_steps(pieces: list[int]):
    layer, x, lengths = layer_of(position="rotary"), tokens(), torch.tensor([2, 5])
    state, outputs = layer.init_state(2, source_length=lengths), []
    for piece in x.split(pieces, dim=1):
        out, state = layer.step(piece, state)
        outputs.append(out)
    assert_close(torch.cat(outputs, dim=1), layer(x, source_length=lengths))


def test_sample_without_a_source_gets_nothing_from_the_partial_attention():
    layer, x = layer_of(**BARE), tokens()
    plain = MultiHeadAttention(DIM, heads=HEADS, causal=True, dtype=torch.float64)
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    assert_close(layer(x, source_length=torch.tensor([0, 4]))[0], plain(x)[0])


def test_decoding_keeps_the_source_once_however_long_the_target():
    layer, state = layer_of(), layer_of().init_state(2)
    for _ in range(5):
        with torch.no_grad():
            _, state = layer.step(tokens(30), state)
    assert state.cache.length == 150
    assert state.source.length == 4


def test_a_source_that_is_not_causal_sees_itself_whole_and_no_target():
    x = tokens(batch=1).requires_grad_()
    out = layer_of(causal=False)(x)
    seen = torch.stack([torch.autograd.grad(out[:, token].sum(), x, retain_graph=True)[0][0] for token in range(11)])
    seen = seen.abs().sum(-1) > 1e-9
    wanted = torch.ones(11, 11).tril().bool()
    wanted[:4, :4] = True
    assert torch.equal(seen, wanted)


def test_map_shows_both_attentions_and_the_second_on_the_source_alone():
    weights, _ = layer_of().attention_map(tokens())
    own, partial = weights.chunk(2, dim=1)
    assert own.shape[1] == partial.shape[1] == HEADS
    assert (own[:, :, -1] > 0).all()
    assert (partial[..., 4:] == 0).all()
    assert_close(partial.sum(-1), torch.ones_like(partial[..., 0]))


@pytest.mark.parametrize("options", [BARE, {}], ids=["bare", "default"])
def test_source_keeps_a_share_that_no_length_takes_away(options: dict[str, object]):
    """Without scores plain attention hears a source token 1 / (t + 1) as much at position t; here something stays."""
    source, x = 4, tokens(200, batch=1)
    layer = layer_of(**options)
    plain = MultiHeadAttention(DIM, heads=HEADS, causal=True, dtype=torch.float64)
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    with torch.no_grad():
        for part in (layer, layer.partial, plain):
            part.query.weight.zero_()

    def of(module: torch.nn.Module, target: int) -> Tensor:
        return torch.autograd.functional.jacobian(
            lambda head: module(torch.cat([head, x[:, source:]], 1))[0, target], x[:, :source]
        )[:, 0]

    share = plain.output.weight @ plain.value.weight
    stays = of(layer, 30) - of(plain, 30)
    for target in (30, 60, 199):
        assert_close(of(plain, target), (share / (target + 1))[:, None].expand(-1, source, -1))
        assert_close(of(layer, target), of(plain, target) + stays)
    assert stays.norm() > 3 * of(plain, 199).norm()
    if options == BARE:
        assert_close(stays, (layer.partial.output.weight @ layer.partial.value.weight / 4)[:, None].expand(-1, 4, -1))


def test_decoder_takes_it_by_key_with_its_source():
    model = Decoder(11, "partial_attention", dim=DIM, heads=2, options={"source_length": 6})
    assert [block.mixer.source_length for block in model.blocks] == [6, 6]
    assert all(block.mixer.position == "rotary" for block in model.blocks)


@pytest.mark.parametrize("length", [0, -3])
def test_a_source_of_no_tokens_is_refused(length: int):
    with pytest.raises(ValueError, match=rf"PartialAttention: source_length {length}; give a positive number"):
        PartialAttention(DIM, heads=HEADS, source_length=length)


@pytest.mark.parametrize("lengths", [torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0]), torch.tensor(3)], ids=str)
def test_lengths_that_do_not_fit_the_batch_are_refused(lengths: Tensor):
    with pytest.raises(ValueError, match=r"source_length of shape .* one integer per sample: shape \(2,\)"):
        layer_of()(tokens(), source_length=lengths)
    with pytest.raises(ValueError, match="source_length of shape"):
        layer_of().init_state(2, source_length=lengths)


def test_positions_other_than_rotary_are_refused():
    with pytest.raises(ValueError, match="position 'alibi' is not known"):
        PartialAttention(DIM, heads=HEADS, position="alibi")
