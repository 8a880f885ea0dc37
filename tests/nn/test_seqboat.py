"""SeqBoat is its authors' layer and masked attention of all tokens, but computes that of the activated ones only."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from regard.nn import SparseModularActivation
from regard.nn.linear import seqboat
from regard.nn.linear.damped_ema import DampedEMA
from regard.ops.attention import attention
from regard.ops.biases import RelativeBias
from regard.ops.masks import Padding, Window
from regard.testing.checks.decoding import state_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "seqboat.safetensors"
OPTIONS = {
    "causal": {"causal": True, "normalizer": "softmax", "max_positions": 5},
    "bidirectional": {"max_positions": 5},
    "rotary": {"causal": True, "normalizer": "softmax", "position": "rotary", "norm_first": False},
    "local": {"causal": True, "position": "local"},
}


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def layer_of(dim: int = 6, *, head_dim: int = 4, window: int = 3, **options) -> SparseModularActivation:
    """A layer whose parameters are large enough to tell."""
    torch.manual_seed(0)
    layer = SparseModularActivation(dim, head_dim=head_dim, window=window, dtype=torch.float64, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return layer


def choosing(layer: SparseModularActivation, chosen: Callable[[int], bool]) -> SparseModularActivation:
    """The layer made to activate these positions of one sequence with full confidence, whatever it reads there."""

    def choose(averaged: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        active = torch.tensor([[chosen(position) for position in range(averaged.shape[1])]])
        return active, torch.ones_like(averaged[..., 0])

    layer.choose = choose
    return layer


def without_average(layer: SparseModularActivation) -> SparseModularActivation:
    """The layer whose tokens meet in attention only."""
    with torch.no_grad():
        layer.average.gamma.zero_()
    return layer


def averaged(ema: DampedEMA, x: Tensor) -> Tensor:
    """The recurrence, forth and, without causality, back."""
    share = ema.delta.sigmoid()
    entry, decay, exit = share * ema.beta, 1 - share * ema.alpha.sigmoid(), ema.gamma / ema.size**0.5
    total = ema.omega * x
    for rows, order in zip(range(0, len(decay), ema.dim), (1, -1), strict=False):
        rows, memory, out = slice(rows, rows + ema.dim), 0.0, []
        for token in x.unbind(1)[::order]:
            memory = entry[rows] * token.unsqueeze(-1) + decay[rows] * memory
            out.append((exit[rows] * memory).sum(-1))
        total = total + torch.stack(out[::order], 1)
    return total


def state_space(layer: SparseModularActivation, x: Tensor) -> Tensor:
    return F.silu(averaged(layer.average, layer.norm(x) if layer.norm_first else x))


def activated(layer: SparseModularActivation, x: Tensor) -> Tensor:
    return layer.choose(state_space(layer, x))[0]


def balanced(layer: SparseModularActivation, x: Tensor) -> SparseModularActivation:
    """The layer made to activate about half of these tokens, with none at the border where roundoff would decide."""
    with torch.no_grad():
        first, second = layer.configurator(state_space(layer, x)).unbind(-1)
        layer.configurator.bias[0] += (second - first).quantile(0.47)
    return layer


def dense(layer: SparseModularActivation, x: Tensor) -> Tensor:
    """The definition: all tokens attend, to those that are activated and few enough activated ones away."""
    length, dim = x.shape[1:]
    m = state_space(layer, x)
    share = (layer.configurator(m) / layer.log_temperature.exp()).softmax(-1)
    confidence, chosen = share.max(-1)
    active = chosen == 1
    z, r, v = F.silu(layer.unit(m)).split([layer.head_dim, 2 * dim, 2 * dim], -1)
    query, key = (z * gain + shift for gain, shift in zip(layer.gain, layer.shift, strict=True))
    place = torch.arange(length)
    if layer.position == "rotary":
        angle = place[:, None] * 10000.0 ** (-torch.arange(0, layer.head_dim, 2, dtype=x.dtype) / layer.head_dim)
        turn = torch.polar(torch.ones_like(angle), angle)
        query, key = (
            torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (-1, 2))) * turn).flatten(-2)
            for part in (query, key)
        )
    apart = active.cumsum(1)[:, None, :] - active.cumsum(1)[:, :, None]
    within = (apart >= -layer.window) & (apart <= layer.window) & active[:, None, :] & active[:, :, None]
    if layer.causal:
        within = within & (place <= place[:, None])
    scores = (
        query
        @ key.mT
        / (layer.head_dim**0.5 if layer.normalizer == "softmax" else layer.window * (1 if layer.causal else 2))
    )
    if layer.position != "rotary":
        distance, reach = (place - place[:, None]) if layer.position == "relative" else apart, len(layer.relative) // 2
        scores = scores + layer.relative[distance.clamp(-reach, reach) + reach]
    if layer.normalizer == "softmax":
        scores = scores.masked_fill(~within, -torch.inf)
        weights = torch.where(active[..., None], scores, 0.0).softmax(-1)
    else:
        weights = scores.relu().square() * within
    mixed = layer.output(r * (weights @ v)) * (confidence * active)[..., None]
    out = F.silu(layer.skip(m) + mixed + x)
    return out if layer.norm_first else layer.norm(out)


@pytest.mark.parametrize("case", OPTIONS)
def test_output_and_gradients_are_those_of_the_authors_layer(case):
    golden = load_file(GOLDEN)
    given = {name.removeprefix(f"{case}."): value for name, value in golden.items() if name.startswith(f"{case}.")}
    layer = SparseModularActivation(4, window=3, head_dim=6, **OPTIONS[case], dtype=torch.float64)

    def ours(suffix: str) -> dict[str, Tensor]:
        gate, skip = ({kind: given[f"hx_proj.{kind}{suffix}"] for kind in ("weight", "bias")} for _ in range(2))
        found = {f"configurator.{kind}": value[:2] for kind, value in gate.items()}
        found |= {f"skip.{kind}": value[2:] for kind, value in skip.items()}
        for name, theirs in (("norm", "norm"), ("unit", "mx_proj"), ("output", "h_proj")):
            found |= {f"{name}.{kind}": given[f"{theirs}.{kind}{suffix}"] for kind in ("weight", "bias")}
        for name in ("delta", "alpha", "beta", "gamma", "omega"):
            found[f"average.{name}"] = given[f"ssm.{name}{suffix}"]
        for name, theirs in (("gain", "gamma"), ("shift", "beta"), ("log_temperature", "temp")):
            found[name] = given[f"{theirs}{suffix}"]
        if layer.position != "rotary":
            table = given[f"rel_pos_bias{suffix}"]
            # Theirs counts distances within three windows, from the beginning of the one before.
            found["relative"] = table[8:15] if layer.position == "local" else table
        return found

    layer.load_state_dict({name: value.view_as(layer.get_parameter(name)) for name, value in ours("").items()})
    x = given["x"].requires_grad_()
    real = (torch.arange(16) < golden["lengths"][:, None]).unsqueeze(-1)
    out = layer(x, mask=Padding(golden["lengths"])) * real
    assert_close(out, given["y"], rtol=1e-10, atol=1e-10)
    weights = (torch.linspace(-1, 1.7, out.numel(), dtype=out.dtype) * 40).sin().view_as(out)
    (out * weights).sum().backward()
    assert_close(x.grad, given["x.grad"], rtol=1e-9, atol=1e-9)
    for name, wanted in ours(".grad").items():
        parameter = layer.get_parameter(name)
        assert_close(parameter.grad, wanted.view_as(parameter), rtol=1e-9, atol=1e-9, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("position", ["relative", "local", "rotary"])
@pytest.mark.parametrize(("causal", "normalizer"), list(product([True, False], ["relu2", "softmax"])))
@pytest.mark.parametrize("length", [1, 31])
def test_activated_tokens_alone_give_what_all_tokens_give_masked(position, causal, normalizer, length):
    options = {"max_positions": 7} if position == "relative" else {}
    layer = layer_of(causal=causal, normalizer=normalizer, position=position, **options)
    x = tokens(3, length, 6).requires_grad_()
    if length > 1:
        balanced(layer, x)
    found, wanted = layer(x), dense(layer, x)
    assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    leaves = [x, *layer.parameters()]
    gradients = [torch.autograd.grad(out.sin().sum(), leaves, materialize_grads=True) for out in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_with_every_token_activated_it_is_plain_window_attention(causal):
    layer = choosing(layer_of(causal=causal, normalizer="softmax", position="local"), lambda position: True)
    x = tokens(1, 20, 6)
    m = state_space(layer, x)
    z, r, v = F.silu(layer.unit(m)).unsqueeze(1).split([4, 12, 12], -1)
    query, key = (z * gain + shift for gain, shift in zip(layer.gain, layer.shift, strict=True))
    near = Window(3, 0 if causal else 3)
    mixed = attention(query, key, v, mask=near, bias=RelativeBias(layer.relative[None], 3))
    wanted = F.silu(layer.skip(m) + layer.output((mixed * r).squeeze(1)) + x)
    assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)


def test_with_no_token_activated_it_is_the_state_space_model():
    layer = choosing(layer_of(), lambda position: False)
    x = tokens(1, 20, 6)
    m = state_space(layer, x)
    assert_close(layer(x), F.silu(layer.skip(m) + x), rtol=1e-12, atol=1e-12)


def test_attention_computes_activated_tokens_only(monkeypatch):
    """Tokens that the attention unit sees, and floating-point operations, go with the activated tokens."""
    seen = []

    def watched(query, key, value, **arguments):
        seen.append((query.shape[2], key.shape[2]))
        return attention(query, key, value, **arguments, backend="reference")

    monkeypatch.setattr(seqboat, "attention", watched)
    operations = {}
    for every in (1, 4, 16):
        layer = choosing(layer_of(16, head_dim=8, window=512), lambda position, every=every: position % every == 0)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(tokens(1, 512, 16))
        operations[every] = counter.get_total_flops()
    assert seen == [(512, 512), (128, 128), (32, 32)]

    def of_the_unit(count: int) -> int:
        projections = 2 * count * 16 * (8 + 2 * 32) + 2 * count * 32 * 16
        return projections + 2 * count * count * (8 + 32)

    assert operations[1] - operations[4] == of_the_unit(512) - of_the_unit(128)
    assert operations[4] - operations[16] == of_the_unit(128) - of_the_unit(32)


@pytest.mark.parametrize(("every", "reaches"), [(400, True), (20, False)])
def test_the_window_reaches_as_far_back_as_few_tokens_are_activated(every, reaches):
    layer = without_average(layer_of(causal=True, window=2, normalizer="softmax"))
    x = tokens(1, 801, 6).requires_grad_()
    out = choosing(layer, lambda position: position % every == 0)(x)
    (gradient,) = torch.autograd.grad(out[0, 800].sum(), x)
    assert (gradient[0, 0].abs().max() > 1e-8) == reaches
    assert gradient[0, 1:20].abs().max() == 0


def test_the_configurator_learns_from_activated_tokens_only():
    x = tokens(1, 40, 6)
    layer = balanced(without_average(layer_of()), x)
    active = activated(layer, x)
    leaves = [layer.configurator.weight, layer.log_temperature]
    for position, chosen in enumerate(active[0].tolist()):
        taught = torch.autograd.grad(layer(x)[0, position].sum(), leaves)
        assert all((gradient.abs().max() > 0) == chosen for gradient in taught)


def test_temperature_moves_confidence_between_a_half_and_one_but_not_the_choice():
    layer = layer_of()
    x = tokens(2, 30, 6)
    found = []
    for temperature in (1e-3, 1.0, 1e6):
        with torch.no_grad():
            layer.log_temperature.fill_(temperature).log_()
        found.append(layer.choose(x))
    active, (sharp, some, flat) = found[0][0], (confidence[found[0][0]] for _, confidence in found)
    assert all(torch.equal(chosen, active) for chosen, _ in found)
    assert sharp.mean() > 0.95
    assert_close(flat, torch.full_like(flat, 0.5), rtol=0, atol=1e-4)
    assert (some > 0.5).all()
    assert (some < 1).all()


def test_temperature_starts_at_its_share_of_the_root_of_the_width():
    layer = SparseModularActivation(64, temperature=0.3)
    assert layer.log_temperature.exp().item() == pytest.approx(0.3 * 8)


@pytest.mark.parametrize("position", ["relative", "local", "rotary"])
def test_decoding_remembers_the_last_activated_tokens_of_each_sequence(position):
    x = tokens(2, 60, 6)
    layer = balanced(layer_of(causal=True, position=position), x)
    active = activated(layer, x)
    state, out, size = layer.init_state(2), [], state_bytes(layer.init_state(2))
    for end in range(1, 61):
        token, state = layer.step(x[:, end - 1 : end], state)
        out.append(token)
        assert state_bytes(state) == size
        for sample in range(2):
            kept = active[sample, :end].nonzero().flatten()[-3:].tolist()
            assert state.memory.filled[sample] == len(kept)
            assert state.memory.places[sample, 3 - len(kept) :].tolist() == kept
    assert_close(torch.cat(out, 1), layer(x), rtol=1e-11, atol=1e-11)


def test_autocast_gives_what_full_precision_gives_and_decodes():
    layer = layer_of(causal=True, normalizer="softmax").float()
    x = tokens(2, 30, 6, dtype=torch.float32)
    balanced(layer, x)
    wanted = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = layer(x)
        first, state = layer.step(x[:, :20], layer.init_state(2))
        second, _ = layer.step(x[:, 20:], state)
    assert (whole - wanted).norm() < 0.05 * wanted.norm()
    assert (torch.cat([first, second], 1) - wanted).norm() < 0.05 * wanted.norm()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(whole.sum(), list(layer.parameters())))


def test_samples_need_not_activate_equally_many_tokens():
    x = tokens(4, 50, 6)
    layer = balanced(layer_of(window=4), x)
    counts = activated(layer, x).sum(1)
    assert len(set(counts.tolist())) > 1
    assert_close(layer(x), torch.cat([layer(one) for one in x.split(1)]), rtol=1e-12, atol=1e-12)


def test_the_average_is_accurate_over_long_sequences():
    exact = DampedEMA(2, size=16, causal=True, dtype=torch.float64)
    with torch.no_grad():
        exact.delta -= 4  # decays of about 0.99
    rounded = DampedEMA(2, size=16, causal=True)
    rounded.load_state_dict(exact.state_dict())
    x = tokens(1, 20_000, 2)
    for state in (None, "some"):
        given = [None if state is None else ema.init_state(1) + 1 for ema in (exact, rounded)]
        (wanted, _), (found, _) = exact(x, given[0]), rounded(x.float(), given[1])
        assert_close(found.double(), wanted, rtol=0, atol=1e-4 * float(wanted.detach().abs().max()))
    assert_close(exact(x[:, :300])[0], averaged(exact, x[:, :300]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_an_average_that_keeps_nothing_or_everything_stays_finite(logit):
    ema = DampedEMA(2, size=4, causal=True)
    with torch.no_grad():
        ema.delta.fill_(logit)
        ema.alpha.fill_(logit)
    out, _ = ema(tokens(1, 50, 2, dtype=torch.float32))
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), list(ema.parameters())))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"window": 0}, "window 0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"normalizer": "sigmoid"}, "sigmoid"),
        ({"position": "alibi"}, "alibi"),
        ({"position": "rotary", "head_dim": 5}, "head_dim 5"),
        ({"position": "local", "max_positions": 9}, "max_positions 9"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_what_it_cannot_be_built_with_is_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        SparseModularActivation(8, **arguments)
