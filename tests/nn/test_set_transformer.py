"""Set attention is the authors' modules where these are the paper's, and the paper's formulas everywhere."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.bench.flops import flops
from regard.nn import InducedSetAttention, MultiHeadAttention, SetAttention
from regard.nn.sets.set_transformer import AttentionPooling
from regard.ops.masks import Padding

DOUBLE = torch.float64
GOLDEN = Path(__file__).parents[1] / "golden" / "set_transformer.safetensors"
AUTHORS = {
    "attention.key": "fc_k",
    "attention.value": "fc_v",
    "feed.linear": "fc_o",
    "norms.0": "ln0",
    "norms.1": "ln1",
}
DIM, HEADS = 6, 2


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def case(name: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{name}."): value for key, value in load_file(GOLDEN).items() if key.split(".")[0] == name
    }


def take_weights(block: SetAttention, golden: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Ours by the authors' names. They have neither W^O nor, with the identity for fc_q, W^Q."""
    attention = block.attention
    with torch.no_grad():
        for projection in (attention.query, attention.output):
            projection.weight.copy_(torch.eye(DIM))
            if projection.bias is not None:
                projection.bias.zero_()
    ours = dict(block.named_parameters())
    pairs = {
        f"{prefix}{theirs}.{kind}": ours[f"{mine}.{kind}"]
        for mine, theirs in AUTHORS.items()
        for kind in ("weight", "bias")
        if f"{mine}.{kind}" in ours
    }
    with torch.no_grad():
        for theirs, parameter in pairs.items():
            parameter.copy_(golden[theirs])
    return pairs


