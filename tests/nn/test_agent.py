"""Agent attention is the authors' layer, is linear attention between softmaxes, and never sees an n × n map."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn import AgentAttention, AgentAttention2d
from regard.ops import linear_attention
from regard.ops.masks import Padding
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "agent.safetensors"


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """The biases start too small to tell a transposed one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def ours(kept: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The authors' weights, or their gradients, under our names and in our shapes."""
    given = {name.removeprefix(f"{kind}."): tensor for name, tensor in kept.items() if name.startswith(f"{kind}.")}

    def joined(suffix: str) -> Tensor:
        name = f"qkv.{suffix}"
        return given[name] if name in given else torch.cat([given[f"q.{suffix}"], given[f"kv.{suffix}"]])

    named = {
        **{f"qkv.{suffix}": joined(suffix) for suffix in ("weight", "bias")},
        **{f"output.{suffix}": given[f"proj.{suffix}"] for suffix in ("weight", "bias")},
        **{f"convolution.{suffix}": given[f"dwc.{suffix}"] for suffix in ("weight", "bias")},
        "gather_bias.tables.0": given["an_bias"],
        "gather_bias.tables.1": given["ah_bias"][0],
        "gather_bias.tables.2": given["aw_bias"][0],
        "ask_bias.tables.0": given["na_bias"],
        "ask_bias.tables.1": given["ha_bias"][0].permute(0, 3, 1, 2),
        "ask_bias.tables.2": given["wa_bias"][0].permute(0, 3, 1, 2),
    }
    if "ac_bias" in given:
        named |= {"gather_bias.class_token": given["ac_bias"][0], "ask_bias.class_token": given["ca_bias"][0].mT}
    return named


@pytest.mark.parametrize("case", ["deit", "detection"])
def test_outputs_and_gradients_are_those_of_the_authors_layers(case):
    kept = {name.partition(".")[2]: value for name, value in load_file(GOLDEN).items() if name.startswith(case)}
    layer = AgentAttention2d(4, heads=2, agents=4, window=3, class_token=case == "deit", dtype=torch.float64)
    layer.load_state_dict(ours(kept, "weight"))
    x = kept["x"].requires_grad_()
    if case == "deit":
        grid, class_token = layer(x[:, 1:].unflatten(1, (3, 3)), class_token=x[:, 0])
        out = torch.cat([class_token[:, None], grid.flatten(1, 2)], dim=1)
    else:
        # A grid that is not the window of the biases, nor square.
        out = layer(x.unflatten(1, (5, 4))).flatten(1, 2)
    assert_close(out, kept["out"], rtol=1e-12, atol=1e-12)
    names = [name for name, _ in layer.named_parameters()]
    found = torch.autograd.grad(out, [x, *layer.parameters()], kept["seed"])
    wanted = ours(kept, "grad")
    assert_close(found[0], kept["grad.x"], rtol=1e-11, atol=1e-12)
    for name, gradient in zip(names, found[1:], strict=True):
        assert_close(gradient, wanted[name], rtol=1e-11, atol=1e-12)


def dense(layer: AgentAttention, x: Tensor) -> Tensor:
    """The paper's formula along one axis for one sequence, with torch's own pooling and interpolation."""
    beside, length = int(layer.class_token), x.shape[0] - layer.class_token
    query, key, value = layer.qkv(x).chunk(3, dim=-1)
    pooled = F.adaptive_avg_pool1d(query[beside:].mT[None], layer.agents)[0].mT
    mixed = torch.zeros_like(value)
    for head, (q, a, k, v) in enumerate(
        zip(*(part.split(layer.head_dim, -1) for part in (query, pooled, key, value)), strict=True)
    ):
        biases = []
        for tables in (layer.gather_bias, layer.ask_bias):
            stretched = sum(F.interpolate(t[head][None], size=length, mode="linear")[0] for t in tables.tables)
            first = [tables.class_token[head]] if beside else []
            biases.append(torch.cat([*first, stretched], dim=-1))
        gathered = (a @ k.mT * layer.head_dim**-0.5 + biases[0]).softmax(-1) @ v
        columns = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        mixed[:, columns] = (q @ a.mT * layer.head_dim**-0.5 + biases[1].mT).softmax(-1) @ gathered
    mixed[beside:] += layer.convolution(value[beside:].mT[None])[0].mT
    return layer.output(mixed)


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("length", [3, 5, 20, 31])
def test_tokens_follow_the_formula_along_their_axis(length, class_token):
    layer = moved(AgentAttention(8, heads=2, agents=5, window=9, class_token=class_token, dtype=torch.float64))
    x = tokens(2, length, 8)
    assert_close(layer(x), torch.stack([dense(layer, sample) for sample in x]), rtol=1e-10, atol=1e-10)


def test_padding_is_in_no_agent_no_bias_and_no_convolution():
    layer = moved(AgentAttention(8, heads=2, agents=5, window=9, class_token=True, dtype=torch.float64))
    x = tokens(2, 17, 8)
    out = layer(x, mask=Padding(torch.tensor([17, 11])))
    assert_close(out[1, :11], dense(layer, x[1, :11]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "grid"),
    [
        (AgentAttention(12, heads=3, agents=6, class_token=True, convolution=False, dtype=torch.float64), (21,)),
        (AgentAttention2d(12, heads=3, agents=9, convolution=False, dtype=torch.float64), (4, 7)),
    ],
)
def test_it_is_linear_attention_with_feature_maps_of_softmax_attention(layer, grid):
    x = tokens(2, *grid, 12)
    if layer.axes == 1:
        grid = (20,)
    ask, gather, value = moved(layer).feature_maps(x.flatten(1, -2), grid)
    expected = layer.combine(linear_attention(ask, gather, value, causal=False))
    assert_close(layer(x).flatten(1, -2), expected, rtol=1e-10, atol=1e-10)


def test_the_map_is_a_distribution_of_no_more_rank_than_agents():
    layer = moved(AgentAttention(8, heads=2, agents=3, convolution=False, dtype=torch.float64))
    weights, _ = layer.attention_map(tokens(2, 19, 8))
    assert weights.min() >= 0
    assert_close(weights.sum(-1), torch.ones(2, 2, 19, dtype=torch.float64))
    assert (torch.linalg.matrix_rank(weights, rtol=1e-10) == 3).all()


def test_one_agent_tells_every_token_the_same_and_the_convolution_tells_them_apart():
    x = tokens(1, 10, 8)
    same = AgentAttention(8, heads=2, agents=1, convolution=False, dtype=torch.float64)(x)
    assert_close(same, same[:, :1].expand_as(same), rtol=1e-12, atol=1e-12)
    apart = AgentAttention(8, heads=2, agents=1, dtype=torch.float64)(x)
    assert (apart - apart[:, :1]).abs().amax((0, 2))[1:].min() > 1e-6


def test_as_many_agents_as_tokens_are_the_queries_themselves():
    layer = AgentAttention(8, heads=2, agents=7, agent_bias=False, convolution=False, dtype=torch.float64)
    x = tokens(2, 7, 8)
    weights, _ = layer.attention_map(x)
    query, key, _ = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in layer.qkv(x).chunk(3, dim=-1))
    expected = (query @ query.mT / 2).softmax(-1) @ (query @ key.mT / 2).softmax(-1)
    assert_close(weights, expected, rtol=1e-10, atol=1e-10)


