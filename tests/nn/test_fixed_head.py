"""The low-rank bottleneck: what heads narrower than the sequence cannot express, and wide enough ones can."""

from __future__ import annotations

import pytest
import torch
from torch.linalg import matrix_rank
from torch.testing import assert_close

from regard.nn import MultiHeadAttention
from regard.nn.heads.multi_head import attention_rank


def expressing(target, x, head_dim):
    """A layer of one head whose attention over the tokens `x` is `target`, by a factorisation of its logarithm."""
    layer = MultiHeadAttention(x.shape[1], heads=1, head_dim=head_dim, dtype=torch.float64)
    inverse = torch.linalg.pinv(x)
    scores = target.log()
    left, values, right = torch.linalg.svd(scores - scores.mean(1, keepdim=True))
    left, right = left[:, :head_dim] * values[:head_dim] * head_dim**0.5, right[:head_dim].T
    with torch.no_grad():
        layer.query.weight.zero_()[: left.shape[1]] = (inverse @ left).T
        layer.key.weight.zero_()[: left.shape[1]] = (inverse @ right).T
    return layer


def arbitrary(length, dim):
    torch.manual_seed(0)
    target = torch.rand(length, length, dtype=torch.float64).add(0.05)
    return target / target.sum(1, keepdim=True), torch.randn(length, dim, dtype=torch.float64)


@pytest.mark.parametrize("head_dim", [6, 5, 9])
def test_heads_as_wide_as_the_sequence_express_any_attention(head_dim):
    """Even one narrower: softmax ignores what is added to a row."""
    target, x = arbitrary(6, 8)
    assert not attention_rank(8, 6, heads=1, head_dim=head_dim).bottleneck
    weights, _ = expressing(target, x, head_dim).attention_map(x[None])
    assert_close(weights[0, 0], target, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head_dim", [1, 3, 4])
def test_narrower_heads_cannot(head_dim):
    target, x = arbitrary(6, 8)
    limit = attention_rank(8, 6, heads=1, head_dim=head_dim)
    assert limit.bottleneck

    def rank(weights):
        scores = weights.log()
        return matrix_rank(scores - scores.mean(1, keepdim=True), rtol=1e-9)

    assert rank(target) == limit.enough > limit.highest
    weights, _ = expressing(target, x, head_dim).attention_map(x[None])
    assert rank(weights[0, 0]) == limit.highest
    drawn = MultiHeadAttention(8, heads=1, head_dim=head_dim, dtype=torch.float64)
    assert rank(drawn.attention_map(x[None])[0][0, 0]) <= limit.highest


@pytest.mark.parametrize(("dim", "heads", "head_dim", "length"), [(16, 4, None, 9), (16, 4, 9, 9), (5, 2, 12, 9)])
def test_the_reported_rank_is_that_of_drawn_scores(dim, heads, head_dim, length):
    torch.manual_seed(0)
    layer = MultiHeadAttention(dim, heads=heads, head_dim=head_dim, dtype=torch.float64)
    query, key, _ = layer.project(torch.randn(2, length, dim, dtype=torch.float64), None, None, None)
    highest = attention_rank(dim, length, heads=heads, head_dim=head_dim).highest
    assert (matrix_rank(query @ key.mT, rtol=1e-9) == highest).all()


def test_the_rank_of_cross_attention_is_limited_by_both_sides():
    torch.manual_seed(0)
    layer = MultiHeadAttention(16, heads=2, head_dim=12, context_dim=4, dtype=torch.float64)
    x, context = (torch.randn(1, *shape, dtype=torch.float64) for shape in ((9, 16), (7, 4)))
    query, key, _ = layer.project(x, context, None, None)
    rank = attention_rank(16, 9, heads=2, head_dim=12, context_dim=4, context_length=7)
    assert (matrix_rank(query @ key.mT, rtol=1e-9) == rank.highest).all()
    assert rank == (4, 6)


def test_more_heads_of_a_fixed_width_do_not_lower_the_rank():
    split = [attention_rank(64, 32, heads=heads).highest for heads in (1, 2, 4, 8, 16)]
    fixed = [attention_rank(64, 32, heads=heads, head_dim=32).highest for heads in (1, 2, 4, 8, 16)]
    assert split == [32, 32, 16, 8, 4]
    assert fixed == [32] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 16, "length": 0}, "length 0"),
        ({"dim": 16, "length": 4, "context_length": 0}, "context_length 0; give one or more"),
        ({"dim": 16, "length": 4, "context_dim": 0}, "context_dim 0; give a positive width"),
        ({"dim": 16, "length": 4, "heads": 3}, "heads 3 does not divide dim 16"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"attention_rank: .*{message}"):
        attention_rank(**arguments)