def assert_gradients(out: Tensor, golden: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    assert_close(out, golden["out"], rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(out, list(tensors.values()), golden["seed"])
    for name, gradient in zip(tensors, found, strict=True):
        assert_close(gradient, golden[f"grad.{name}"], rtol=1e-10, atol=1e-12)


def test_attention_block_is_the_authors_on_projected_queries():
    golden = case("mab")
    block = SetAttention(DIM, heads=HEADS, bias=True, dtype=DOUBLE)
    pairs = take_weights(block, golden)
    x, context, weight, bias = (
        golden[name].requires_grad_() for name in ("input0", "input1", "fc_q.weight", "fc_q.bias")
    )
    out = block(F.linear(x, weight, bias), context)
    assert_gradients(out, golden, {"input0": x, "input1": context, "fc_q.weight": weight, "fc_q.bias": bias, **pairs})


def test_induced_attention_is_the_authors():
    golden = case("isab_norm")
    layer = InducedSetAttention(DIM, heads=HEADS, inducing=3, bias=True, dtype=DOUBLE)
    pairs = take_weights(layer.gather, golden, "mab0.") | take_weights(layer.read, golden, "mab1.")
    layer.points.data.copy_(golden["I"])
    x = golden["input0"].requires_grad_()
    assert_gradients(layer(x), golden, {"input0": x, "I": layer.points, **pairs})


def test_pooling_is_the_authors_but_for_the_feed_forward_they_leave_out():
    golden = case("pma")
    pool = AttentionPooling(DIM, heads=HEADS, seeds=2, bias=True, dtype=DOUBLE)
    pairs = take_weights(pool.block, golden, "mab.")
    pool.seeds.data.copy_(golden["S"])
    x = golden["input0"].requires_grad_()
    pool.feed = torch.nn.Identity()
    assert_gradients(pool(x), golden, {"input0": x, "S": pool.seeds, **pairs})


def dense_block(block: SetAttention, x: Tensor, y: Tensor) -> Tensor:
    """MAB of one pair of sets, head by head."""
    inner, width = block.attention, DIM // HEADS
    heads = []
    for head in range(HEADS):
        rows = slice(head * width, (head + 1) * width)
        query, key, value = (
            source @ projection.weight[rows].mT
            for source, projection in ((x, inner.query), (y, inner.key), (y, inner.value))
        )
        weights = (query @ key.mT / math.sqrt(DIM)).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ value)
    hidden = F.layer_norm(x + torch.cat(heads, -1) @ inner.output.weight.mT, (DIM,))
    return F.layer_norm(hidden + (hidden @ block.feed.linear.weight.mT + block.feed.linear.bias).relu(), (DIM,))


def test_blocks_are_the_papers_formulas():
    x, y = tokens(5, DIM), tokens(7, DIM, seed=1)
    block = SetAttention(DIM, heads=HEADS, dtype=DOUBLE)
    assert_close(block(x[None], y[None])[0], dense_block(block, x, y))
    assert_close(block(x[None])[0], dense_block(block, x, x))

    induced = InducedSetAttention(DIM, heads=HEADS, inducing=3, dtype=DOUBLE)
    summary = dense_block(induced.gather, induced.points[0], x)
    assert_close(induced(x[None])[0], dense_block(induced.read, x, summary))

    pool = AttentionPooling(DIM, heads=HEADS, seeds=2, dtype=DOUBLE)
    fed = (x @ pool.feed.linear.weight.mT + pool.feed.linear.bias).relu()
    assert_close(pool(x[None])[0], dense_block(pool.block, pool.seeds[0], fed))


def test_one_head_scales_as_all_attention_does():
    """With one head its width is the full width, and the attention inside is `MultiHeadAttention`."""
    inner = SetAttention(DIM, heads=1, dtype=DOUBLE).attention
    usual = MultiHeadAttention(DIM, heads=1, dtype=DOUBLE)
    usual.load_state_dict(inner.state_dict())
    x = tokens(2, 5, DIM)
    assert_close(inner(x), usual(x))


def test_maps_are_to_be_had_from_the_attention_inside():
    block = SetAttention(DIM, heads=HEADS, norm=False, dtype=DOUBLE)
    x, y = tokens(2, 5, DIM), tokens(2, 7, DIM, seed=1)
    weights, value = block.attention.attention_map(x, y)
    hidden = x + block.attention.combine(weights @ value)
    assert_close(hidden + block.feed(hidden), block(x, y))
    assert_close(weights.sum(-1), torch.ones(2, HEADS, 5, dtype=DOUBLE))


def test_pooling_does_not_care_about_order():
    pool = AttentionPooling(DIM, heads=HEADS, seeds=3, dtype=DOUBLE)
    x = tokens(2, 9, DIM)
    out = pool(x)
    assert out.shape == (2, 3, DIM)
    assert_close(pool(x[:, torch.randperm(9)]), out, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out[:, 0], out[:, 1])


def test_pooling_of_seeds_that_ask_nothing_is_a_mean():
    """The paper's proof that pooling can do what a mean does: a query of 0 weighs all tokens alike."""
    pool = AttentionPooling(DIM, heads=HEADS, norm=False, dtype=DOUBLE)
    pool.feed = torch.nn.Identity()
    torch.nn.init.zeros_(pool.seeds)
    torch.nn.init.zeros_(pool.block.feed.linear.weight)
    torch.nn.init.zeros_(pool.block.feed.linear.bias)
    inner, x = pool.block.attention, tokens(2, 9, DIM)
    assert_close(pool(x)[:, 0], inner.output(inner.value(x.mean(1))))


def test_padded_sets_are_pooled_as_if_alone():
    pool = AttentionPooling(DIM, heads=HEADS, seeds=2, dtype=DOUBLE)
    x = tokens(3, 9, DIM)
    out = pool(x, mask=Padding(torch.tensor([9, 4, 1])))
    for sample, length in enumerate((9, 4, 1)):
        assert_close(out[sample], pool(x[sample : sample + 1, :length])[0])
    assert torch.isfinite(pool(x, mask=Padding(torch.tensor([0, 0, 9])))).all()


def test_every_parameter_of_pooling_learns():
    pool = AttentionPooling(DIM, heads=HEADS, seeds=2, dtype=DOUBLE)
    pool(tokens(2, 9, DIM)).sin().sum().backward()
    assert not [name for name, parameter in pool.named_parameters() if not parameter.grad.abs().max() > 0]


def test_one_inducing_point_tells_every_token_the_same():
    layer = InducedSetAttention(DIM, heads=HEADS, inducing=1, dtype=DOUBLE)
    x = tokens(1, 8, DIM)
    read = layer.read.attention(x, layer.gather(layer.points, x))
    assert_close(read, read[:, :1].expand_as(read))


def operations(layer: torch.nn.Module, length: int) -> float:
    x = tokens(1, length, DIM)
    with torch.profiler.profile(record_shapes=True) as recorded:
        layer(x)
    return flops(recorded.events())


@pytest.mark.parametrize(("kind", "squares"), [(InducedSetAttention, 0), (SetAttention, 4 * DIM)])
def test_operations_grow_with_the_set_or_with_its_square(kind: type[torch.nn.Module], squares: int):
    layer = kind(DIM, heads=HEADS).to(DOUBLE)
    short, longer, longest = (operations(layer, length) for length in (100, 200, 300))
    assert longest - 2 * longer + short == squares * 2 * 100**2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: InducedSetAttention(8, inducing=0), "InducedSetAttention: inducing 0"),
        (lambda: AttentionPooling(8, seeds=0), "AttentionPooling: seeds 0"),
        (lambda: SetAttention(8, heads=3), "heads 3 does not divide dim 8"),
        (lambda: AttentionPooling(8)(torch.zeros(1, 2, 4)), r"AttentionPooling: x has width 4"),
        (lambda: AttentionPooling(8)(torch.zeros(2, 8)), r"AttentionPooling: x of shape \(2, 8\)"),
        (lambda: AttentionPooling(8)(torch.zeros(1, 2, 8), mask=torch.ones(1, 2)), "AttentionPooling: mask Tensor"),
    ],
)
def test_what_does_not_fit_is_named(build, message: str):
    with pytest.raises(ValueError, match=message):
        build()
