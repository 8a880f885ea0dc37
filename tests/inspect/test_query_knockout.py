"""A response with attention to the image cut is that of a model with the image masked for those tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from regard.inspect.query_knockout import BOTH, GENERATED, QUERY, Outcome, QueryKnockout, query_knockout
from tests.inspect.induction import induction, tiny_llava

IMAGE = slice(1, 5)
IDS = torch.tensor([[1, 2, 3, 9, 4, 5, 6, 7, 8, 9]])
PATCHES = torch.zeros(10, dtype=torch.bool).index_fill(0, torch.arange(4, 7), True)
"""The model that copies what followed: asked what follows 9, it reads 4 5 6 off the "image"."""


@pytest.fixture(scope="module")
def copied() -> QueryKnockout:
    return query_knockout(induction(), {"input_ids": IDS}, image=PATCHES, new_tokens=3)


@pytest.fixture(scope="module")
def llava() -> Any:
    return tiny_llava()


@pytest.fixture(scope="module")
def asked() -> dict[str, Tensor]:
    """⟨s⟩, four patches, five words."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (1, 10), generator=random)
    ids[:, IMAGE] = 97
    image = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": image}


@pytest.fixture(scope="module")
def found(llava: Any, asked: dict[str, Tensor]) -> QueryKnockout:
    return query_knockout(llava, asked, new_tokens=4, window=2)


def outcome(found: QueryKnockout, path: str, cut: str) -> Outcome:
    (only,) = (each for each in found.outcomes if (each.path, each.cut) == (path, cut))
    return only


def test_every_path_is_cut_in_all_layers_in_each_window_and_in_all_but_it(found: QueryKnockout):
    cuts = {"all": (0, 1, 2, 3), "0 … 1": (0, 1), "2 … 3": (2, 3), "all but 0 … 1": (2, 3), "all but 2 … 3": (0, 1)}
    expected = [(path, cut, layers) for path in (GENERATED, QUERY, BOTH) for cut, layers in cuts.items()]
    assert [(each.path, each.cut, each.layers) for each in found.outcomes] == expected


@pytest.mark.parametrize(("path", "targets"), [(GENERATED, (10,)), (QUERY, range(5, 10)), (BOTH, range(5, 14))])
def test_a_cut_equals_a_mask_handed_to_the_layers(
    llava: Any, asked: dict[str, Tensor], found: QueryKnockout, path: str, targets: range
):
    targets = range(10, 14) if path == GENERATED else targets

    def logits(ids: Tensor) -> Tensor:
        """Of all tokens, where every layer is handed the mask."""
        length = ids.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden[[target for target in targets if target < length], IMAGE] = True
        mask = torch.zeros(length, length, dtype=torch.float64).masked_fill(hidden, -torch.inf)[None, None]

        def hand(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, {**kwargs, "attention_mask": mask}

        layers = llava.model.language_model.layers
        hooks = [layer.register_forward_pre_hook(hand, with_kwargs=True) for layer in layers]
        with torch.no_grad():
            answer = llava(input_ids=ids, pixel_values=asked["pixel_values"]).logits
        for hook in hooks:
            hook.remove()
        return answer

    ids = asked["input_ids"]
    for _ in range(4):
        ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], 1)
    under = outcome(found, path, "all")
    assert under.response == tuple(ids[0, 10:].tolist())
    plain = torch.cat([asked["input_ids"], torch.tensor([found.response])], 1)
    expected = logits(plain)[0, 9:13].log_softmax(-1).gather(-1, torch.tensor(found.response)[:, None])[:, 0]
    assert_close(under.log_likelihood, expected, rtol=1e-9, atol=0)
    assert (under.log_likelihood - found.log_likelihood).abs().max() > 1e-3


def test_the_plain_response_is_the_models_own(llava: Any, asked: dict[str, Tensor], found: QueryKnockout):
    written = llava.generate(**asked, max_new_tokens=4, do_sample=False)[0, 10:]
    assert found.response == tuple(written.tolist())


def test_the_first_token_does_not_depend_on_what_generated_tokens_see(found: QueryKnockout):
    for each in found.outcomes:
        if each.path == GENERATED:
            assert each.response[0] == found.response[0]
            assert each.log_likelihood[0].item() == pytest.approx(found.log_likelihood[0].item(), rel=1e-12)


