"""Hedgehog is its dense equation and the authors' code, and once distilled as spiky and monotone as softmax."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn.heads.multi_head import MultiHeadAttention
from regard.nn.linear.hedgehog import HedgehogAttention
from regard.nn.linear.hedgehog_conversion import compare_maps, distill, hedgehog_from
from regard.ops.masks import Padding, Segments
from regard.ops.positions import rotary
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "hedgehog.safetensors"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def moved(module: HedgehogAttention) -> HedgehogAttention:
    with torch.no_grad():
        for feature_map in (module.query_map, module.key_map):
            feature_map.weight.add_(0.5 * torch.randn_like(feature_map.weight))
            feature_map.bias.add_(0.5 * torch.randn_like(feature_map.bias))
    return module


def dense(module: HedgehogAttention, x: Tensor) -> Tensor:
    """The paper's equation for one sequence, query by query."""
    query, key, value = (
        projection(x).unflatten(-1, (-1, module.head_dim)) for projection in (module.query, module.key, module.value)
    )
    if module.position == "rotary":
        places = torch.arange(len(x))
        query, key = (
            rotary(part.transpose(0, 1)[None], places, base=module.rotary_base)[0].transpose(0, 1)
            for part in (query, key)
        )
    mixed = torch.empty(len(x), module.heads, module.head_dim, dtype=x.dtype)
    for head in range(module.heads):
        shared = head // (module.heads // module.kv_heads)
        features = phi(module, "query_map", head, query[:, head])
        weights = features @ phi(module, "key_map", shared, key[:, shared]).mT
        for i, row in enumerate(weights):
            seen = i + 1 if module.causal else len(x)
            mixed[i, head] = row[:seen] @ value[:seen, shared] / row[:seen].sum()
    return module.output(mixed.flatten(1))


def phi(module: HedgehogAttention, name: str, head: int, x: Tensor) -> Tensor:
    feature_map = getattr(module, name)
    half = x @ feature_map.weight[head].mT + feature_map.bias[head]
    halves = half.exp(), (-half).exp()
    if feature_map.kind == "softmax":
        halves = tuple(part / part.sum(-1, keepdim=True) for part in halves)
    return torch.cat(halves, -1)


