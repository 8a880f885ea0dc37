"""One pass over all candidates gives each the score it gets alone, and a trained ranker finds the right one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.models.language import ResponseRanker

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


def test_every_parameter_learns():
    model = ranker()
    F.cross_entropy(model(*dialogue()), torch.tensor([0, 4, 2])).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


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
    ],
)
def test_what_cannot_be_ranked_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