def test_what_generated_tokens_read_by_hand(copied: QueryKnockout):
    """The last token of the prompt reads 4; what follows 4 is only in the image. Without it the other tokens are
    averaged and 9 is there twice; after the first 9 came, besides the image, the 4 just written."""
    assert copied.response == (4, 5, 6)
    blind = outcome(copied, GENERATED, "1")
    assert blind.response == (4, 9, 4)
    assert blind.f1 == pytest.approx(2 * 1 / (3 + 2))
    assert outcome(copied, GENERATED, "all").response == (4, 9, 4)


def test_only_the_layer_that_copies_contributes(copied: QueryKnockout):
    for cut, f1 in (("0", 1.0), ("all but 1", 1.0), ("1", 0.4), ("all but 0", 0.4)):
        assert outcome(copied, GENERATED, cut).f1 == pytest.approx(f1)
    assert_close(copied.loss(cut="0"), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert copied.loss(cut="1")[1:].min() > 1


def test_a_query_that_sees_nothing_loses_what_it_would_have_read(copied: QueryKnockout):
    loss = copied.loss(QUERY)
    assert loss[0] > 1
    assert loss[1:].abs().max() < 1e-12
    # The other tokens are averaged, and 9 is there twice.
    assert outcome(copied, QUERY, "1").response[0] == 9
    # Cut in layer 0 as well, 7 does not know that 6 came before it, but in part each token that it can see: 9, too.
    assert outcome(copied, QUERY, "all").response[0] == 7


def test_looks_by_hand(copied: QueryKnockout):
    """In layer 1 one head looks at the patch being read and the other everywhere; in layer 0 at the token before."""
    assert copied.looks.shape == (2, 3, 3)
    everywhere = 1 / torch.arange(10, 13, dtype=torch.float64)[:, None].expand(3, 3)
    assert_close(copied.looks[1], (torch.eye(3, dtype=torch.float64) + everywhere) / 2)
    assert_close(copied.looks[0], everywhere / 2)


def test_mentions_decide_what_counts():
    def odd(tokens: list[int]) -> set[int]:
        return {token for token in tokens if token % 2}

    found = query_knockout(induction(), {"input_ids": IDS}, image=PATCHES, new_tokens=3, window=2, mentions=odd)
    # 4 5 6 against 4 9 4.
    assert outcome(found, GENERATED, "all").f1 == 0.0
    nothing = query_knockout(
        induction(), {"input_ids": IDS}, image=PATCHES, new_tokens=3, window=2, mentions=lambda _: ()
    )
    assert {each.f1 for each in nothing.outcomes} == {1.0}


def test_result_prints_plots_and_tells_its_progress(copied: QueryKnockout):
    table = copied.table()
    assert table.row_count == 1 + len(copied.outcomes) == 16
    assert list(table.columns[2].cells)[:4] == ["1.00", "0.40", "1.00", "0.40"]
    assert [bars.name for bars in copied.figure().data] == [GENERATED, QUERY, BOTH]
    told: list[tuple[int, int]] = []
    query_knockout(
        induction(), {"input_ids": IDS}, image=PATCHES, new_tokens=1, window=2, progress=lambda *at: told.append(at)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_bad_arguments_say_what_to_do(copied: QueryKnockout):
    model = induction()
    for options, problem in (
        ({"image": torch.zeros(10, dtype=torch.bool)}, "0 image tokens and 10 query tokens"),
        ({"image": "image"}, "kind 'image' is not known"),
        ({"window": 0}, "window 0; give a positive number"),
        ({"new_tokens": 0}, "new_tokens 0; give a positive number"),
        ({"inputs": {"input_ids": IDS.repeat(2, 1)}}, "2 samples; give one at a time"),
    ):
        with pytest.raises(ValueError, match=problem):
            query_knockout(model, **{"inputs": {"input_ids": IDS}, "image": PATCHES, **options})
    with pytest.raises(ValueError, match="path 'image' cut in 'all' was not run"):
        copied.loss("image")
