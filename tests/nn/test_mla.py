"""Latent attention is the authors' layer, its absorbed step is its plain step, and its state is small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from regard.nn import LatentAttention, MultiHeadAttention
from regard.testing.checks.decoding import state_bytes
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "mla.safetensors"
DEEPSEEK_V2 = {"heads": 128, "head_dim": 128, "latent_dim": 512, "query_latent_dim": 1536, "rotary_dim": 64}


def layer_of(**options):
    torch.manual_seed(0)
    return LatentAttention(32, heads=4, causal=True, dtype=torch.float64, **options)


def authors_names(tensors):
    """The authors' tensors under our names: they stack latent and rotary key, and per head key and value."""
    latent, rotary_key = tensors["wkv_a.weight"].split([8, 4])
    key, value = tensors["wkv_b.weight"].unflatten(0, (2, 12)).split([6, 6], dim=1)
    named = {
        "latent.weight": latent,
        "rotary_key.weight": rotary_key,
        "latent_norm.weight": tensors["kv_norm.weight"],
        "key.weight": key.flatten(0, 1),
        "value.weight": value.flatten(0, 1),
        "output.weight": tensors["wo.weight"],
    }
    if "wq.weight" in tensors:
        return named | {"query.weight": tensors["wq.weight"]}
    return named | {
        "query_latent.0.weight": tensors["wq_a.weight"],
        "query_latent.1.weight": tensors["q_norm.weight"],
        "query.weight": tensors["wq_b.weight"],
    }


