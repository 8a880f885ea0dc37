"""A cut edge is a masked one, layer by layer, and what it costs is the answer's probability."""

from __future__ import annotations

from math import exp
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from regard.inspect.attention_knockout import attention_knockout
from tests.inspect.induction import DEPTH, WIDTH, induction, tiny_llava
from tests.sites.families import FAMILIES

IMAGE = slice(1, 5)


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava()


@pytest.fixture(scope="module")
def asked() -> dict[str, Tensor]:
    """⟨s⟩, four patches, five words; two samples."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 10), generator=random)
    ids[:, IMAGE] = 97
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=random)}


@pytest.fixture(scope="module")
def copier() -> Any:
    return induction()


def masked_in_layers(model: Any, inputs: dict[str, Tensor], cut: Tensor, layers: range) -> Tensor:
    """Probabilities of the next token where these layers are handed a mask without the edges `cut`."""
    length = cut.shape[-1]
    mask = torch.zeros(length, length, dtype=torch.float64)
    mask = mask.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1) | cut, -torch.inf)[None, None]

    def hand(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    hooks = [
        model.model.language_model.layers[layer].register_forward_pre_hook(hand, with_kwargs=True) for layer in layers
    ]
    with torch.no_grad():
        probabilities = model(**inputs).logits[:, -1].softmax(-1)
    for hook in hooks:
        hook.remove()
    return probabilities


@pytest.mark.parametrize("window", [1, 3])
def test_cutting_an_edge_equals_layers_that_are_handed_a_mask(llava: Any, asked: dict[str, Tensor], window: int):
    found = attention_knockout(llava, asked, {"image → last": ("image", -1)}, window=window)
    cut = torch.zeros(10, 10, dtype=torch.bool)
    cut[-1, IMAGE] = True
    nothing = torch.zeros(10, 10, dtype=torch.bool)
    assert_close(found.before, masked_in_layers(llava, asked, nothing, range(DEPTH)).amax(-1), rtol=1e-10, atol=0)
    for layer, layers in enumerate(found.windows):
        expected = masked_in_layers(llava, asked, cut, layers).gather(-1, found.answer[:, None])[:, 0]
        assert_close(found.after[0, layer], expected, rtol=1e-10, atol=0)
    assert found.change.abs().min() > 1e-3


def test_cutting_every_edge_from_tokens_equals_masking_them(llava: Any, asked: dict[str, Tensor]):
    others = [0, *range(5, 10)]
    found = attention_knockout(llava, asked, {"image → text": ("image", others)}, window=2 * DEPTH)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[:, IMAGE] = 0
    with torch.no_grad():
        probabilities = llava(**asked, attention_mask=mask, position_ids=torch.arange(10)[None]).logits[:, -1]
    expected = probabilities.softmax(-1).gather(-1, found.answer[:, None])[:, 0]
    for layer in range(DEPTH):
        assert_close(found.after[0, layer], expected, rtol=1e-10, atol=0)


def test_a_cut_of_nothing_or_of_the_future_changes_nothing(llava: Any, asked: dict[str, Tensor]):
    found = attention_knockout(llava, asked, {"nothing": ([], -1), "future": (slice(5, None), IMAGE)})
    assert found.change.abs().max() < 1e-12


def test_groups_by_kind_span_positions_and_booleans_agree(llava: Any, asked: dict[str, Tensor]):
    booleans = asked["input_ids"] == 97
    edges = {
        "kind": ("image", slice(5, None)),
        "slice": (IMAGE, range(5, 10)),
        "positions": ([1, 2, 3, 4], [-5, -4, -3, -2, -1]),
        "booleans": (booleans, ~booleans),
    }
    after = attention_knockout(llava, asked, edges, window=2).after
    assert torch.equal(after, after[:1].expand_as(after))


def test_a_question_reaches_the_last_token_only_below_the_last_layer(llava: Any, asked: dict[str, Tensor]):
    found = attention_knockout(llava, asked, {"image → question": ("image", slice(5, -1))}, window=1)
    assert found.change[0, -1].abs().max() < 1e-12
    assert found.change[0, :-1].abs().min() > 1e-4


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1, [(0, 0), (1, 1), (2, 2), (3, 3)]),
        (2, [(0, 0), (0, 1), (1, 2), (2, 3)]),
        (3, [(0, 1), (0, 2), (1, 3), (2, 3)]),
        (9, [(0, 3)] * 4),
    ],
)
def test_windows_are_clipped_at_the_borders(
    llava: Any, asked: dict[str, Tensor], window: int, expected: list[tuple[int, int]]
):
    found = attention_knockout(llava, asked, {"nothing": ([], -1)}, window=window)
    assert [(layers[0], layers[-1]) for layers in found.windows] == expected


def test_induction_by_hand(copier: Any):
    """4 follows 9. Of 64 numbers in the stream four are ones, the fourth of them the answer's."""
    ids = torch.tensor([[1, 2, 3, 9, 4, 5, 6, 7, 8, 9]])
    edges = {"needle → last": (4, -1), "before → needle": (3, 4), "first → last": (0, -1)}
    found = attention_knockout(copier, {"input_ids": ids}, edges, window=1)
    deviation = (4 / WIDTH * (1 - 4 / WIDTH) + 1e-5) ** 0.5
    plain = 1 / (1 + 15 * exp(-1 / deviation))
    assert found.answer.tolist() == [4]
    assert found.before.item() == pytest.approx(plain, rel=1e-9)

    # Without the needle the head finds nothing: a mean of the nine others, with 9 in it twice and 4 not at all.
    values = [1 / 9] * 7 + [2 / 9]
    deviation = ((3 + sum(value**2 for value in values)) / WIDTH - (4 / WIDTH) ** 2 + 1e-5) ** 0.5
    lost = 1 / (8 + sum(exp(value / deviation) for value in values))
    assert found.after[0, 1].item() == pytest.approx(lost, rel=1e-9)

    assert found.change[0, 0].item() == pytest.approx(0, abs=1e-12)
    assert found.change[1, 0].item() < -0.5
    assert found.change[1, 1].item() == pytest.approx(0, abs=1e-12)
    assert found.change[2].abs().max().item() < 1e-12


