"""The neural memory against gradient descent token by token, and the three blocks around it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from regard.models.language import Decoder
from regard.nn import NeuralMemory, TitansContext, TitansGate, TitansLayer
from regard.nn.memory.titans import unit
from regard.ops import linear_attention
from regard.ops.neural_memory import Memory, Rates, memorize

GOLDEN = Path(__file__).parents[1] / "golden" / "titans.safetensors"


def by_gradient_descent(layer: NeuralMemory, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The recurrence of the paper with gradients by autograd, one token after the other; outputs and last weights."""
    depth, batch = len(layer.initial), x.shape[0]

    def project(projection):
        z = projection.linear(x)
        if projection.convolution is not None:
            taps = projection.convolution.weight[:, 0]
            width = taps.shape[1]
            z = sum(F.pad(z, (0, 0, lag, 0))[:, : x.shape[1]] * taps[:, width - 1 - lag] for lag in range(width))
        return F.silu(z).unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    def network(weights, k):
        z = k
        for index, weight in enumerate(weights):
            z = (F.gelu(z) if index else z) @ weight
        if layer.gain is None:
            return z
        return k + F.layer_norm(z, z.shape[-1:]) * layer.gain + layer.shift

    query, key, value = unit(project(layer.query)), unit(project(layer.key)), project(layer.value)
    rates = layer.rates(x).sigmoid().unflatten(-1, (layer.heads, -1)).transpose(1, 2)[..., None, None]
    weights = [weight.expand(batch, -1, -1, -1) for weight in layer.initial]
    surprise = [torch.zeros_like(weight) for weight in weights]
    start, out = weights, []
    for t in range(x.shape[1]):
        if t % layer.chunk_size == 0:
            start = weights
        k, v = key[:, :, t : t + 1], value[:, :, t : t + 1]
        leaves = [w if w.requires_grad else w.detach().requires_grad_() for w in start]
        loss = (network(leaves, k) - v).square().sum()
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        theta = rates[:, :, t, 0] * layer.step_scale
        eta = rates[:, :, t, 1] if layer.momentum else 0.0
        alpha = rates[:, :, t, 1 + layer.momentum] if layer.forgetting else 0.0
        surprise = [eta * s - theta * g for s, g in zip(surprise, gradients, strict=True)]
        weights = [(1 - alpha) * w + s for w, s in zip(weights, surprise, strict=True)]
        out.append(network(weights, query[:, :, t : t + 1]))
    assert len(weights) == depth
    found = layer.norm(torch.cat(out, 2)).transpose(1, 2).flatten(2)
    return layer.output(found * F.silu(layer.gate(x))), weights


