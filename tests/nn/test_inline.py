"""InLine attention is the authors' layer, tells queries apart that linear attention confuses, in linear time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn import InLineAttention, InLineAttention2d
from regard.ops import linear_attention
from regard.ops.masks import Padding
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "inline.safetensors"


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """Weights of the size of one: those at the start make every residual small."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def ours(kept: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The authors' weights, or their gradients, under our names."""
    given = {name.removeprefix(f"{kind}."): tensor for name, tensor in kept.items() if name.startswith(f"{kind}.")}
    named = {}
    for suffix in ("weight", "bias"):
        split = [given[name] for name in (f"q.{suffix}", f"kv.{suffix}", f"qkv.{suffix}") if name in given]
        named |= {f"qkv.{suffix}": torch.cat(split), f"output.{suffix}": given[f"proj.{suffix}"]}
        named |= {f"kernel.{layer}.{suffix}": given[f"residual.{layer}.{suffix}"] for layer in (0, 2)}
    return named


@pytest.mark.parametrize(
    ("case", "grid", "feature_map"),
    [
        ("deit", (3, 3), "identity"),
        ("pvt", (5, 4), "identity"),
        ("swin_relu", (3, 3), "relu"),
        ("swin_leakyrelu", (3, 3), "leaky_relu"),
        ("swin_exp", (3, 3), "exp"),
    ],
)
def test_outputs_and_gradients_are_those_of_the_authors_layers(case, grid, feature_map):
    kept = {name.partition(".")[2]: value for name, value in load_file(GOLDEN).items() if name.startswith(f"{case}.")}
    with_class = case == "deit"
    layer = InLineAttention2d(4, heads=2, feature_map=feature_map, class_token=with_class, dtype=torch.float64)
    layer.load_state_dict(ours(kept, "weight"))
    x = kept["x"].requires_grad_()
    if with_class:
        field, class_token = layer(x[:, 1:].unflatten(1, grid), class_token=x[:, 0])
        out = torch.cat([class_token[:, None], field.flatten(1, 2)], dim=1)
    else:
        out = layer(x.unflatten(1, grid)).flatten(1, 2)
    assert_close(out, kept["out"], rtol=1e-11, atol=1e-11)
    names = [name for name, _ in layer.named_parameters()]
    found = torch.autograd.grad(out, [x, *layer.parameters()], kept["seed"])
    wanted = {"x": kept["grad.x"], **ours(kept, "grad")}
    for name, gradient in zip(["x", *names], found, strict=True):
        assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-10)


def dense(layer: InLineAttention, x: Tensor) -> Tensor:
    """The paper's weights as a matrix, and the residual as a sum over neighbours, for one sequence."""
    phi = {
        "identity": lambda t: t,
        "relu": F.relu,
        "leaky_relu": lambda t: torch.where(t > 0, t, 0.01 * t),
        "exp": lambda t: torch.exp(0.2 * t),
    }[layer.feature_map]
    length, heads = x.shape[0], layer.heads
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in layer.qkv(x).chunk(3, dim=-1))
    scores = phi(query) @ phi(key).mT * layer.head_dim**-0.5 / length
    weights = scores - scores.mean(-1, keepdim=True) + 1 / length
    mixed = (weights @ value).transpose(0, 1).flatten(1)
    if layer.kernel is not None:
        kernel = layer.kernel(x.mean(0)[None, :, None]).reshape(layer.dim, 3)
        beside = int(layer.class_token)
        field = value.transpose(0, 1).flatten(1)[beside:]
        around = F.pad(field, (0, 0, 1, 1))
        shifted = (around[step : step + len(field)] * kernel[:, step] for step in range(3))
        mixed = mixed + F.pad(sum(shifted), (0, 0, beside, 0))
    return layer.output(mixed)


@pytest.mark.parametrize("feature_map", ["identity", "relu", "leaky_relu", "exp"])
@pytest.mark.parametrize("options", [{}, {"class_token": True}, {"local": False}])
def test_tokens_follow_the_formula(feature_map, options):
    layer = moved(InLineAttention(8, heads=2, feature_map=feature_map, **options, dtype=torch.float64))
    x = tokens(3, 11, 8)
    assert_close(layer(x), torch.stack([dense(layer, sample) for sample in x]), rtol=1e-10, atol=1e-10)


