"""The encoder classifies grids with any mechanism that takes tokens, a grid or a feature map."""

from __future__ import annotations

from math import prod

import pytest
import torch
from moved import moved, never_learning
from torch import Tensor

import regard
from regard.catalogue import card
from regard.models.mixers import mix_grid
from regard.models.vision import Encoder
from regard.testing.cases import Case, cases
from regard.testing.compare import assert_differs, assert_same

FEATURES, CLASSES = 3, 7
TOKENS = regard.mechanisms(pattern="noncausal self", input="tokens")
GATES = regard.mechanisms(input="feature_map")
MIXING = [
    case
    for key in regard.mechanisms()
    for case in cases(key)
    if case.pattern == ("noncausal self" if case.card.contract.patterns else None)
]
ONLY_CAUSAL = sorted(set(regard.mechanisms(pattern="causal self")) - set(regard.mechanisms(pattern="noncausal self")))


def encoder(case: Case, grid: tuple[int, ...] | None = None, **changes: object) -> Encoder:
    torch.manual_seed(0)
    given = {"dim": case.dim, "options": dict(case.option_set.arguments), "dtype": torch.float64, **changes}
    given = {"heads": case.arguments.get("heads", 2), **given}
    return moved(Encoder(grid or case.lengths(), FEATURES, CLASSES, case.card.key, **given).eval())


def features(grid: tuple[int, ...], batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *grid, FEATURES, generator=generator, dtype=torch.float64)


def test_every_kind_of_input_is_covered():
    assert {case.card.contract.input for case in MIXING} == {"tokens", "grid", "feature_map"}


@pytest.mark.parametrize("case", MIXING, ids=str)
def test_grids_become_logits(case: Case):
    logits = encoder(case)(features(case.lengths()))
    assert logits.shape == (2, CLASSES)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("case", MIXING, ids=str)
def test_every_parameter_learns_except_the_frozen(case: Case):
    names = dict(encoder(case).named_parameters())
    frozen = {name for name in names if name.endswith(tuple(f"mixer.{name}" for name in case.contract.frozen))}
    assert never_learning(lambda: encoder(case), features(case.lengths())) == frozen


@pytest.mark.parametrize("case", MIXING, ids=str)
def test_samples_do_not_know_of_each_other(case: Case):
    model, x = encoder(case), features(case.lengths(), batch=3)
    assert_same(model(x)[1:2], model(x[1:2]), "logits of a sample alone")


@pytest.mark.parametrize("case", MIXING, ids=str)
def test_the_mechanism_decides(case: Case):
    with_mechanism, without = encoder(case), encoder(case)
    for block in without.blocks:
        block.mixer.forward = torch.zeros_like
    x = features(case.lengths())
    assert_differs(with_mechanism(x), without(x), "logits with and without the mechanism")


@pytest.mark.parametrize("key", TOKENS)
@pytest.mark.parametrize("grid", [(6,), (3, 2), (1, 3, 2)], ids=str)
def test_token_mechanisms_take_grids_of_any_axes_row_by_row(key: str, grid: tuple[int, ...]):
    case = next(case for case in MIXING if case.card.key == key)
    model, flat = encoder(case, grid), encoder(case, (prod(grid),))
    flat.load_state_dict({**model.state_dict(), "position": model.position.flatten(0, -2)})
    x = features(grid)
    assert_same(model(x), flat(x.flatten(1, -2)), "logits of a grid and of its positions in a row")


@pytest.mark.parametrize("key", GATES)
def test_feature_maps_come_back_in_the_layout_of_grids(key: str):
    case = next(case for case in MIXING if case.card.key == key)
    gate, x = case.build(), torch.randn(2, *case.lengths(), case.dim, dtype=torch.float64)
    for row, column in ((0, 0), (2, 1)):
        assert_same(mix_grid(gate, x)[:, row, column], gate(x.permute(0, 3, 1, 2))[:, :, row, column], "a position")


@pytest.mark.parametrize("key", [key for key in TOKENS if "residual" in card(key).arguments])
def test_block_has_the_only_residual(key: str):
    model = Encoder((4,), FEATURES, CLASSES, key, dim=16)
    assert [block.mixer.residual for block in model.blocks] == [False, False]


def test_positions_tell_equal_pixels_apart():
    model = encoder(next(case for case in MIXING if case.card.key == "multi_head"), (4,))
    x = features((4,))
    assert_differs(model(x.flip(1)), model(x), "logits of pixels in another order")


@pytest.mark.parametrize("wrong", [(5, 4), (4,), (4, 5, 1), (20,)], ids=str)
def test_another_grid_is_refused(wrong: tuple[int, ...]):
    model = Encoder((4, 5), FEATURES, CLASSES, "multi_head", dim=16)
    shown = rf"x of shape \({', '.join(map(str, (2, *wrong, FEATURES)))}\) for a grid \(4, 5\)"
    with pytest.raises(ValueError, match=rf"Encoder: {shown}; give \(batch, \*grid, features\)"):
        model(torch.randn(2, *wrong, FEATURES))


@pytest.mark.parametrize("name", ["features", "classes", "layers"])
def test_sizes_that_make_no_model_are_refused(name: str):
    sizes = {"features": 1, "classes": 2, "layers": 1, name: 0}
    with pytest.raises(ValueError, match=rf"Encoder: {name} 0; give a positive number"):
        Encoder((4,), mechanism="multi_head", **sizes)


@pytest.mark.parametrize("key", ONLY_CAUSAL)
def test_mechanism_that_is_only_causal_is_refused(key: str):
    with pytest.raises(ValueError, match=rf"{key}: pattern 'noncausal self' is not known; "):
        Encoder((4,), FEATURES, CLASSES, key)


def test_option_that_the_mechanism_lacks_is_refused():
    with pytest.raises(TypeError, match=r"eca: argument 'window'.*window=3"):
        Encoder((4, 4), FEATURES, CLASSES, "eca", options={"window": 3})


def test_options_cannot_make_it_causal():
    with pytest.raises((ValueError, TypeError), match="causal"):
        Encoder((4,), FEATURES, CLASSES, "multi_head", options={"causal": True})