@settings(deadline=None, max_examples=20)
@given(
    length=st.integers(1, 40),
    kv_heads=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    feature_map=st.sampled_from(["exp", "softmax"]),
    position=st.sampled_from([None, "rotary"]),
)
def test_output_equals_the_dense_equation(
    length: int, kv_heads: int, causal: bool, feature_map: str, position: str | None
) -> None:
    module = moved(
        HedgehogAttention(
            16,
            heads=4,
            kv_heads=kv_heads,
            causal=causal,
            feature_map=feature_map,
            position=position,
            rotary_base=100.0,
            dtype=torch.float64,
        )
    )
    x = tokens(2, length, 16)
    assert_close(module(x), torch.stack([dense(module, sample) for sample in x]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_and_padded_sequences_equal_the_dense_equation_alone(causal: bool) -> None:
    module = moved(HedgehogAttention(8, heads=2, causal=causal, position="rotary", dtype=torch.float64))
    x, lengths = tokens(1, 12, 8), [5, 1, 6]
    alone = torch.cat([dense(module, part) for part in x[0].split(lengths)])
    assert_close(module(x, mask=Segments.from_lengths(lengths))[0], alone, rtol=1e-10, atol=1e-10)
    padded = module(x, mask=Padding(torch.tensor([5])))
    assert_close(padded[0, :5], alone[:5], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_outputs_gradients_and_loss_equal_the_authors_code(causal: bool) -> None:
    golden = load_file(GOLDEN)
    name = "causal" if causal else "noncausal"
    _, heads, _, width = golden["query"].shape
    inner = heads * width
    # A token is query, key and value side by side, so that the projections pick what the authors' code is given.
    module = HedgehogAttention(
        3 * inner, heads=heads, head_dim=width, causal=causal, feature_map="softmax", dtype=torch.float64
    )
    parts = ("query", "key", "value")
    with torch.no_grad():
        for projection, rows in zip(parts, torch.eye(3 * inner, dtype=torch.float64).chunk(3), strict=True):
            getattr(module, projection).weight.copy_(rows)
        module.output.weight.copy_(torch.eye(3 * inner, inner))
        module.query_map.weight.copy_(golden["query_map"].mT)
        module.key_map.weight.copy_(golden["key_map"].mT)

    def as_tokens(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).flatten(2)

    x = torch.cat([as_tokens(golden[part]) for part in parts], -1).requires_grad_()
    out = module(x)[..., :inner]
    assert_close(out, as_tokens(golden[f"{name}.output"]), rtol=1e-10, atol=1e-10)
    assert_close(module.attention_map(x)[0], golden[f"{name}.weights"], rtol=1e-10, atol=1e-10)
    out.backward(as_tokens(golden["output_gradient"]))
    expected = torch.cat([as_tokens(golden[f"{name}.gradient.{part}"]) for part in parts], -1)
    assert_close(x.grad, expected, rtol=1e-9, atol=1e-9)
    maps = {"query_map": module.query_map.weight, "key_map": module.key_map.weight}
    for part, weight in maps.items():
        assert_close(weight.grad, golden[f"{name}.gradient.{part}"].mT, rtol=1e-9, atol=1e-9)
        weight.grad = None
    loss = module.distillation_loss(x)
    assert_close(loss, golden[f"{name}.loss"], rtol=1e-9, atol=1e-9)
    loss.backward()
    for part, weight in maps.items():
        assert_close(weight.grad, golden[f"{name}.loss_gradient.{part}"].mT, rtol=1e-8, atol=1e-9)


def test_maps_start_as_the_identity() -> None:
    module = HedgehogAttention(8, heads=2, dtype=torch.float64)
    x = tokens(1, 2, 3, 4)
    scaled, size = module.query_map(x)
    assert_close(scaled * size.exp()[..., None], torch.cat([x.exp(), (-x).exp()], -1), rtol=1e-12, atol=1e-12)


def test_the_loss_leaves_projections_and_padding_out() -> None:
    module = moved(HedgehogAttention(8, heads=2, causal=True, dtype=torch.float64))
    x, lengths = tokens(2, 9, 8), [6, 3]
    loss = module.distillation_loss(x, mask=Padding(torch.tensor(lengths)))
    alone = [module.distillation_loss(sample[None, :length]) for sample, length in zip(x, lengths, strict=True)]
    assert_close(loss, (6 * alone[0] + 3 * alone[1]) / 9, rtol=1e-12, atol=1e-12)
    loss.backward()
    learning = {name.split(".")[0] for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert learning == {"query_map", "key_map"}


def test_float32_follows_exponents_that_exp_alone_would_overflow() -> None:
    module = moved(HedgehogAttention(8, heads=1, causal=True, dtype=torch.float64))
    with torch.no_grad():
        module.key_map.bias[0, 0] = 120.0
    x = 2 * tokens(1, 50, 8)
    exact = module(x)
    assert torch.exp(module.key_map(module.key(x)[:, None]).size.float()).isinf().all()
    found = module.to(torch.float32)(x.float())
    assert (found - exact).norm() / exact.norm() < 1e-5


def test_peak_memory_is_far_below_one_map() -> None:
    length = 4096
    module, x = HedgehogAttention(16, heads=2), tokens(1, length, 16, dtype=torch.float32).requires_grad_()
    packed = Segments.from_lengths([1500, length - 1500])
    for mask in (None, packed):
        peak = peak_bytes(lambda mask=mask: module(x, mask=mask).sum().backward())
        assert peak < length * length * x.element_size() / 4


def same_kind(kinds: Tensor, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens of some kind with a value each, and the mean value of all tokens of that kind."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(kinds), (batch, length), generator=generator)
    values = torch.randn(batch, length, kinds.shape[1], generator=generator)
    same = (ids[:, :, None] == ids[:, None]).float()
    mean = same @ values / same.sum(-1, keepdim=True)
    return torch.cat([kinds[ids], values], -1), torch.cat([torch.zeros_like(mean), mean], -1)


def rank_correlation(scores: Tensor, weights: Tensor) -> float:
    """Mean over queries of Spearman's coefficient."""
    ranks = torch.stack([of.argsort(-1).argsort(-1).flatten(0, 2) for of in (scores, weights)], 1).double()
    return float(torch.stack([torch.corrcoef(row)[0, 1] for row in ranks]).mean())


@pytest.mark.parametrize("feature_map", ["exp", "softmax"])
def test_distilled_maps_are_as_spiky_and_monotone_as_softmax_and_plain_linear_ones_are_not(feature_map: str) -> None:
    torch.manual_seed(0)
    kinds = torch.randn(8, 16)
    teacher = MultiHeadAttention(32, heads=2)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-2)
    for step in range(200):
        x, target = same_kind(kinds, 16, 32, step)
        optimizer.zero_grad()
        F.mse_loss(teacher(x), target).backward()
        optimizer.step()

    layer = hedgehog_from(teacher, feature_map=feature_map)
    held, target = same_kind(kinds, 32, 32, 1000)
    error_before = F.mse_loss(layer(held), target)
    report = distill(layer, [same_kind(kinds, 16, 32, 2000 + part)[0] for part in range(4)], steps=100)
    after = compare_maps(layer, [held])
    error_after = F.mse_loss(layer(held), target)

    query, key, _ = layer.project(held, None, None, None)
    plain = (F.elu(query) + 1) @ (F.elu(key) + 1).mT
    plain = plain / plain.sum(-1, keepdim=True)
    plain_entropy = -(plain * plain.log()).sum(-1).mean((0, 2))

    assert (after.softmax_entropy < 1.7).all()
    assert (plain_entropy > 3.2).all()
    assert (report.before.entropy > 3.0).all()
    assert_close(after.entropy, after.softmax_entropy, rtol=0, atol=0.1)
    assert (after.divergence < 0.01).all()
    assert (after.distance < 0.05).all()
    assert rank_correlation(query @ key.mT, plain) < 0.8
    assert (after.order > 0.9).all()
    assert error_after < error_before / 50


def test_loss_is_the_entropy_and_the_divergence() -> None:
    layer = moved(HedgehogAttention(8, heads=2, causal=True, dtype=torch.float64))
    x = tokens(3, 10, 8)
    report = compare_maps(layer, [x])
    assert_close((report.softmax_entropy + report.divergence).mean(), layer.distillation_loss(x), rtol=1e-12, atol=0)
    assert (report.divergence > 0).all()


def test_order_is_the_mean_rank_correlation_over_the_keys_of_a_query() -> None:
    layer = moved(HedgehogAttention(8, heads=1, dtype=torch.float64))
    x = tokens(3, 10, 8)
    query, key, _ = layer.project(x, None, None, None)
    expected = rank_correlation(query @ key.mT, layer.attention_map(x)[0])
    assert abs(float(compare_maps(layer, [x]).order) - expected) < 1e-12
    causal = HedgehogAttention(8, heads=1, causal=True, dtype=torch.float64)
    causal.load_state_dict(layer.state_dict())
    last = compare_maps(causal, [x]).order * 10 - compare_maps(causal, [x[:, :9]]).order * 9
    query, key, _ = causal.project(x, None, None, None)
    expected = rank_correlation((query @ key.mT)[:, :, -1:], causal.attention_map(x)[0][:, :, -1:])
    assert abs(float(last) - expected) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position": "alibi"}, "position 'alibi' is not known"),
        ({"feature_map": "relu"}, "feature_map 'relu' is not known"),
        ({"rotary_base": 0.0}, "rotary_base 0.0; give a positive number"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"HedgehogAttention: {message}"):
        HedgehogAttention(8, heads=2, **arguments)


def test_query_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="query_ids in self-attention"):
        HedgehogAttention(8, heads=2)(
            tokens(1, 3, 8).float(), mask=Segments(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long))
        )
