"""Random-feature attention is its equation, linear in what it learns, and learns functions of a query and a set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn.linear.random_feature_attention import RandomFeatureAttention
from regard.ops.masks import Padding
from regard.testing.checks.memory import peak_bytes


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def dense(module: RandomFeatureAttention, x: Tensor, context: Tensor) -> Tensor:
    """The paper's equation for one sequence, head by head and pair by pair."""
    values = module.output.weight.unflatten(1, (module.heads, -1))
    out = torch.zeros(len(x), module.dim, dtype=x.dtype)
    one = torch.ones(1, dtype=x.dtype)
    for i, own in enumerate(x):
        seen = context[: len(context) - len(x) + i + 1] if module.causal else context
        for head in range(module.heads):
            for other in seen:
                token = torch.cat([other, one])
                score = torch.cat([own, one]) @ module.query_key[head] @ token
                out[i] += score.clamp(min=0) * (values[:, head] @ token) / len(seen)
    return out


@settings(deadline=None, max_examples=15)
@given(
    length=st.integers(1, 8),
    heads=st.integers(1, 4),
    causal=st.booleans(),
    mean=st.sampled_from([0.0, 1.0]),
    more=st.sampled_from([None, 0, 3]),
)
def test_output_equals_the_dense_equation(length: int, heads: int, causal: bool, mean: float, more: int | None) -> None:
    module = RandomFeatureAttention(5, random_heads=heads, causal=causal, mean=mean, dtype=torch.float64)
    x = tokens(2, length, 5)
    context = None if more is None else tokens(2, length + more, 5)
    expected = [dense(module, *pair) for pair in zip(x, x if context is None else context, strict=True)]
    assert_close(module(x, context), torch.stack(expected), rtol=1e-10, atol=1e-10)


def test_padding_leaves_the_number_of_keys_out_of_the_mean() -> None:
    module = RandomFeatureAttention(5, random_heads=3, dtype=torch.float64)
    x = tokens(1, 7, 5)
    assert_close(
        module(x, mask=Padding(torch.tensor([4])))[0, :4], dense(module, x[0, :4], x[0, :4]), rtol=1e-10, atol=1e-10
    )


def test_only_the_values_learn_and_the_draw_is_kept_with_them() -> None:
    module = RandomFeatureAttention(8, random_heads=4)
    assert [name for name, _ in module.named_parameters()] == ["output.weight"]
    drawn = module.query_key.clone()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    x = tokens(2, 6, 8).float()
    module(x).square().mean().backward()
    optimizer.step()
    assert_close(module.query_key, drawn, rtol=0, atol=0)
    other = RandomFeatureAttention(8, random_heads=4)
    assert not torch.equal(other.query_key, drawn)
    other.load_state_dict(module.state_dict())
    assert_close(other(x), module(x), rtol=0, atol=0)


def test_scores_of_tokens_of_length_one_have_variance_one() -> None:
    dim, heads = 16, 4000
    module = RandomFeatureAttention(dim, random_heads=heads, dtype=torch.float64)
    x = F.normalize(tokens(1, 2, dim), dim=-1)
    query, key = module.project(x, None, None, None)
    scores = (query @ key.mT)[0, :, 0, 1]
    assert abs(float(scores.var()) - 1) < 5 * (2 / heads) ** 0.5


def test_the_mean_adds_the_dot_product_of_the_tokens_to_every_score() -> None:
    x = tokens(1, 6, 8)
    torch.manual_seed(1)
    plain = RandomFeatureAttention(8, random_heads=4, dtype=torch.float64)
    torch.manual_seed(1)
    biased = RandomFeatureAttention(8, random_heads=4, mean=0.5, dtype=torch.float64)
    scores = [query @ key.mT for query, key in (module.project(x, None, None, None) for module in (plain, biased))]
    assert_close(scores[1] - scores[0], (0.5 * x @ x.mT)[:, None].expand_as(scores[0]), rtol=1e-12, atol=1e-12)


