"""TCNCA against its equations written out, Mega's gated attention and the convolution network of Bai et al."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn import TCNChunkedAttention
from regard.nn.linear.tcnca import TemporalConvolution
from regard.ops.masks import Padding
from regard.testing.checks.memory import peak_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "tcnca.safetensors"
SMALL = TemporalConvolution(3, 2, 2, 2)


def layer_of(dim: int = 8, **options) -> TCNChunkedAttention:
    torch.manual_seed(0)
    layer = TCNChunkedAttention(dim, dtype=torch.float64, **{"tcn": SMALL, "chunk_size": 4, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return layer


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def network_by_matrices(layer: TCNChunkedAttention, x: Tensor) -> Tensor:
    """Every convolution as a matrix per channel."""
    length, sizes = x.shape[1], layer.tcn
    convolutions = iter(layer.convolutions)
    distance = torch.arange(length) - torch.arange(length)[:, None]
    for block in range(sizes.depth):
        inner = x
        for _ in range(sizes.convolutions):
            convolution = next(convolutions)
            matrix = x.new_zeros(x.shape[2], length, length)
            for tap in range(sizes.kernel_size):
                reach = (sizes.kernel_size - 1) * sizes.dilation**block
                offset = tap * sizes.dilation**block - (reach if layer.causal else reach // 2)
                matrix = matrix + convolution.weight[:, 0, tap, None, None] * (distance == offset)
            inner = F.relu(torch.einsum("dij,bjd->bid", matrix, inner) + convolution.bias)
        x = F.relu(x + inner)
    return x


def by_definition(layer: TCNChunkedAttention, x: Tensor) -> Tensor:
    """The equations of the docstring, with the whole map."""
    length, size = x.shape[1], layer.chunk_size
    moved = network_by_matrices(layer, x)
    shared = F.silu(layer.shared(moved))
    query, key = shared * layer.gain[0] + layer.shift[0], shared * layer.gain[1] + layer.shift[1]
    value = F.silu(layer.value(x))
    place = torch.arange(length)
    allowed = place[:, None] // size == place // size
    if layer.causal:
        allowed = allowed.tril()
    if layer.position == "relative":
        bias = layer.relative[(place - place[:, None]).clamp(1 - size, size - 1) + size - 1]
    else:
        rate = 10000.0 ** (-torch.arange(layer.head_dim // 2, dtype=x.dtype) / (layer.head_dim // 2))
        turn = torch.polar(torch.ones(length, len(rate), dtype=x.dtype), place[:, None] * rate)
        alpha, beta = (turn * torch.complex(*one.chunk(2)) for one in layer.relative)
        bias = (alpha @ beta.mH).real
    scores = query @ key.mT
    if layer.normalizer == "softmax":
        weights = (scores / layer.head_dim**0.5 + bias).masked_fill(~allowed, -torch.inf).softmax(-1)
    else:
        scores = scores / allowed.sum(-1, keepdim=True) + bias
        weights = torch.special.ndtr((scores - 0.5**0.5) * (4 * torch.pi) ** 0.5) * allowed
    reset, update = F.silu(layer.reset(moved)), torch.sigmoid(layer.update(moved))
    hidden = F.silu(layer.hidden(moved) + layer.output(reset * (weights @ value)))
    return update * hidden + (1 - update) * x


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalizer", ["softmax", "laplace"])
@pytest.mark.parametrize("position", ["relative", "rotary"])
@pytest.mark.parametrize("length", [1, 3, 22])
def test_the_layer_is_its_equations(causal, normalizer, position, length):
    options = {"chunk_size": 5, "head_dim": 6, "value_dim": 7, "tcn": TemporalConvolution(4, 3, 2, 2)}
    layer = layer_of(causal=causal, normalizer=normalizer, position=position, **options)
    x = draw(2, length, 8).requires_grad_()
    found, wanted, leaves = layer(x), by_definition(layer, x), [x, *layer.parameters()]
    assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    gradients = [torch.autograd.grad(out.sin().sum(), leaves, materialize_grads=True) for out in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("normalizer", "position", "case"),
    [
        ("softmax", "simple", "causal"),
        ("softmax", "rotary", "both"),
        ("laplace", "simple", "both"),
        ("laplace", "rotary", "causal"),
    ],
)
def test_gates_and_attention_are_those_of_mega(monkeypatch, normalizer, position, case):
    """The network is replaced by what replaced the moving average there: the mean with the token before."""
    prefix = f"{normalizer}.{position}.{case}."
    golden = {name[len(prefix) :]: value for name, value in load_file(GOLDEN).items() if name.startswith(prefix)}
    options = {"head_dim": 4, "value_dim": 5, "normalizer": normalizer, "causal": case == "causal"}
    layer = layer_of(6, position="relative" if position == "simple" else position, **options)
    monkeypatch.setattr(layer, "convolve", lambda x, real: ((x + F.pad(x, (0, 0, 1, 0))[:, :-1]) / 2, ()))

    def ours(kind: str) -> dict[str, Tensor]:
        theirs = {name[len(kind) + 1 :]: value for name, value in golden.items() if name.startswith(f"{kind}.")}
        named = {"value.weight": theirs["v_proj.weight"], "value.bias": theirs["v_proj.bias"]}
        for part in ("weight", "bias"):
            gates = zip(
                ("update", "shared", "reset", "hidden"), theirs[f"mx_proj.{part}"].split([6, 4, 5, 6]), strict=True
            )
            named |= {f"{name}.{part}": one for name, one in gates}
        named |= {"output.weight": theirs["h_proj.weight"], "gain": theirs["gamma"], "shift": theirs["beta"]}
        rotary = [theirs[f"rel_pos_bias.{name}"] for name in ("alpha", "beta") if position == "rotary"]
        return named | {"relative": torch.cat(rotary) if rotary else theirs["rel_pos_bias.rel_pos_bias"]}

    weights, gradients = ours("weight"), ours("grad")
    layer.load_state_dict({**layer.state_dict(), **weights})
    x = golden["x"].requires_grad_()
    out = layer(x)
    # The release rounds Laplace's constants to six digits.
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if normalizer == "laplace" else {"rtol": 1e-11, "atol": 1e-11}
    assert_close(out, golden["out"], **tolerance)
    own = dict(layer.named_parameters())
    found = torch.autograd.grad(out, [x, *(own[name] for name in gradients)], golden["seed"])
    for one, wanted in zip(found, [golden["grad.x"], *gradients.values()], strict=True):
        assert_close(one, wanted, **tolerance)


def test_the_network_is_that_of_bai_with_channels_apart():
    golden = load_file(GOLDEN)
    layer = layer_of(4, tcn=TemporalConvolution(3, 2, 3, 2), causal=True)
    with torch.no_grad():
        for index, convolution in enumerate(layer.convolutions):
            name = f"tcn.network.{index // 2}.conv{index % 2 + 1}"
            convolution.weight.copy_(golden[f"{name}.taps"].unsqueeze(1))
            convolution.bias.copy_(golden[f"{name}.bias"])
    assert_close(layer.convolve(golden["tcn.x"])[0], golden["tcn.out"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tcn", [SMALL, TemporalConvolution(2, 3, 3, 2), TemporalConvolution(5, 4, 2, 1)])
def test_influence_ends_with_the_receptive_field_and_the_chunk(tcn):
    """The claim: what is nearer than R + c − 1 can have influence on a chunk's last token, and nothing else has."""
    chunk = 4
    assert tcn.receptive_field == 1 + tcn.convolutions * (tcn.kernel_size - 1) * (
        (tcn.dilation**tcn.depth - 1) // (tcn.dilation - 1)
    )
    reach = tcn.receptive_field + chunk - 2
    length = -(-(reach + 9) // chunk) * chunk
    layer = layer_of(32, chunk_size=chunk, tcn=tcn, causal=True)
    with torch.no_grad():
        for convolution in layer.convolutions:
            convolution.weight.abs_()
            convolution.bias.abs_()
    x = draw(1, length, 32).abs().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[0, -1].sum(), x)
    influence = gradient[0].abs().amax(-1)
    assert (influence[: length - 1 - reach] == 0).all()
    assert (influence[length - 1 - reach :] > 0).all()