def test_the_class_token_is_in_no_agent():
    layer = AgentAttention(8, heads=2, agents=3, class_token=True, agent_bias=False, convolution=False)
    x = tokens(1, 10, 8, dtype=torch.float32)
    other = torch.cat([-x[:, :1], x[:, 1:]], dim=1)
    (ask, _, _), (asked, _, _) = (layer.feature_maps(given, (9,)) for given in (x, other))
    assert_close(asked[:, :, 1:], ask[:, :, 1:])


def test_peak_memory_is_far_below_one_map():
    length = 8192
    layer, x = AgentAttention(16, heads=2, agents=16), tokens(1, length, 16, dtype=torch.float32).requires_grad_()
    peak = peak_bytes(lambda: layer(x, mask=Padding(torch.tensor([8000]))).sum().backward())
    assert peak < length * length * x.element_size() / 8


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AgentAttention(8, agents=0), "agents 0 for 1 axes"),
        (lambda: AgentAttention2d(8, agents=5), "agents 5 for 2 axes"),
        (lambda: AgentAttention2d(8, window=(3,)), "window .3,. for 2 axes"),
        (lambda: AgentAttention(8, window=0), "window 0 for 1 axes"),
        (lambda: AgentAttention2d(8, class_token=True)(tokens(1, 2, 2, 8)), "class_token missing"),
        (lambda: AgentAttention2d(8)(tokens(1, 2, 2, 8), class_token=tokens(1, 8)), "class_token given"),
        (lambda: AgentAttention(8, dtype=torch.float64).attention_map(tokens(1, 4, 8)), "convolution=True"),
    ],
)
def test_what_does_not_fit_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