def test_the_order_of_keys_does_not_matter() -> None:
    module = RandomFeatureAttention(8, random_heads=4, dtype=torch.float64)
    x, context = tokens(2, 1, 8), tokens(2, 9, 8)
    shuffled = context[:, torch.randperm(9)]
    assert_close(module(x, shuffled), module(x, context), rtol=1e-12, atol=1e-12)


def test_the_state_does_not_grow_with_the_heads() -> None:
    x, sizes = tokens(1, 32, 8), set()
    for heads in (1, 64):
        module = RandomFeatureAttention(8, random_heads=heads, causal=True, dtype=torch.float64)
        _, state = module.step(x, module.init_state(1))
        sizes.add(state.key_buffer.nbytes + state.value_buffer.nbytes)
    assert len(sizes) == 1


def test_peak_memory_of_a_single_query_does_not_hold_heads_times_keys_times_width() -> None:
    keys, heads, dim = 4096, 64, 16
    module = RandomFeatureAttention(dim, random_heads=heads)
    x, context = tokens(1, 1, dim).float(), tokens(1, keys, dim).float()
    with torch.no_grad():
        peak = peak_bytes(lambda: module(x, context))
    assert peak < keys * heads * (dim + 1) * 4 / 4


DIM, KEYS = 8, 16


def sample(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries and their sets of keys, all of length one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = F.normalize(torch.randn(count, KEYS + 1, DIM, dtype=torch.float64, generator=generator), dim=-1)
    return drawn[:, :1], drawn[:, 1:]


def held_out_error(features: Callable[[Tensor, Tensor], Tensor], target: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Of the values that fit 500 samples best, on others, over the variance of the target."""
    train, held = sample(500, 1), sample(1000, 2)
    with torch.no_grad():
        known, asked = features(*train), features(*held)
    products = known @ known.mT
    penalty = 1e-6 * products.diagonal().mean() * torch.eye(len(products), dtype=products.dtype)
    guess = asked @ known.mT @ torch.linalg.solve(products + penalty, target(*train))
    truth = target(*held)
    return float((guess - truth).square().mean() / truth.var())


def attention_features(heads: int, mean: float = 0.0, seed: int = 0) -> Callable[[Tensor, Tensor], Tensor]:
    torch.manual_seed(seed)
    module = RandomFeatureAttention(DIM, random_heads=heads, mean=mean, dtype=torch.float64)
    return lambda x, context: module.features(x, context)[:, 0]


def test_functions_of_a_set_are_learned_from_samples_that_teach_random_features_of_the_whole_input_nothing() -> None:
    direction = F.normalize(torch.randn(DIM, dtype=torch.float64), dim=0)

    def target(_: Tensor, context: Tensor) -> Tensor:
        return (context @ direction).square().mean(1)

    heads = 400
    plane = torch.randn((KEYS + 1) * DIM + 1, heads * (DIM + 1), dtype=torch.float64) / 2

    def of_whole_input(x: Tensor, context: Tensor) -> Tensor:
        return (F.pad(torch.cat([x, context], 1).flatten(1), (0, 1), value=1.0) @ plane).relu()

    errors = [held_out_error(attention_features(count), target) for count in (16, 100, heads)]
    assert errors[2] < 0.1 < errors[1] < 0.4 < errors[0]
    assert held_out_error(of_whole_input, target) > 0.9


def test_biased_matrices_learn_functions_of_the_dot_product_from_fewer_samples() -> None:
    direction = F.normalize(torch.randn(DIM, dtype=torch.float64), dim=0)

    def target(x: Tensor, context: Tensor) -> Tensor:
        return ((context @ x.mT)[..., 0].relu() * (context @ direction)).mean(1)

    errors = [[held_out_error(attention_features(300, mean, draw), target) for draw in range(3)] for mean in (0.0, 1.0)]
    assert max(errors[1]) < 0.5 * min(errors[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"random_heads": 0}, "random_heads 0; give a positive number"),
        ({"std": 0.0}, "std 0.0"),
        ({"mean": 1.0, "context_dim": 4}, "mean 1.0 with context_dim 4"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"RandomFeatureAttention: {message}"):
        RandomFeatureAttention(8, **arguments)
