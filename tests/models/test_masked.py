"""Tokens are hidden in BERT's shares, and the head's loss is the formula over the hidden ones alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.models.language import MaskedLanguageHead, mask_tokens
from regard.models.language.masked import IGNORED

VOCABULARY, MASK = 50, 4


def hidden(tokens: Tensor, seed: int = 0, **changes: object) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    given = {"mask_token": MASK, "vocabulary": VOCABULARY, "random": random, **changes}
    return mask_tokens(tokens, **given)  # pyright: ignore[reportArgumentType]


def close_to(share: float, found: Tensor) -> bool:
    """Within five standard deviations of as many draws."""
    return abs(found.double().mean() - share) < 5 * math.sqrt(share * (1 - share) / found.numel())


def test_15_percent_are_drawn_of_which_80_are_masked_10_are_any_and_10_stay():
    tokens = torch.randint(5, VOCABULARY, (400, 500))
    before = tokens.clone()
    changed, labels = hidden(tokens)
    drawn = labels != IGNORED
    assert close_to(0.15, drawn)
    assert close_to(0.8 + 0.1 / VOCABULARY, changed[drawn] == MASK)
    assert close_to(0.1 + 0.1 / VOCABULARY, changed[drawn] == tokens[drawn])
    others = changed[drawn & (changed != MASK) & (changed != tokens)]
    assert torch.equal(others.unique(), torch.tensor([i for i in range(VOCABULARY) if i != MASK]))
    assert torch.equal(changed[~drawn], tokens[~drawn])
    assert torch.equal(labels[drawn], tokens[drawn])
    assert torch.equal(tokens, before)


def test_special_tokens_are_never_drawn():
    tokens = torch.randint(VOCABULARY, (100, 50))
    changed, labels = hidden(tokens, special=(0, 1, 2), share=1.0)
    special = tokens < 3
    assert torch.equal(labels != IGNORED, ~special)
    assert torch.equal(changed[special], tokens[special])


def test_a_generator_makes_the_draw_its_own():
    tokens = torch.randint(VOCABULARY, (30, 30))
    first, again, other = (hidden(tokens, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def head() -> tuple[MaskedLanguageHead, Tensor, Tensor]:
    torch.manual_seed(0)
    made = MaskedLanguageHead(VOCABULARY, 8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made, torch.randn(3, 7, 8).double(), torch.randn(VOCABULARY, 8).double()


def test_logits_are_those_of_the_formula():
    made, x, embedding = head()
    inner = x @ made.transform.weight.mT + made.transform.bias
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    inner = (inner - inner.mean(-1, keepdim=True)) / inner.std(-1, keepdim=True, unbiased=False)
    wanted = (inner * made.norm.weight + made.norm.bias) @ embedding.mT + made.bias
    torch.testing.assert_close(made(x, embedding), wanted)


def test_loss_is_the_mean_over_hidden_tokens_alone():
    made, x, embedding = head()
    labels = torch.full((3, 7), IGNORED)
    places = [(0, 1, 30), (0, 6, 2), (2, 3, 49)]
    for row, column, token in places:
        labels[row, column] = token
    each = made(x, embedding).log_softmax(-1)
    wanted = -sum(each[place] for place in places) / 3
    torch.testing.assert_close(made.loss(x, labels, embedding), wanted)
    elsewhere = torch.where((labels == IGNORED)[..., None], x + 1, x)
    torch.testing.assert_close(made.loss(elsewhere, labels, embedding), wanted)


def test_loss_of_a_head_that_knows_nothing_is_the_log_of_the_vocabulary():
    made, x, embedding = head()
    with torch.no_grad():
        for parameter in (made.norm.weight, made.norm.bias, made.bias):
            parameter.zero_()
    labels = torch.randint(VOCABULARY, (3, 7))
    assert abs(made.loss(x, labels, embedding).item() - math.log(VOCABULARY)) < 1e-14


def test_nothing_hidden_costs_nothing_and_has_no_gradient():
    made, x, embedding = head()
    loss = made.loss(x.requires_grad_(), torch.full((3, 7), IGNORED), embedding)
    assert loss == 0
    assert not torch.autograd.grad(loss, x)[0].any()


def test_statistics_of_half_types_are_float32():
    made, x, embedding = head()
    labels = torch.randint(VOCABULARY, (3, 7))
    loss = made.bfloat16().loss(x.bfloat16(), labels, embedding.bfloat16())
    assert loss.dtype == torch.float32
    wanted = F.cross_entropy(made(x.bfloat16(), embedding.bfloat16()).double().mT, labels)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token": 50}, "mask_token 50 is not one of 50 tokens"),
        ({"special": (1, -1)}, "special -1 is not one of 50 tokens"),
        ({"share": 1.5}, r"share 1\.5 is not a probability"),
    ],
)
def test_what_cannot_be_hidden_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hidden(torch.zeros(2, 2).long(), **changes)
