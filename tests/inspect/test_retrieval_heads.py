"""Retrieval heads are those that copy the needle: exactly in a model built by hand, and by what they cause in trained
ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.inspect.needles import Needle, needle_prompts
from regard.inspect.retrieval_heads import Head, mask_retrieval_heads, retrieval_heads, silence
from regard.models.language import Decoder
from regard.sites import attach
from regard.tasks.recall import IGNORED, Recall
from tests.inspect.induction import WIDTH
from tests.inspect.induction import induction as build
from tests.sites.families import FAMILIES

COPIER = Head("transformer.h.1.attn", 1, 1)
NEEDLE = Needle(torch.tensor([1, 2, 3, 9, 4, 5, 6, 7, 8, 9]), 4, 7)
"""Asked what follows 9: 4 5 6."""


class Logits(nn.Module):
    """A model with nothing but a forward pass."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


@pytest.fixture(scope="module")
def induction() -> Any:
    return build()


@pytest.mark.parametrize("mode", ["generate", "teacher", "forward"])
def test_only_the_copying_head_scores_and_it_copies_all(induction: Any, mode: str):
    model = Logits(induction) if mode == "forward" else induction
    found = retrieval_heads(model, [NEEDLE], teacher=mode == "teacher")
    assert [head.layer * 2 + head.head for head in found.heads] == [0, 1, 2, 3]
    assert found.each.tolist() == [[0.0, 0.0, 0.0, 1.0]]
    assert found.recall.tolist() == [1.0]


def test_a_half_written_answer_scores_half(induction: Any):
    found = retrieval_heads(induction, [NEEDLE], new_tokens=1)
    assert found.scores[COPIER] == pytest.approx(1 / 3)
    assert found.recall.item() == pytest.approx(1 / 3)


def test_copying_from_outside_the_needle_does_not_count(induction: Any):
    elsewhere = Needle(NEEDLE.ids, 0, 3)
    assert retrieval_heads(induction, [elsewhere]).each.eq(0).all()


def test_a_token_copied_twice_counts_once(induction: Any):
    # 2 follows 1 and 1 follows 2: the model writes 2 1 2 1 …
    round_and_round = Needle(torch.tensor([5, 1, 2, 1]), 1, 3)
    found = retrieval_heads(induction, [round_and_round], new_tokens=6)
    assert found.scores[COPIER] <= 1


def test_looking_at_the_needle_without_writing_it_does_not_count(induction: Any):
    with torch.no_grad():
        before = induction.lm_head.weight.clone()
        induction.lm_head.weight.copy_(before.roll(1, 0))
        found = retrieval_heads(induction, [NEEDLE], teacher=True)
        induction.lm_head.weight.copy_(before)
    assert found.each.eq(0).all()


def test_score_is_the_mean_over_prompts_of_different_lengths(induction: Any):
    wrong = Needle(torch.tensor([1, 2, 3, 4, 5, 9]), 1, 2)
    for teacher in (False, True):
        found = retrieval_heads(induction, [NEEDLE, wrong], teacher=teacher, batch=2)
        assert found.each[:, 3].tolist() == [1.0, 0.0]
        assert found.scores[COPIER] == 0.5
        assert found.retrieval == (COPIER,)


def test_masking_the_head_breaks_the_task(induction: Any):
    found = retrieval_heads(induction, [NEEDLE])
    masking = mask_retrieval_heads(induction, [NEEDLE], found, draws=8)
    assert (masking.plain, masking.masked) == (1.0, 0.0)
    assert masking.heads == (COPIER,)
    # Without the head that notes the token before, nothing can be found either; the two others do nothing.
    for (other,), recall in zip(masking.others, masking.random, strict=True):
        assert recall == (0.0 if (other.layer, other.head) == (0, 0) else 1.0)