def test_what_is_written_is_the_peers_neural_memory():
    kept = load_file(GOLDEN)
    key, value = (kept[name][:, None].requires_grad_() for name in ("key", "value"))
    initial = [kept[f"initial_{index}"].requires_grad_() for index in range(2)]
    # Its loss is a mean over the 8 features.
    rates = Rates(
        *(kept[name][:, None] / divisor for name, divisor in (("step", 8), ("momentum", 1), ("forgetting", 1)))
    )
    weights = tuple(weight.expand(2, 1, -1, -1) for weight in initial)
    start = Memory(weights, tuple(torch.zeros_like(weight) for weight in weights), weights, 0)
    _, memory = memorize(torch.zeros_like(key), key, value, rates, start, 4, None)
    for index in range(2):
        torch.testing.assert_close(memory.weights[index][:, 0], kept[f"final_{index}"], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(memory.surprise[index][:, 0], kept[f"surprise_{index}"], rtol=1e-10, atol=1e-12)
    loss = sum((memory.weights[index][:, 0] * kept[f"seed_{index}"]).sum() for index in range(2))
    wanted = (kept["grad_key"][:, None], kept["grad_value"][:, None], kept["grad_initial_0"], kept["grad_initial_1"])
    for found, grad in zip(torch.autograd.grad(loss, [key, value, *initial]), wanted, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-9, atol=1e-12)


VARIANTS = [
    {"heads": 2, "chunk_size": 1},
    {"heads": 2, "chunk_size": 4},
    {"heads": 1, "chunk_size": 5, "depth": 3, "expansion": 2},
    {"heads": 2, "chunk_size": 64, "depth": 1, "convolution": 0},
    {"heads": 2, "chunk_size": 3, "momentum": False},
    {"heads": 2, "chunk_size": 4, "forgetting": False, "memory_residual": False},
    {"heads": 2, "chunk_size": 4, "momentum": False, "forgetting": False},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_chunks_are_gradient_descent_token_by_token(options):
    layer = NeuralMemory(12, **options, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 13, 12, dtype=torch.float64, requires_grad=True)
    wanted, weights = by_gradient_descent(layer, x)
    found, state = layer.step(x, layer.init_state(2))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)
    for a, b in zip(state.memory.weights, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    # Learning goes through the inner gradients.
    leaves = [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def plain(dim: int, **options) -> NeuralMemory:
    """A matrix that starts at zero, without anything around the rule by which it learns."""
    layer = NeuralMemory(dim, depth=1, memory_residual=False, convolution=0, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.initial[0].zero_()
    return layer


def heads_of(layer: NeuralMemory, x: torch.Tensor) -> list[torch.Tensor]:
    projected = (F.silu(p.linear(x)).unsqueeze(1) for p in (layer.query, layer.key, layer.value))
    query, key, value = projected
    return [unit(query), unit(key), value]


def read_out(layer: NeuralMemory, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
    return layer.output(layer.norm(mixed.squeeze(1)) * F.silu(layer.gate(x)))


def test_a_matrix_without_momentum_and_forgetting_is_the_delta_rule():
    layer = plain(8, chunk_size=1, momentum=False, forgetting=False)
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    query, key, value = heads_of(layer, x)
    beta = 2 * layer.rates(x).sigmoid()[:, None]
    state, out = torch.zeros(2, 1, 8, 8, dtype=torch.float64), []
    for t in range(20):
        k, v = key[:, :, t : t + 1], value[:, :, t : t + 1]
        state = state - beta[:, :, t : t + 1] * k.mT @ (k @ state) + beta[:, :, t : t + 1] * k.mT @ v
        out.append(query[:, :, t : t + 1] @ state)
    torch.testing.assert_close(layer(x), read_out(layer, x, torch.cat(out, 2)), rtol=1e-10, atol=1e-12)


def test_a_matrix_in_one_chunk_is_linear_attention_with_decay():
    # All gradients are at M = 0, where they are −2 k vᵀ.
    layer = plain(8, chunk_size=64, momentum=False)
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    query, key, value = heads_of(layer, x)
    theta, alpha = layer.rates(x).sigmoid().unsqueeze(1).unbind(-1)
    mixed = linear_attention(query, key, 2 * theta.unsqueeze(-1) * value, log_decay=(1 - alpha).log())
    torch.testing.assert_close(layer(x), read_out(layer, x, mixed), rtol=1e-10, atol=1e-12)


def test_a_surprise_without_momentum_is_forgotten_and_with_it_lasts():
    # After one association come tokens that write nothing (θ = 0): only momentum goes on moving the memory.
    moved = {}
    for momentum in (False, True):
        torch.manual_seed(0)
        layer = NeuralMemory(8, chunk_size=1, momentum=momentum, forgetting=False, convolution=0, dtype=torch.float64)
        x = torch.randn(1, 1, 8, dtype=torch.float64)
        with torch.no_grad():
            _, first = layer.step(x, layer.init_state(1))
            layer.rates.bias[0] = -1000.0
            _, later = layer.step(torch.randn(1, 1, 8, dtype=torch.float64), first)
        moved[momentum] = float((later.memory.weights[0] - first.memory.weights[0]).norm())
    assert moved[False] == 0.0
    assert moved[True] > 0.0


def test_gradient_descent_recalls_pairs_that_a_sum_confuses():
    # 24 pairs for a matrix of 16, seen 8 times. In one chunk all gradients are at zero: a sum, and mostly crosstalk.
    torch.manual_seed(0)
    pairs = torch.randn(1, 24, 16, dtype=torch.float64)
    errors = {}
    for name, options in {
        "sum": {"depth": 1, "memory_residual": False, "chunk_size": 10_000},
        "descent": {"depth": 1, "memory_residual": False, "chunk_size": 1},
    }.items():
        layer = NeuralMemory(16, momentum=False, forgetting=False, convolution=0, dtype=torch.float64, **options)
        with torch.no_grad():
            layer.initial[0].zero_()
            layer.rates.weight.zero_()
            layer.rates.bias.fill_(0.0)
            for projection in (layer.key, layer.value):
                torch.nn.init.orthogonal_(projection.linear.weight)
            state = layer.init_state(1)
            for _ in range(8):
                _, state = layer.step(pairs, state)
            key, value = F.silu(layer.key.linear(pairs)), F.silu(layer.value.linear(pairs))
            recalled = layer.retrieve(key, state.memory.weights)
            errors[name] = float((recalled - value).norm() / value.norm())
    assert errors["descent"] < 0.75 < 1.0 < errors["sum"]


def test_forgetting_everything_leaves_the_last_surprise():
    layer = NeuralMemory(8, chunk_size=4, momentum=False, dtype=torch.float64)
    with torch.no_grad():
        layer.rates.weight.zero_()
        layer.rates.bias.copy_(torch.tensor([-1000.0, 1000.0]))
        _, state = layer.step(torch.randn(1, 6, 8, dtype=torch.float64), layer.init_state(1))
    assert all(not weight.any() for weight in state.memory.weights)


@pytest.mark.parametrize("tokens", [1, 10, 1000])
def test_the_state_is_three_networks_at_any_length(tokens):
    layer = NeuralMemory(16, heads=2, expansion=2, chunk_size=32)
    with torch.no_grad():
        _, state = layer.step(torch.randn(1, tokens, 16), layer.init_state(1))
    kept = sum(w.numel() for of in (state.memory.weights, state.memory.surprise, state.memory.start) for w in of)
    assert kept == 3 * sum(weight.numel() for weight in layer.initial)
    assert state.key.shape == (1, 3, 16)


def context_by_segments(layer: TitansContext, x: torch.Tensor) -> torch.Tensor:
    """MAC written out for the whole of each segment, positions left out."""
    batch, heads, s = x.shape[0], layer.heads, layer.segment
    asked = layer.recall(x, layer.recall.init_state(batch))[0]
    memory, out = layer.memory.init_state(batch), []
    for part, query in zip(x.split(s, dim=1), asked.split(s, dim=1), strict=True):
        h = layer.memory.retrieve(query, memory.memory.weights)
        whole = torch.cat([layer.persistent.expand(batch, -1, -1), h, part], dim=1)

        def split(tensor):
            return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)

        q, k, v = (split(p(whole)) for p in (layer.attention.query, layer.attention.key, layer.attention.value))
        scores = q[:, :, -part.shape[1] :] @ k.mT / q.shape[-1] ** 0.5
        earlier = torch.ones(part.shape[1], part.shape[1], dtype=torch.bool).tril()
        seen = torch.cat([earlier.new_ones(part.shape[1], len(layer.persistent)), earlier, earlier], dim=1)
        y = (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        y = layer.attention.output(y)
        read, memory = layer.memory.step(y, memory)
        gate = F.rms_norm(read, read.shape[-1:], layer.gating.remembered.weight, 1e-6).sigmoid()
        out.append(F.rms_norm(y, y.shape[-1:], layer.gating.attended.weight, 1e-6) * gate)
    return torch.cat(out, dim=1)


def test_memory_as_a_context_is_its_definition():
    layer = TitansContext(
        16, heads=2, segment=6, persistent=3, position=None, memory={"chunk_size": 4}, dtype=torch.float64
    )
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), context_by_segments(layer, x), rtol=1e-10, atol=1e-11)


def test_memory_as_a_gate_and_as_a_layer_are_their_definitions():
    given = {"heads": 2, "window": 5, "persistent": 3, "memory": {"chunk_size": 4}, "dtype": torch.float64}
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    gate, layer = TitansGate(16, **given), TitansLayer(16, **given)
    whole = torch.cat([gate.persistent.expand(2, -1, -1), x], dim=1)
    read = F.rms_norm(gate.memory(whole), (16,), gate.gating.remembered.weight, 1e-6).sigmoid()
    wanted = F.rms_norm(gate.attention(whole), (16,), gate.gating.attended.weight, 1e-6) * read
    torch.testing.assert_close(gate(x), wanted[:, 3:], rtol=1e-10, atol=1e-11)
    whole = torch.cat([layer.persistent.expand(2, -1, -1), x], dim=1)
    torch.testing.assert_close(layer(x), layer.attention(layer.memory(whole))[:, 3:], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("block", [TitansContext, TitansGate, TitansLayer])
def test_a_token_beyond_segment_and_window_is_remembered(block):
    size = {"segment": 4} if block is TitansContext else {"window": 4}
    layer = block(16, heads=2, persistent=2, memory={"chunk_size": 4, "forgetting": False}, dtype=torch.float64, **size)
    x = torch.randn(1, 40, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[:, -1].square().sum(), x)
    assert gradient[:, 0].abs().max() > 0
    with torch.no_grad():
        # The memory alone carries it: where the rates write nothing, nothing is left of the first token.
        layer.memory.rates.bias.view(1, -1)[:, 0] = -1000.0
    (gradient,) = torch.autograd.grad(layer(x)[:, -1].square().sum(), x)
    assert gradient[:, 0].abs().max() == 0


def test_sizes_that_are_none_are_refused():
    with pytest.raises(ValueError, match="chunk_size 0"):
        NeuralMemory(8, chunk_size=0)
    with pytest.raises(ValueError, match="segment 0"):
        TitansContext(8, heads=2, segment=0)
    with pytest.raises(ValueError, match="'alibi' is not known"):
        TitansGate(8, heads=2, position="alibi")


def test_a_model_leaves_the_memory_its_residual():
    """Models take a mechanism's own residual away; the one inside the memory keeps its gradient descent stable."""
    model = Decoder(16, "titans_memory", dim=16, heads=2, layers=2)
    assert all(block.mixer.gain is not None for block in model.blocks)