def test_wide_dilation_sees_the_same_length_with_fewer_layers():
    """The paper's network is shallow where it is wide; 17 is the widest factor that leaves no gap here."""
    narrow, wide = TemporalConvolution(9, 2, 1, 2), TemporalConvolution(9, 17, 1, 2)
    depths = [one.covering(100_000).depth for one in (narrow, wide)]
    assert depths == [13, 5]
    assert narrow.covering(100_000).receptive_field >= 100_000 > narrow._replace(depth=12).receptive_field


def test_one_chunk_as_long_as_the_sequence_is_full_attention():
    few, many = layer_of(chunk_size=12), layer_of(chunk_size=50)
    many.load_state_dict(few.state_dict() | {"relative": F.pad(few.relative.detach(), (38, 38), value=7.0)})
    x = draw(2, 12, 8)
    assert_close(few(x), many(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalizer", ["softmax", "laplace"])
def test_padded_is_alone_where_the_network_looks_both_ways(normalizer):
    """Biases and ReLU would fill padding after the first layer, and the next would bring it back."""
    layer = layer_of(normalizer=normalizer, chunk_size=5)
    x = draw(3, 21, 8)
    out = layer(x, mask=Padding(torch.tensor([21, 13, 2])))
    for sample, length in enumerate((21, 13, 2)):
        assert_close(out[sample, :length], layer(x[sample : sample + 1, :length])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalizer", ["softmax", "laplace"])
def test_logits_of_ten_thousand_either_way_are_finite(normalizer):
    layer = layer_of(normalizer=normalizer, causal=True)
    with torch.no_grad():
        layer.gain.mul_(1e3)
        layer.shift.mul_(1e3)
    x = draw(2, 11, 8).requires_grad_()
    out = layer(x)
    assert out.isfinite().all()
    assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()


def test_the_state_of_a_hundred_thousand_tokens_is_that_of_none():
    layer = layer_of(causal=True, chunk_size=7)
    state = layer.init_state(1)

    def elements() -> int:
        return sum(one.untyped_storage().nbytes() for one in (*state.recent, state.key, state.value))

    before = elements()
    with torch.no_grad():
        for _ in range(10):
            _, state = layer.step(draw(1, 10_000, 8), state)
    assert elements() == before


def test_peak_memory_is_far_below_one_map():
    layer, x = TCNChunkedAttention(16, chunk_size=32), torch.randn(1, 4096, 16)
    assert peak_bytes(lambda: layer(x).sum().backward()) < 4096**2 * 4 / 2


def test_weights_start_as_those_of_mega():
    layer = TCNChunkedAttention(64)
    for weight in (layer.value.weight, layer.update.weight, layer.output.weight, layer.gain, layer.relative):
        assert weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert not any(bias.any() for bias in (layer.shift, layer.reset.bias, layer.hidden.bias))
    assert (layer.head_dim, layer.value_dim) == (16, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size 0; give a positive number"),
        ({"tcn": TemporalConvolution(depth=0)}, "depth 0 of tcn; give a positive number"),
        ({"dropout": 1.0}, "dropout 1.0; give a probability"),
        ({"normalizer": "laplacian"}, "normalizer 'laplacian' is not known; did you mean 'laplace'"),
        ({"position": "rotary", "head_dim": 3}, "head_dim 3 is odd with position='rotary'"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=f"TCNChunkedAttention: {message}"):
        TCNChunkedAttention(8, **options)
