"""What attention selects, against cases worked out by hand, against all sets, and against its bounds on random data."""

from __future__ import annotations

import sys
from itertools import combinations
from math import isnan, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from regard.inspect.selectivity import Selection, selectivity
from tests.vision_peers import declare

POSITIVE = ("softmax", "sigmoid", "relu", "softplus_l1", "reversed")


def logits(*weights: float) -> torch.Tensor:
    """Logits of one query with these softmax weights."""
    return torch.tensor(weights, dtype=torch.float64).log().view(1, 1, 1, -1)


def points(*values: float) -> torch.Tensor:
    """Tokens on a line."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1)


def only(*arguments, **options) -> Selection:
    (selection,) = selectivity(*arguments, **options).selections
    return selection


def test_distance_and_its_bound_by_hand():
    found = only(logits(0.5, 0.3, 0.2), points(4, 0, -2), top=(1,))
    # s = 2; the others lie at 0 and −0.4, so |2| + |2.4|. d_1 = 6, and ‖x‖ of the selected is 4.
    assert found.distance == pytest.approx(4.4)
    assert found.distance_most == pytest.approx(0.5 * 6 + (2 * 0.5 - 0.5) * 4)
    assert found.keys == 3


def test_separable_share_and_its_lower_bound_by_hand():
    found = only(logits(0.5, 0.3, 0.2), points(2, 10 / 3, -5), top=(2,))
    # α x = 1, 1, −1 and s = 2: the selected lie 1 from s, the other one 3. ξ = 10/3 · 0.3 and 10/3 · 0.5.
    assert found.separable == 1
    assert found.separable_least == pytest.approx(1 - (1 + 5 / 3) / (2 * 3))
    crowded = only(logits(0.5, 0.3, 0.2), points(2, 10 / 3, 7.5), top=(2,))
    assert crowded.separable == 0


def test_nothing_is_separable_in_a_ball_with_a_token_not_selected():
    near, wide = (only(logits(0.5, 0.3, 0.2), points(2, 10 / 3, -5), top=(2,), radius=r) for r in (1.5, 3.5))
    assert (near.separable, wide.separable, wide.separable_least) == (1, 0, 0)
    assert only(logits(0.5, 0.3, 0.2), points(2, 10 / 3, -5), top=(2,), radius=0.5).separable == 0


@pytest.mark.parametrize(("length", "top"), [(7, 1), (7, 3), (20, 3)])
def test_equal_tokens_of_equal_weight_are_like_a_random_set(length: int, top: int):
    found = only(torch.zeros(1, 1, 1, length).double(), torch.full((1, 1, length, 4), 0.5), top=(top,))
    assert found.distance == pytest.approx((length - top) * (top - 1) / length)
    assert found.random_least == pytest.approx(found.distance)
    # A variance of 0 is computed as a difference, and its root is roundoff's.
    assert found.random_most == pytest.approx(found.distance, abs=1e-6)


@pytest.mark.parametrize("top", [1, 2, 4])
def test_mean_distance_over_all_sets_lies_between_its_bounds(top: int):
    torch.manual_seed(top)
    scores, tokens = torch.randn(1, 1, 1, 6).double(), torch.randn(1, 1, 6, 3).double()
    scaled = scores.softmax(-1).view(6, 1) * tokens[0, 0]
    sums = []
    for chosen in combinations(range(6), top):
        others = [i for i in range(6) if i not in chosen]
        sums.append((scaled[list(chosen)].sum(0) - scaled[others]).norm(dim=-1).sum().item())
    found = only(scores, tokens, top=(top,))
    mean = sum(sums) / len(sums)
    assert found.random_least <= mean <= found.random_most
    assert found.random_most - found.random_least < mean


@given(
    st.integers(0, 10_000),
    st.sampled_from(POSITIVE),
    st.sampled_from([0.05, 0.5, 1.0, 4.0]),
    st.integers(1, 6),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_bounds_hold_on_random_data(seed: int, normalizer: str, temperature: float, top: int, causal: bool):
    torch.manual_seed(seed)
    scores, tokens = 2 * torch.randn(1, 1, 9, 9).double(), torch.randn(1, 1, 9, 3).double()
    if causal:
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    found = only(scores, tokens, top=(top,), normalizers=(normalizer,), temperatures=(temperature,), rows=9)
    room = 1 + 1e-9
    assert found.distance <= found.distance_most * room
    assert found.random_least <= found.random_most * room
    assert found.separable_least <= found.separable + 1e-9
    assert 0 <= found.separable <= 1
    for value, most in ((found.slope, found.slope_most), (found.entry, found.entry_most)):
        assert isnan(most) or value <= most * room


@pytest.mark.parametrize("radius", [0.02, 0.1, 0.3])
def test_upper_bound_holds_on_average_over_the_sphere(radius: float):
    torch.manual_seed(0)
    tokens = torch.randn(4000, 1, 6, 8).double()
    tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    scores = torch.tensor([2.0, 1.8, 1.7, 1.5, 0.0, -1.0]).double().expand(4000, 1, 1, 6)
    found = only(scores, tokens, top=(4,), radius=radius)
    assert found.separable <= found.separable_most
    assert found.separable_most < 1 or radius > 0.2


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_two_equal_logits_have_the_steepest_softmax(temperature: float):
    found = only(torch.zeros(1, 1, 1, 2).double(), points(1, 2), top=(1,), temperatures=(temperature,))
    assert found.slope == pytest.approx(1 / (2 * temperature))
    assert found.entry == pytest.approx(1 / (4 * temperature))
    assert (found.slope_most, found.entry_most) == pytest.approx((1 / (2 * temperature), 1 / (4 * temperature)))


def test_slopes_of_other_normalizers():
    scores, tokens = torch.full((1, 1, 1, 3), log(3)).double(), points(1, 2, 4)
    sigmoid, relu = (only(scores, tokens, top=(1,), normalizers=(name,)) for name in ("sigmoid", "relu"))
    assert (sigmoid.slope, sigmoid.slope_most) == pytest.approx((0.25, 0.25))
    assert (relu.slope, relu.slope_most) == pytest.approx((1 / 3, 1 / 3))
    undefined = only(scores, tokens, top=(1,), normalizers=("reversed",))
    assert isnan(undefined.slope)
    assert isnan(undefined.entry_most)


def test_bounds_are_undefined_for_weights_that_may_be_negative():
    torch.manual_seed(0)
    scores, tokens = torch.randn(1, 2, 4, 6).double(), torch.randn(1, 2, 6, 3).double()
    for found in selectivity(scores, tokens, normalizers=("layer_norm_scores",)).selections:
        assert isnan(found.distance_most)
        assert isnan(found.separable_least)
        assert found.random_least <= found.random_most


def test_masked_keys_are_as_good_as_absent():
    torch.manual_seed(0)
    scores, tokens = torch.randn(2, 2, 3, 5), torch.randn(2, 1, 5, 4)
    padded = torch.cat([scores, torch.full((2, 2, 3, 4), -torch.inf)], -1)
    filled = torch.cat([tokens, torch.full((2, 1, 4, 4), 50.0)], 2)
    for left, right in zip(
        selectivity(scores, tokens, top=(1, 3), normalizers=POSITIVE).selections,
        selectivity(padded, filled, top=(1, 3), normalizers=POSITIVE).selections,
        strict=True,
    ):
        assert vars(left) == pytest.approx(vars(right), nan_ok=True)


def test_rows_with_no_more_than_top_keys_do_not_count():
    torch.manual_seed(0)
    causal = torch.ones(6, 6).triu(1).bool()
    scores = torch.randn(1, 1, 6, 6).masked_fill(causal, -torch.inf)
    found = only(scores, torch.randn(1, 1, 6, 2), top=(4,), rows=6)
    assert found.keys == 5.5
    last = only(scores, torch.randn(1, 1, 6, 2), top=(5,), rows=6)
    assert last.keys == 6


def test_a_selection_for_every_setting_and_head():
    scores, tokens = torch.randn(1, 2, 4, 6), torch.randn(1, 2, 6, 3)
    found = selectivity(scores, tokens, top=(1, 2), normalizers=("softmax", "relu"), temperatures=(1, 2, 3))
    assert len(found.selections) == 2 * 2 * 2 * 3
    assert len(found.mean("normalizer")) == 2
    console = Console(width=200)
    with console.capture() as capture:
        console.print(found.table())
    assert capture.get().count("relu") == 6
    assert len(found.figure().data) > 0


def test_model_is_measured_at_every_site_as_its_weights_and_values_are():
    declare()
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2Model._from_config(config, attn_implementation="eager").eval()
    inputs = {"input_ids": torch.randint(0, 50, (2, 9)), "output_attentions": True}
    values = []
    for block in model.h:
        block.attn.c_attn.register_forward_hook(
            lambda _, __, out: values.append(out.chunk(3, -1)[2].unflatten(-1, (2, 8)).transpose(1, 2))
        )
    maps = model(**inputs).attentions
    expected = [one for a, v in zip(maps, values, strict=True) for one in selectivity(a.log(), v, top=(2,)).selections]
    found = selectivity(model, {"input_ids": inputs["input_ids"]}, top=(2,)).selections
    assert [each.head for each in found] == [0, 1, 0, 1]
    assert len({each.site for each in found}) == 2
    for left, right in zip(found, expected, strict=True):
        measured = {name: value for name, value in vars(left).items() if isinstance(value, float)}
        assert measured == pytest.approx({name: vars(right)[name] for name in measured}, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top": (0,)}, r"selectivity: top \[0\]; give positive numbers"),
        ({"temperatures": (0.0,)}, r"temperatures \[0.0\]"),
        ({"radius": -1.0}, r"radius \[-1.0\]"),
        ({"top": (6,)}, "top 6 of rows with up to 6 keys; give less than that"),
        ({"data": torch.randn(1, 2, 5, 3)}, r"scores of shape \(1, 2, 4, 6\) and tokens of shape \(1, 2, 5, 3\)"),
        ({"data": {"x": 1}}, r"tokens of shape \(0,\)"),
        ({"normalizers": ("softmx",)}, "did you mean 'softmax'"),
        ({"source": torch.nn.Linear(2, 2)}, "data is a Tensor; give a model its arguments"),
    ],
)
def test_unfit_arguments_are_refused(change: dict, message: str):
    arguments = {"source": torch.randn(1, 2, 4, 6), "data": torch.randn(1, 2, 6, 3), **change}
    with pytest.raises(ValueError, match=message):
        selectivity(**arguments)


def test_figure_without_plotly_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    found = selectivity(logits(0.5, 0.3, 0.2), points(4, 0, -2), top=(1,))
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ModuleNotFoundError, match=r"regard\[inspect\]"):
        found.figure()