def test_left_padding_and_given_answers():
    torch.manual_seed(0)
    model: Any = FAMILIES["Llama"].build().double().eval()
    short = torch.tensor([[11, 12, 13, 14, 15]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)
    mask = (padded > 0).long()
    alone, beside = (
        attention_knockout(model, inputs, {"a": (source, -1)}, answer=torch.tensor([7]), window=1)
        for inputs, source in (
            ({"input_ids": short}, 1),
            ({"input_ids": padded, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}, 4),
        )
    )
    assert alone.answer.tolist() == [7]
    assert_close(alone.change, beside.change, rtol=1e-8, atol=0)
    with torch.no_grad():
        assert alone.before.item() == pytest.approx(model(short).logits[0, -1].softmax(-1)[7].item(), rel=1e-10)


def test_result_prints_plots_and_tells_its_progress(copier: Any):
    told: list[tuple[int, int]] = []
    ids = torch.tensor([[1, 9, 4, 5, 9]])
    edges = {"needle → last": (2, -1), "first → last": (0, -1)}
    found = attention_knockout(copier, {"input_ids": ids}, edges, window=1, progress=lambda *done: told.append(done))
    assert told == [(2, 5), (3, 5), (4, 5), (5, 5)]
    table = found.table()
    assert [column.header for column in table.columns] == ["layer", "cut", *edges]
    assert list(table.columns[3].cells) == ["+0.0%", "+0.0%"]
    figure = found.figure()
    assert [line.name for line in figure.data] == list(edges)
    assert figure.data[0].y[1] == pytest.approx(100 * found.change[0, 1].item())


def test_bad_arguments_say_what_to_do(copier: Any, llava: Any, asked: dict[str, Tensor]):
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    edge = {"first → last": (0, -1)}
    for options, problem in (
        ({"window": 0}, "window 0; give a positive number of layers"),
        ({"tower": "layers"}, "tower 'layers' is not known"),
        ({"edges": {}}, "no edges; give some"),
        ({"edges": {"itself": (0, 0)}}, "edge 'itself' cut at transformer.h.0.attn leaves a token nothing to attend"),
        ({"edges": {"image → last": ("image", -1)}}, "kind 'image' is not known"),
    ):
        with pytest.raises(ValueError, match=problem):
            attention_knockout(copier, inputs, **{"edges": edge, **options})
    bert = FAMILIES["BERT"].build()
    with pytest.raises(ValueError, match="towers with causal self-attention: none; name one as tower="):
        attention_knockout(bert, inputs, edge)