@pytest.mark.parametrize(("case", "query_latent_dim"), [("compressed", 10), ("direct", 0)])
def test_outputs_and_gradients_are_those_of_the_authors_layer(case, query_latent_dim):
    kept = {name.removeprefix(f"{case}."): tensor for name, tensor in load_file(GOLDEN).items() if case in name}
    weights, grads = (
        authors_names({name.removeprefix(kind): value for name, value in kept.items() if name.startswith(kind)})
        for kind in ("weight.", "grad.")
    )
    layer = LatentAttention(
        16,
        heads=2,
        head_dim=6,
        latent_dim=8,
        rotary_dim=4,
        query_latent_dim=query_latent_dim,
        causal=True,
        dtype=torch.float64,
    )
    layer.load_state_dict(weights)
    x = kept["x"].requires_grad_()
    out = layer(x)
    assert_close(out, kept["out"], rtol=1e-12, atol=1e-12)
    names = [name for name, _ in layer.named_parameters()]
    found = torch.autograd.grad(out, [x, *layer.parameters()], kept["seed"])
    for name, grad in zip(names, found[1:], strict=True):
        assert_close(grad, grads[name], rtol=1e-10, atol=1e-12)
    assert_close(found[0], kept["grad.x"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_output_equals_the_dense_formula(causal):
    torch.manual_seed(0)
    layer = LatentAttention(32, heads=4, causal=causal, rotary_dim=4, latent_dim=9, dtype=torch.float64)
    x, positions = torch.randn(11, 32, dtype=torch.float64), torch.arange(11, dtype=torch.float64)

    def rms(tensor):
        return tensor / (tensor.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rope(tensor):
        turns = torch.exp(1j * positions[:, None] * 10000.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4))
        return torch.view_as_real(torch.view_as_complex(tensor.reshape(11, 2, 2)) * turns).reshape(11, 4)

    query_latent, latent = rms(x @ layer.query_latent[0].weight.T), rms(x @ layer.latent.weight.T)
    rotary_key, mixed = rope(x @ layer.rotary_key.weight.T), []
    for head in range(4):
        query = query_latent @ layer.query.weight[12 * head : 12 * head + 12].T
        key, value = (latent @ up.weight[8 * head : 8 * head + 8].T for up in (layer.key, layer.value))
        scores = (query[:, :8] @ key.T + rope(query[:, 8:]) @ rotary_key.T) / 12**0.5
        if causal:
            scores += torch.full((11, 11), -torch.inf).triu(1)
        mixed.append(scores.softmax(-1) @ value)
    assert_close(layer(x[None])[0], torch.cat(mixed, -1) @ layer.output.weight.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pieces", [[1] * 9, [6, 1, 2]])
@pytest.mark.parametrize("options", [{}, {"latent_dim": 5, "head_dim": 7, "rotary_dim": 2, "query_latent_dim": 0}])
def test_the_absorbed_step_equals_the_plain_one(options, pieces):
    absorbed, plain = (layer_of(absorb=absorb, **options) for absorb in (True, False))
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    states = [layer.init_state(3) for layer in (absorbed, plain)]
    for piece in x.split(pieces, dim=1):
        (ours, states[0]), (wanted, states[1]) = absorbed.step(piece, states[0]), plain.step(piece, states[1])
        assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


def test_the_absorbed_step_makes_no_keys_or_values():
    layer = LatentAttention(64, heads=8, causal=True)
    keys = 2000 * 64 * 4
    with torch.no_grad():
        _, state = layer.step(torch.randn(1, 2000, 64), layer.init_state(1))
        x = torch.randn(1, 1, 64)
        layer.absorb = True
        absorbed = peak_bytes(lambda: layer.step(x, state))
        layer.absorb = False
        plain = peak_bytes(lambda: layer.step(x, state))
    assert absorbed < keys < plain


@pytest.mark.parametrize("options", [{"heads": 8, "latent_dim": 96, "rotary_dim": 32}, {"heads": 32}])
def test_the_state_at_8k_takes_an_eighth_of_multi_heads_at_most(options):
    def bytes_after_8k(layer):
        state = layer.init_state(1)
        with torch.no_grad():
            for piece in torch.randn(1, 8192, 512).split(2048, dim=1):
                if isinstance(layer, LatentAttention):
                    start = state.length
                    compressed = layer.compress(piece, torch.arange(start, start + 2048))
                    state = state.append(compressed, compressed[..., :0])
                else:
                    state = state.append(*layer.split(piece, piece)[1:])
        assert state.length == 8192
        return state_bytes(state)

    latent = LatentAttention(512, causal=True, **options)
    multi_head = MultiHeadAttention(512, heads=options["heads"], causal=True)
    assert 8 * bytes_after_8k(latent) <= bytes_after_8k(multi_head)


def test_the_state_holds_a_latent_and_one_rotary_key():
    layer = layer_of(latent_dim=10, rotary_dim=6)
    _, state = layer.step(torch.randn(2, 7, 32, dtype=torch.float64), layer.init_state(2))
    assert state.key.shape == (2, 1, 7, 16)
    assert state.value.numel() == 0


def test_the_rotary_key_is_shared_and_scores_depend_on_distance_only():
    """With the content's share of the scores at zero, equal tokens score by distance alone, in every head."""
    layer = layer_of()
    with torch.no_grad():
        layer.key.weight.zero_()
    x = torch.randn(1, 1, 32, dtype=torch.float64).expand(1, 8, 32)
    query, key, _ = layer.project(x, None, None, None)
    scores = query @ key.mT
    assert_close(scores[..., 1:, 1:], scores[..., :-1, :-1])
    assert_close(key[:, :1, :, 8:].expand_as(key[..., 8:]), key[..., 8:])
    far = layer.project(x, None, None, torch.arange(8) + 1000)
    assert_close(far[0] @ far[1].mT, scores)


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("query_latent_dim", [20, 0])
def test_the_counted_operations_are_those_of_a_step(absorbed, query_latent_dim):
    layer = layer_of(absorb=absorbed, query_latent_dim=query_latent_dim)
    with torch.no_grad():
        _, state = layer.step(torch.randn(3, 50, 32, dtype=torch.float64), layer.init_state(3))
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as count,
        ):
            layer.step(torch.randn(3, 1, 32, dtype=torch.float64), state)
    assert layer.decode_cost(50, batch=3).flops == layer.decode_cost(50, batch=3, absorbed=absorbed).flops
    # What is mixed is filled up to the width of the keys and cut again, which is not counted.
    filled = 2 * 3 * 4 * 51 * layer.rotary_dim
    assert count.get_total_flops() - filled == layer.decode_cost(50, batch=3).flops


def test_absorption_lifts_the_intensity_two_orders_of_magnitude_above_multi_heads():
    """DeepSeek-V2's layer in bfloat16: H (2 d_c + d_R) / (d_c + d_R) FLOPs per byte; multi-head attention has 1."""
    layer = LatentAttention(5120, causal=True, device="meta", dtype=torch.bfloat16, **DEEPSEEK_V2)
    limit = 128 * (2 * 512 + 64) / (512 + 64)
    assert layer.decode_cost(10**9).intensity == pytest.approx(limit, rel=1e-3)
    assert limit > 200
    # Expanding on the fly computes far more and moves far more.
    absorbed, plain = (layer.decode_cost(8192, batch=64, absorbed=absorbed) for absorbed in (True, False))
    assert plain.flops > 50 * absorbed.flops
    assert plain.bytes > 50 * absorbed.bytes
    # A single sample at a short context is bound by the weights, as everything else.
    assert layer.decode_cost(1).intensity < 2


def test_defaults_are_the_papers_proportions():
    layer = LatentAttention(2048, heads=128, head_dim=128, device="meta")
    assert (layer.latent_dim, layer.rotary_dim, layer.query.in_features) == (512, 64, 1536)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim 0; give a positive width"),
        ({"query_latent_dim": -1}, "query_latent_dim -1; give a width, or 0"),
        ({"rotary_dim": 3}, "rotary_dim 3; give a positive even width"),
    ],
)
def test_bad_widths_are_named(options, message):
    with pytest.raises(ValueError, match=f"LatentAttention: {message}"):
        LatentAttention(32, **options)