def test_silence_is_a_projection_without_the_head(induction: Any):
    projection = induction.transformer.h[1].attn.c_proj.weight
    with torch.no_grad(), attach(induction, *silence([COPIER])):
        silenced = induction(NEEDLE.ids[None]).logits
    with torch.no_grad():
        kept = projection.clone()
        projection[WIDTH // 2 :] = 0
        removed = induction(NEEDLE.ids[None]).logits
        projection.copy_(kept)
    torch.testing.assert_close(silenced, removed, rtol=0, atol=0)


def test_progress_counts_prompts_and_runs(induction: Any):
    told: list[tuple[int, int]] = []
    found = retrieval_heads(induction, [NEEDLE] * 3, teacher=True, batch=2, progress=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]
    told.clear()
    mask_retrieval_heads(induction, [NEEDLE], found, draws=2, progress=lambda *at: told.append(at))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_result_prints_and_plots(induction: Any):
    found = retrieval_heads(induction, [NEEDLE])
    assert "1 retrieval heads of 4" in str(found.table().title)
    assert found.figure().data[0].z == ([0.0, 0.0], [0.0, 1.0])
    masking = mask_retrieval_heads(induction, [NEEDLE], found, draws=2)
    assert masking.table().row_count == 3
    assert masking.figure().data[0].y[:2] == (1.0, 0.0)


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GPT-2"])
def test_teacher_and_decoding_look_at_the_same_where_the_answer_is_right(name: str):
    torch.manual_seed(0)
    model = FAMILIES[name].build().eval()
    ids = torch.randint(3, 90, (20,))
    first = model(ids[None]).logits[0, -1].argmax()  # pyright: ignore[reportCallIssue]
    # The needle is one token that the model happens to write next.
    prompt = Needle(ids.index_fill(0, torch.tensor([18]), int(first)), 18, 19)
    decoded, taught = (retrieval_heads(model, [prompt], teacher=teacher) for teacher in (False, True))
    assert decoded.each.equal(taught.each)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_decoder_trained_on_recall_needs_its_retrieval_heads_and_not_as_many_others(seed: int):
    torch.manual_seed(seed)
    task, random = Recall(32, 64), torch.Generator().manual_seed(seed)
    model = Decoder(task.vocabulary, "multi_head", heads=4, layers=3, convolution=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 200)
    for _ in range(200):
        tokens, labels = task.batch(32, 8, random)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED).backward()
        optimizer.step()
        schedule.step()
    model.eval()

    tokens, labels = task.batch(8, 8, torch.Generator().manual_seed(54321))
    prompts = []
    for row, place in (labels != IGNORED).nonzero().tolist():
        start = int((tokens[row] == labels[row, place]).nonzero()[0])
        prompts.append(Needle(tokens[row, : place + 1], start, start + 1))
    found = retrieval_heads(model, prompts)
    taught = retrieval_heads(model, prompts, teacher=True, batch=64)
    assert found.recall.mean() > 0.95
    # One token long, an answer is the same with a teacher; near ties may fall differently in a batch.
    assert (found.each != taught.each).double().mean() < 0.01
    assert max(found.scores.values()) > 0.9
    assert 2 * len(found.retrieval) <= len(found.heads)

    masking = mask_retrieval_heads(model, prompts, found, teacher=True, batch=64)
    assert masking.masked < 0.25
    assert min(masking.random) > 0.9


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = "[UNK] the best thing is a sandwich . one two three four five what answer : ?"
    numbers = {word: number for number, word in enumerate(words.split())}
    own = Tokenizer(models.WordLevel(numbers, "[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own)


def test_prompts_hold_the_needle_after_a_sentence_at_every_depth(tokenizer: Any):
    text = "one two three. four five. one one one two."
    prompts = needle_prompts(
        tokenizer,
        text,
        "the best thing is a sandwich.",
        "what is the best thing? answer:",
        answer="a sandwich",
        lengths=(24, 40),
        depths=(0, 0.5, 1),
    )
    assert len(prompts) == 6
    for prompt, length in zip(prompts, (24, 24, 24, 40, 40, 40), strict=True):
        words = tokenizer.convert_ids_to_tokens(prompt.ids.tolist())
        assert words[prompt.start : prompt.stop] == ["a", "sandwich"]
        assert words[prompt.start - 4 : prompt.start] == ["the", "best", "thing", "is"]
        assert words[-8:] == ["what", "is", "the", "best", "thing", "?", "answer", ":"]
        assert len(words) == length
        place = prompt.start - 4
        assert place == 0 or words[place - 1] == "." or place + 7 + 8 == length
    starts = [prompt.start for prompt in prompts[3:]]
    assert starts[0] == 4
    assert starts[0] < starts[1] < starts[2] == 40 - 8 - 3


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"answer": "four"}, "answer 'four' is not in the needle"),
        ({"lengths": (3,)}, "length 3 for a needle"),
        ({"depths": (2.0,)}, "depth 2.0"),
        ({"text": ""}, "text is empty"),
    ],
)
def test_prompts_that_cannot_be_made_say_why(tokenizer: Any, options: dict[str, Any], problem: str):
    given = {"text": "one two.", "needle": "a sandwich", "question": "what?", "lengths": (20,), "depths": (0,)}
    with pytest.raises(ValueError, match=problem):
        needle_prompts(tokenizer, **{**given, **options})


def test_bad_arguments_say_what_to_do(induction: Any):
    with pytest.raises(ValueError, match="no prompts; give at least one"):
        retrieval_heads(induction, [])
    with pytest.raises(ValueError, match="Needle: needle 3 … 3"):
        Needle(torch.arange(5), 3, 3)
    with pytest.raises(ValueError, match="new_tokens 3 with a teacher"):
        retrieval_heads(induction, [NEEDLE], teacher=True, new_tokens=3)
    found = retrieval_heads(induction, [NEEDLE])
    with pytest.raises(ValueError, match="2 heads to mask of 1 retrieval heads; lower the threshold or top"):
        mask_retrieval_heads(induction, [NEEDLE], found, top=2)
