"""The decoder is causal, learns with all its parts and decodes step by step, whatever the mechanism."""

from __future__ import annotations

import copy

import pytest
import torch
from moved import moved, never_learning
from torch import Tensor

import regard
from regard.catalogue import card
from regard.models.language import Decoder, ShortConvolution
from regard.models.mixers import takes_rotary
from regard.ops.biases import Alibi
from regard.testing.cases import Case, cases
from regard.testing.compare import assert_differs, assert_same, assert_zero, weighted_sum

CAUSAL = regard.mechanisms(pattern="causal self", input="tokens")
STEPPING = regard.mechanisms(pattern="causal self", input="tokens", step=True)
OF_NO_GRID = set(regard.mechanisms()) - set(regard.mechanisms(input="grid"))
NOT_CAUSAL = sorted(OF_NO_GRID - set(regard.mechanisms(pattern="causal self")))
VOCABULARY, LENGTH = 11, 14


def causal_cases(keys: list[str]) -> list[Case]:
    return [case for key in keys for case in cases(key) if case.pattern == "causal self"]


def decoder(case: Case, **changes: object) -> Decoder:
    torch.manual_seed(0)
    given = {"dim": case.dim, "options": dict(case.option_set.arguments), "dtype": torch.float64, **changes}
    return moved(Decoder(VOCABULARY, case.card.key, **{"heads": case.arguments.get("heads", 2), **given}).eval())


def tokens(length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def feed(model: Decoder, pieces: list[Tensor], state: object) -> tuple[Tensor, object]:
    outputs = []
    for piece in pieces:
        out, state = model.step(piece, state)
        outputs.append(out)
    return torch.cat(outputs, dim=1), state


def influence(model: Decoder, place: int) -> Tensor:
    """How much each token of a sequence moves the logits at `place`: the gradient's largest entry."""
    with torch.no_grad():
        embedded = model.embedding(tokens()[:1])
    leaf = embedded.requires_grad_()
    hook = model.embedding.register_forward_hook(lambda module, inputs, out: leaf)
    logits = model(tokens()[:1])
    hook.remove()
    (gradient,) = torch.autograd.grad(weighted_sum(logits[:, place]), leaf)
    return gradient.abs().amax(-1)[0]


@pytest.mark.parametrize("case", causal_cases(CAUSAL), ids=str)
def test_logits_do_not_depend_on_later_tokens(case: Case):
    model, x = decoder(case), tokens()
    changed = x.clone()
    changed[:, 9:] = (x[:, 9:] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(x), model(changed)
    assert_same(after[:, :9], before[:, :9], "logits before the tokens that changed")
    assert_differs(after[:, 9], before[:, 9], "logits of a token that changed")


@pytest.mark.parametrize("case", causal_cases(CAUSAL), ids=str)
def test_later_tokens_get_no_gradient(case: Case):
    found = influence(decoder(case), 9)
    assert_zero(found[10:], "gradient of later tokens")
    assert found[9] > 1e-6
    assert found[8] > 1e-6


@pytest.mark.parametrize("case", causal_cases(CAUSAL), ids=str)
def test_every_parameter_learns(case: Case):
    exempt = tuple(f"mixer.{name}" for name in case.contract.frozen)
    assert not [name for name in never_learning(lambda: decoder(case), tokens()) if not name.endswith(exempt)]


@pytest.mark.parametrize("case", causal_cases(STEPPING), ids=str)
def test_token_by_token_equals_forward(case: Case):
    model, x = decoder(case), tokens()
    with torch.no_grad():
        found, _ = feed(model, [*x.split(1, dim=1)], model.init_state(2))
        assert_same(found, model(x), "logits of the steps")


@pytest.mark.parametrize("pieces", [[9, 1, 1, 3], [2, 12], [14]], ids=str)
@pytest.mark.parametrize("key", STEPPING)
def test_pieces_of_any_length_equal_forward(key: str, pieces: list[int]):
    model, x = decoder(causal_cases([key])[0]), tokens()
    with torch.no_grad():
        found, _ = feed(model, [*x.split(pieces, dim=1)], model.init_state(2))
        assert_same(found, model(x), "logits of the pieces")


@pytest.mark.parametrize("key", STEPPING)
def test_a_state_can_be_continued_twice(key: str):
    model, x, other = decoder(causal_cases([key])[0]), tokens(), tokens(seed=2)
    with torch.no_grad():
        _, state = feed(model, [x[:, :5]], model.init_state(2))
        kept = copy.deepcopy(state)
        feed(model, [*other[:, 5:].split(2, dim=1)], state)
        again, _ = feed(model, [x[:, 5:]], state)
        assert_same(again, model(x)[:, 5:], "logits after another branch went on from the state")
        assert_same(again, feed(model, [x[:, 5:]], kept)[0], "logits from a copy of the state")


@pytest.mark.parametrize("key", NOT_CAUSAL)
def test_mechanism_that_is_not_causal_is_refused(key: str):
    with pytest.raises(ValueError, match=rf"{key}: pattern 'causal self' is not known; "):
        Decoder(VOCABULARY, key)


def test_unknown_mechanism_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="mechanism 'lightening' is not known; did you mean 'lightning'"):
        Decoder(VOCABULARY, "lightening")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"layers": 0}, "layers 0"), ({"convolution": 0}, "convolution 0"), ({"layers": -1}, "layers -1")],
)
def test_sizes_that_make_no_model_are_refused(changes: dict[str, int], problem: str):
    with pytest.raises(ValueError, match=rf"Decoder: {problem}; give a positive number"):
        Decoder(VOCABULARY, "multi_head", **changes)


