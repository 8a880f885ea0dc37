"""One pass over all candidates gives each the score it gets alone, and a trained ranker finds the right one.

Its losses are those of the authors (golden), and it learns the words that were hidden.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from regard.models.language import ResponseRanker, mask_tokens
from regard.models.language.masked import IGNORED

GOLDEN = Path(__file__).parents[1] / "golden" / "uni_encoder_losses.safetensors"
AUTHORS = {
    "head.weight": "fc.weight",
    "norm.weight": "bert.norm.weight",
    "token.weight": "bert.token.weight",
    "position.weight": "bert.position.weight",
    "kind.weight": "bert.kind.weight",
    "words.transform.weight": "bert.transform.weight",
    "words.transform.bias": "bert.transform.bias",
    "words.norm.weight": "bert.layer_norm.weight",
    "words.norm.bias": "bert.layer_norm.bias",
    "words.bias": "bert.bias",
}
VOCABULARY = 13


def ranker(**changes: object) -> ResponseRanker:
    torch.manual_seed(0)
    given = {"dim": 16, "length": 32, "dtype": torch.float64, **changes}
    model = ResponseRanker(VOCABULARY, **given).eval()  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def dialogue(batch: int = 3, context: int = 9, count: int = 5, width: int = 4) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return (
        torch.randint(VOCABULARY, (batch, context), generator=random),
        torch.randint(VOCABULARY, (batch, count, width), generator=random),
    )


LENGTHS = {
    "context_lengths": torch.tensor([9, 4, 1]),
    "candidate_lengths": torch.tensor([[4, 1, 3, 2, 4], [1, 1, 4, 4, 2], [2, 3, 1, 4, 4]]),
}


@pytest.mark.parametrize("mechanism", ["multi_head", "sigmoid_attention"])
@pytest.mark.parametrize(
    ("pattern", "layers"), [("one_way", 3), ("arrow", 1), ("diagonal", 3)], ids=lambda value: str(value)
)
def test_one_pass_gives_each_candidate_the_score_it_gets_alone(pattern, layers, mechanism):
    model = ranker(pattern=pattern, layers=layers, mechanism=mechanism)
    context, candidates = dialogue()
    together = model(context, candidates, **LENGTHS)
    for sample in range(3):
        start = context[sample : sample + 1, : LENGTHS["context_lengths"][sample]]
        for index in range(5):
            width = LENGTHS["candidate_lengths"][sample, index]
            alone = model(start, candidates[sample : sample + 1, index : index + 1, :width])
            torch.testing.assert_close(alone[0, 0], together[sample, index])


def test_by_arrow_attention_candidates_meet_in_the_second_layer():
    model = ranker(pattern="arrow", layers=2)
    context, candidates = dialogue()
    changed = candidates.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
    difference = (model(context, candidates) - model(context, changed)).abs()
    assert (difference[:, 1:] > 1e-9).all()


@pytest.mark.parametrize("pattern", ["arrow", "one_way", "diagonal"])
def test_scores_move_with_their_candidates(pattern):
    model = ranker(pattern=pattern)
    context, candidates = dialogue()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(model(context, candidates[:, order]), model(context, candidates)[:, order])


def test_diagonal_attention_does_not_compare():
    model = ranker(pattern="diagonal")
    context, candidates = dialogue()
    torch.testing.assert_close(model((context + 1) % VOCABULARY, candidates), model(context, candidates))


def test_scores_and_losses_are_those_of_the_authors():
    """Their rows, position ids, pooling and losses, around an encoder of no layers; their mask has its own test."""
    kept = load_file(GOLDEN)
    model = ResponseRanker(23, dim=6, length=16, dtype=torch.float64)
    model.blocks = nn.ModuleList()
    leaves = dict(model.named_parameters())
    model.load_state_dict({name: kept[f"weight.{AUTHORS[name]}"] for name in leaves})
    lengths = {name: kept[name] for name in ("context_lengths", "candidate_lengths")}
    # Their score has a bias, of which nothing else depends.
    scores = model(kept["context"], kept["candidates"], **lengths) + kept["weight.fc.bias"]
    torch.testing.assert_close(scores, kept["logits"])
    names = ("context", "candidates", "right", "context_words", "candidate_words")
    ranking, words = model.losses(*(kept[name] for name in names), **lengths)
    torch.testing.assert_close(ranking, kept["ranking"])
    torch.testing.assert_close(words, kept["masked_language"])
    found = torch.autograd.grad(ranking + words, list(leaves.values()))
    for name, gradient in zip(leaves, found, strict=True):
        torch.testing.assert_close(gradient, kept[f"grad.{AUTHORS[name]}"])


def masked(tokens: Tensor, seed: int = 0, share: float = 0.5) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return mask_tokens(tokens, mask_token=0, vocabulary=VOCABULARY, share=share, random=random)


RIGHT = torch.tensor([0, 4, 2])


def test_every_parameter_learns():
    model = ranker()
    (context, words), (candidates, more) = map(masked, dialogue())
    sum(model.losses(context, candidates, RIGHT, words, more)).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_hidden_words_reach_every_row_of_the_embedding():
    """The head is the embedding transposed: words that are nowhere in the row are made less likely."""
    model = ranker()
    context, candidates = (tokens % 5 for tokens in dialogue())
    nothing = torch.full_like(candidates, IGNORED)
    _, words = model.losses(context, candidates, RIGHT, *(masked(context)[1], nothing))
    words.backward()
    assert (model.token.weight.grad.abs().amax(1) > 0).all()
    assert model.position.weight.grad.any()
    assert model.head.weight.grad is None


def test_words_beyond_the_lengths_are_not_asked_for():
    model = ranker()
    context, candidates = dialogue()
    everywhere = model.losses(context, candidates, RIGHT, context, candidates, **LENGTHS)[1]
    real = torch.arange(9) < LENGTHS["context_lengths"][:, None]
    words = context.masked_fill(~real, IGNORED)
    real = torch.arange(4) < LENGTHS["candidate_lengths"][..., None]
    more = candidates.masked_fill(~real, IGNORED)
    torch.testing.assert_close(model.losses(context, candidates, RIGHT, words, more, **LENGTHS)[1], everywhere)
    unlike = torch.where(real, candidates, (candidates + 1) % VOCABULARY)
    torch.testing.assert_close(model.losses(context, unlike, RIGHT, words, more, **LENGTHS)[1], everywhere)


def test_loss_of_ranking_is_the_cross_entropy_of_the_scores():
    model = ranker()
    context, candidates = dialogue()
    nothing = torch.full_like(context, IGNORED), torch.full_like(candidates, IGNORED)
    ranking, words = model.losses(context, candidates, RIGHT, *nothing)
    torch.testing.assert_close(ranking, F.cross_entropy(model(context, candidates), RIGHT))
    assert words == 0


def test_both_losses_together_teach_to_fill_in_and_to_rank():
    """Rows count up by one from anywhere: a hidden number follows from any other, and the right response goes on."""
    torch.manual_seed(0)
    model = ResponseRanker(VOCABULARY, dim=32, layers=2, length=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(0)
    numbers = VOCABULARY - 1  # 0 is the mask

    def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
        start = torch.randint(numbers, (size, 1), generator=random)
        right = torch.randint(4, (size,), generator=random)
        ahead = torch.randint(1, numbers, (size, 4), generator=random)
        ahead[torch.arange(size), right] = 0
        context = (start + torch.arange(6)) % numbers
        candidates = ((start + 6 + ahead)[..., None] + torch.arange(4)) % numbers
        return context + 1, candidates + 1, right

    def losses(size: int) -> tuple[Tensor, Tensor]:
        context, candidates, right = batch(size)
        rules = {"mask_token": 0, "vocabulary": VOCABULARY, "random": random}
        (context, words), (candidates, more) = (mask_tokens(tokens, **rules) for tokens in (context, candidates))
        return model.losses(context, candidates, right, words, more)

    for _ in range(250):
        optimizer.zero_grad()
        sum(losses(48)).backward()
        optimizer.step()
    with torch.no_grad():
        ranking, words = losses(500)
    assert words < math.log(VOCABULARY) / 2
    assert ranking < math.log(4) / 4


def test_a_trained_ranker_finds_the_candidate_that_goes_on():
    """The right response begins with the context's last token."""
    torch.manual_seed(0)
    model = ResponseRanker(VOCABULARY, dim=32, layers=2, length=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(0)

    def batch(size: int) -> tuple[Tensor, Tensor, Tensor]:
        context = torch.randint(VOCABULARY, (size, 6), generator=random)
        candidates = torch.randint(VOCABULARY, (size, 4, 3), generator=random)
        wrong = (context[:, -1, None] + torch.randint(1, VOCABULARY, (size, 4), generator=random)) % VOCABULARY
        candidates[..., 0] = wrong
        right = torch.randint(4, (size,), generator=random)
        candidates[torch.arange(size), right, 0] = context[:, -1]
        return context, candidates, right

    for _ in range(250):
        context, candidates, right = batch(64)
        loss = F.cross_entropy(model(context, candidates), right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    context, candidates, right = batch(500)
    assert (model(context, candidates).argmax(-1) == right).float().mean() > 0.9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResponseRanker(0), "vocabulary 0"),
        (lambda: ResponseRanker(5, layers=0), "layers 0"),
        (lambda: ResponseRanker(5, "efficient_attention"), "does not take any mask"),
        (lambda: ResponseRanker(5, length=8)(torch.zeros(1, 6).long(), torch.zeros(1, 2, 3).long()), "for 8 positions"),
        (lambda: ResponseRanker(5)(torch.zeros(1, 6).long(), torch.zeros(1, 2).long()), "candidates of shape"),
        (lambda: ResponseRanker(5, pattern="bow")(*dialogue()), "pattern 'bow'"),
        (lambda: ranker().losses(*dialogue(), RIGHT, *reversed(dialogue())), "words of shapes"),
    ],
)
def test_what_cannot_be_ranked_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
