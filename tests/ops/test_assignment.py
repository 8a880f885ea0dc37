"""Visual tokens are replaced by the prompts nearest to them as a whole, each prompt once."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from regard.ops.assignment import hungarian, replace_with_prompts


@pytest.mark.parametrize("columns", [4, 6])
def test_the_assignment_is_the_best_of_all(columns):
    cost = torch.rand(4, columns, generator=torch.Generator().manual_seed(0))
    every = torch.tensor([*permutations(range(columns), 4)])
    totals = cost[torch.arange(4), every].sum(-1)
    assert torch.equal(hungarian(cost), every[totals.argmin()])


def test_no_prompt_is_taken_twice_where_the_nearest_would_be():
    """Two tokens nearest to the same prompt: the one for which the next best is worse gets it."""
    tokens = torch.tensor([[[0.9, 0.0], [1.0, 0.0], [5.0, 5.0]]])
    prompts = torch.tensor([[1.1, 0.0], [0.0, 0.0]])
    chosen = torch.tensor([[True, True, False]])
    found = replace_with_prompts(tokens, prompts, chosen)
    assert found.tolist() == [[[0.0, 0.0], prompts[0].tolist(), [5.0, 5.0]]]
    nearest = replace_with_prompts(tokens, prompts, chosen, unique=False)
    assert torch.equal(nearest[0, :2], prompts[[0, 0]])


def test_samples_are_assigned_alone_and_others_kept():
    random = torch.Generator().manual_seed(1)
    tokens, prompts = torch.randn(3, 10, 5, generator=random), torch.randn(9, 5, generator=random)
    chosen = torch.rand(3, 10, generator=random) < 0.6
    chosen[2] = False
    found = replace_with_prompts(tokens, prompts, chosen)
    assert torch.equal(found[~chosen], tokens[~chosen])
    for sample in range(2):
        alone = replace_with_prompts(tokens[sample : sample + 1], prompts, chosen[sample : sample + 1])
        assert torch.equal(alone[0], found[sample])
        taken = found[sample][chosen[sample]]
        assert len(taken.unique(dim=0)) == int(chosen[sample].sum())


def test_gradients_reach_taken_prompts_and_kept_tokens_only():
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    prompts = torch.tensor([[0.9, 0.1], [5.0, 5.0]], requires_grad=True)
    replace_with_prompts(tokens, prompts, torch.tensor([[True, False]])).sum().backward()
    assert prompts.grad.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert tokens.grad.tolist() == [[[0.0, 0.0], [1.0, 1.0]]]


def test_inputs_are_left_as_they_are():
    tokens, prompts = torch.randn(1, 4, 3), torch.randn(6, 3)
    before = tokens.clone()
    replace_with_prompts(tokens, prompts, torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(tokens, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hungarian(torch.rand(3, 2)), "at least as many columns"),
        (
            lambda: replace_with_prompts(torch.rand(1, 4, 2), torch.rand(3, 2), torch.ones(1, 4, dtype=torch.bool)),
            "4 chosen tokens in a sample for 3 prompts",
        ),
        (
            lambda: replace_with_prompts(torch.rand(1, 4, 2), torch.rand(3, 5), torch.ones(1, 4, dtype=torch.bool)),
            "give \\(batch, length, dim\\)",
        ),
        (lambda: replace_with_prompts(torch.rand(1, 4, 2), torch.rand(5, 2), torch.ones(1, 4)), "torch.float32"),
    ],
)
def test_what_cannot_be_assigned_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