def test_padding_is_in_no_mean_and_no_residual():
    layer = moved(InLineAttention(8, heads=2, class_token=True, dtype=torch.float64))
    x = tokens(3, 11, 8)
    out = layer(x, mask=Padding(torch.tensor([11, 5, 1])))
    for sample, length in enumerate((11, 5, 1)):
        assert_close(out[sample, :length], dense(layer, x[sample, :length]), rtol=1e-10, atol=1e-10)


def weights_of(layer: InLineAttention, query: Tensor, key: Tensor) -> Tensor:
    """The weights of given queries and keys: projections are read from the layer, here the identity."""
    with torch.no_grad():
        width = layer.dim
        layer.qkv.weight.zero_()
        layer.qkv.weight[:width] = torch.eye(width, dtype=query.dtype)
        layer.qkv.bias.zero_()
        layer.qkv.weight[width : 2 * width] = torch.eye(width, dtype=query.dtype)
    return layer.attention_map(torch.cat([query, key])[None])[0][0, 0]


@pytest.mark.parametrize("feature_map", ["identity", "leaky_relu", "exp"])
def test_no_two_queries_get_the_same_weights_where_linear_attention_confuses_them(feature_map):
    layer = InLineAttention(4, heads=1, feature_map=feature_map, local=False, dtype=torch.float64)
    query = tokens(1, 4)
    pair = torch.cat([query, 3 * query])
    mine = weights_of(layer, pair, tokens(9, 4))[:2]
    assert (mine[0] - mine[1]).abs().max() > 1e-2
    # One direction, two lengths: the features of linear attention differ by a factor, which its sum takes off again.
    ones = torch.eye(9, dtype=torch.float64)[None, None]
    features = F.relu(pair)[None, None], F.relu(tokens(9, 4))[None, None]
    plain = linear_attention(*features, ones, causal=False, normalize=True)[0, 0]
    assert_close(plain[0], plain[1], rtol=1e-12, atol=1e-12)


def test_a_query_can_be_read_back_from_its_weights():
    layer = InLineAttention(4, heads=1, local=False, dtype=torch.float64)
    x = tokens(9, 4)
    weights = weights_of(layer, x[:3], x[3:])
    centred = (x - x.mean(0)) / 9 / 2
    found = (weights - 1 / 9) @ torch.linalg.pinv(centred).mT
    assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_rows_sum_to_one_and_weights_may_be_negative():
    layer = moved(InLineAttention(8, heads=2, local=False, dtype=torch.float64))
    weights, _ = layer.attention_map(5 * tokens(2, 10, 8))
    assert_close(weights.sum(-1), torch.ones(2, 2, 10, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert weights.min() < 0


def test_the_residual_of_a_sample_depends_on_its_mean_token():
    """A change far away moves the residual only where it moves the mean."""
    layer = moved(InLineAttention2d(4, heads=2, dtype=torch.float64))
    plain = InLineAttention2d(4, heads=2, local=False, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = tokens(1, 6, 6, 4)
    with torch.no_grad():
        change = torch.zeros_like(x)
        change[0, 5, 4], change[0, 5, 5] = 1, -1
        residual, balanced, shifted = (layer(given) - plain(given) for given in (x, x + change, x + change.abs()))
    assert_close(balanced[0, :4], residual[0, :4], rtol=1e-10, atol=1e-10)
    assert (shifted - residual)[0, :4].abs().max() > 1e-3


def test_peak_memory_is_far_below_one_map():
    length = 4096
    layer, x = InLineAttention(16, heads=2), tokens(1, length, 16, dtype=torch.float32).requires_grad_()
    peak = peak_bytes(lambda: layer(x, mask=Padding(torch.tensor([4000]))).sum().backward())
    assert peak < length * length * x.element_size() / 8


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: InLineAttention(8, feature_map="elu"), "feature_map 'elu'"),
        (lambda: InLineAttention2d(8, class_token=True)(tokens(1, 2, 2, 8)), "class_token missing"),
        (lambda: InLineAttention2d(8)(tokens(1, 2, 2, 8), class_token=tokens(1, 8)), "class_token given"),
        (lambda: InLineAttention(8, dtype=torch.float64).attention_map(tokens(1, 4, 8)), "local=True"),
    ],
)
def test_what_does_not_fit_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