def test_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match="Decoder: vocabulary 0; give a positive number"):
        Decoder(0, "multi_head")


def test_option_that_the_mechanism_lacks_is_refused():
    with pytest.raises(TypeError, match=r"window: argument 'windows'.*did you mean 'window'\?.*windows=3"):
        Decoder(VOCABULARY, "window", options={"windows": 3})


def test_heads_that_do_not_divide_dim_are_refused():
    with pytest.raises(ValueError, match="heads 3 does not divide dim 64; change either"):
        Decoder(VOCABULARY, "multi_head", heads=3)


@pytest.mark.parametrize("key", [key for key in CAUSAL if "causal" in card(key).arguments])
def test_options_cannot_undo_causality(key: str):
    with pytest.raises((ValueError, TypeError), match="causal"):
        Decoder(VOCABULARY, key, options={"causal": False})


def test_options_reach_every_layer():
    model = Decoder(VOCABULARY, "gqa", dim=16, heads=4, layers=3, options={"kv_heads": 2, "head_dim": 6})
    assert [tuple(block.mixer.key.weight.shape) for block in model.blocks] == [(12, 16)] * 3


def test_window_option_bounds_how_far_a_decoder_sees():
    case = next(case for case in causal_cases(["window"]) if not case.option_set.arguments)
    found = influence(decoder(case, layers=1, convolution=1, options={"window": 3}), 9)
    assert (found > 1e-9).nonzero().flatten().tolist() == [7, 8, 9]


def test_convolution_alone_sees_its_width():
    case = next(case for case in causal_cases(["window"]) if not case.option_set.arguments)
    found = influence(decoder(case, layers=1, convolution=4, options={"window": 1}), 9)
    assert (found > 1e-9).nonzero().flatten().tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize("key", CAUSAL)
def test_rotary_is_given_exactly_where_it_is_taken_and_no_position_is_there(key: str):
    model = Decoder(VOCABULARY, key, dim=16)
    given = [getattr(block.mixer, "position", None) for block in model.blocks]
    heads = {"heads": 2} if "heads" in card(key).arguments else {}
    alone = getattr(card(key).build(16, **heads), "position", None)
    assert given == ["rotary" if takes_rotary(card(key)) else alone] * 2
    assert not takes_rotary(card(key)) or alone is None


@pytest.mark.parametrize("key", [key for key in CAUSAL if takes_rotary(card(key))])
def test_rotary_is_taken_by_a_proved_option_set(key: str):
    proved = [option_set.arguments for option_set in card(key).option_sets()]
    assert {"position": "rotary"}.items() <= next(given for given in proved if "position" in given).items()


def test_position_option_goes_before_rotary():
    model = Decoder(VOCABULARY, "multi_head", dim=16, heads=4, options={"position": "alibi"})
    for block in model.blocks:
        torch.testing.assert_close(block.mixer.slopes, Alibi.for_heads(4).slopes)


@pytest.mark.parametrize("key", [key for key in CAUSAL if {"layer", "layers"} <= set(card(key).arguments)])
def test_layers_know_their_index(key: str):
    torch.manual_seed(0)
    model = Decoder(VOCABULARY, key, dim=16, heads=2, layers=3)
    for index, block in enumerate(model.blocks):
        alone = card(key).build(16, heads=2, layer=index, layers=3)
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(block.mixer.get_buffer(name), buffer)


def test_later_lightning_layers_decay_less():
    model = Decoder(VOCABULARY, "lightning", dim=16, layers=3)
    first, middle, last = (block.mixer.log_decay for block in model.blocks)
    assert (first < middle).all()
    assert (middle < last).all()


def by_definition(weight: Tensor, x: Tensor) -> Tensor:
    """y_t = Σ_j w_j x_(t − width + 1 + j), zeros before the first token."""
    width, length = weight.shape[-1], x.shape[1]
    out = torch.zeros_like(x)
    for place in range(length):
        for tap in range(width):
            if place - width + 1 + tap >= 0:
                out[:, place] += weight[:, 0, tap] * x[:, place - width + 1 + tap]
    return out


@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize("length", [1, 3, 7])
def test_short_convolution_is_its_definition(width: int, length: int):
    layer = ShortConvolution(5, width, dtype=torch.float64)
    x = torch.randn(2, length, 5, dtype=torch.float64, requires_grad=True)
    found, wanted = layer(x), by_definition(layer.weight, x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    leaves = [x, layer.weight]
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("pieces", [[1] * 7, [3, 4], [6, 1], [1, 6]], ids=str)
def test_short_convolution_carries_its_state_across_calls(width: int, pieces: list[int]):
    layer = ShortConvolution(5, width, dtype=torch.float64)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    outputs, state = [], layer.init_state(2)
    for piece in x.split(pieces, dim=1):
        out, state = layer.step(piece, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x), rtol=1e-12, atol=1e-12)
    assert state.shape == (2, width - 1, 5)


def test_short_convolution_of_width_one_scales_each_channel():
    layer, x = ShortConvolution(5, 1, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x * layer.weight[:, 0, 0])


def test_short_convolution_does_not_see_later_tokens():
    layer, x = ShortConvolution(3, 4, dtype=torch.float64), torch.randn(1, 8, 3, dtype=torch.float64)
    later = x.clone()
    later[:, 5:] += 1
    assert torch.equal(layer(later)[:, :5], layer(x)[:, :5])
    assert (layer(later)[:, 5] != layer(x)[:, 5]).all()


def test_mechanism_over_a_grid_is_refused():
    with pytest.raises(ValueError, match="mechanism 'dinat' takes a grid; choose one of"):
        Decoder(VOCABULARY, "dinat")
