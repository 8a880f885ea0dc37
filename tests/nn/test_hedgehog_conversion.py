"""Linear layers made of softmax ones have their queries, keys, values and output, whoever wrote the layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn.attention import Attention
from regard.nn.heads.gqa import GroupedQueryAttention
from regard.nn.heads.mhe import HeadEmbeddingAttention
from regard.nn.heads.multi_head import MultiHeadAttention
from regard.nn.linear.hedgehog import HedgehogAttention
from regard.nn.linear.hedgehog_conversion import Batch, distill, hedgehog_from, linearize
from regard.nn.scores.sigmoid_attention import SigmoidAttention
from regard.nn.sparse.window import WindowAttention
from regard.ops.masks import Padding

DIM, HEADS, WIDTH = 24, 4, 6


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def softmax_output(layer: HedgehogAttention, x: Tensor) -> Tensor:
    """What the linear layer would give if its map were that of softmax: the output of the layer it was made of."""
    weights, _, _ = layer.both_maps(x)
    return layer.combine(weights @ layer.attention_map(x)[1])


def eager(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """As the modules of `transformers` attend; (batch, length, heads * width)."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2).flatten(2)


def split(x: Tensor, width: int = WIDTH) -> Tensor:
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


class BertSelf(nn.Module):
    """Attributes of BertSelfAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.is_decoder = HEADS, WIDTH, False
        self.query, self.key, self.value = (nn.Linear(DIM, DIM, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return eager(split(self.query(x)), split(self.key(x)), split(self.value(x)), WIDTH**-0.5, self.is_decoder)


class BertOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(DIM, DIM, dtype=torch.float64)
        self.LayerNorm = nn.LayerNorm(DIM, dtype=torch.float64)


class Bert(nn.Module):
    """Attributes of BertAttention; gives what goes into the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.self = BertSelf()
        self.output = BertOutput()

    def forward(self, x: Tensor) -> Tensor:
        return self.output.dense(self.self(x))


class Conv1D(nn.Module):
    """That of `transformers`: the weight is (inputs, outputs)."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs, dtype=torch.float64) / 4)
        self.bias = nn.Parameter(torch.randn(outputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Gpt2(nn.Module):
    """Attributes of GPT2Attention."""

    def __init__(self, by_layer: bool = False) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim, self.layer_idx = DIM, HEADS, WIDTH, 2
        self.scale_attn_weights, self.scale_attn_by_inverse_layer_idx = True, by_layer
        self.is_cross_attention = False
        self.c_attn, self.c_proj = Conv1D(3 * DIM, DIM), Conv1D(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (split(part) for part in self.c_attn(x).split(DIM, dim=2))
        scale = WIDTH**-0.5 / (self.layer_idx + 1 if self.scale_attn_by_inverse_layer_idx else 1)
        return self.c_proj(eager(query, key, value, scale, True))


class Llama(nn.Module):
    """Attributes of LlamaAttention, biases as in Qwen2."""

    def __init__(self, scaling: float = WIDTH**-0.5, bias: bool = False, **config: object) -> None:
        super().__init__()
        config = config or {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
        self.config = SimpleNamespace(num_attention_heads=HEADS, **config)
        self.head_dim, self.is_causal, self.scaling = WIDTH, True, scaling
        linear = partial(nn.Linear, dtype=torch.float64)
        self.q_proj = linear(DIM, DIM, bias=bias)
        self.k_proj, self.v_proj = linear(DIM, 2 * WIDTH, bias=bias), linear(DIM, 2 * WIDTH, bias=bias)
        self.o_proj = linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * 500.0 ** (-torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
        angles = torch.cat([angles, angles], -1)

        def turned(part: Tensor) -> Tensor:
            first, second = part.chunk(2, -1)
            return part * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

        query, key = turned(split(self.q_proj(x))), turned(split(self.k_proj(x)))
        return self.o_proj(eager(query, key, split(self.v_proj(x)), self.scaling, True))


class Clip(nn.Module):
    """Attributes of CLIPAttention and OPTAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=DIM)
        self.num_heads, self.head_dim, self.scale, self.is_causal = HEADS, WIDTH, WIDTH**-0.5, False
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(DIM, DIM, dtype=torch.float64) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = (split(part(x)) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(eager(*parts, self.scale, False))


@pytest.mark.parametrize(
    "host",
    [
        Bert,
        BertSelf,
        Gpt2,
        partial(Gpt2, by_layer=True),
        Llama,
        partial(Llama, scaling=0.1, bias=True),
        partial(Llama, rope_theta=500.0, rope_scaling=None),
        Clip,
    ],
)
def test_converted_hosts_have_the_softmax_layer_inside(host: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    layer, x = host(), tokens(2, 9, DIM)
    assert_close(softmax_output(hedgehog_from(layer), x), layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "layer",
    [
        MultiHeadAttention(DIM, heads=4, bias=True, dtype=torch.float64),
        MultiHeadAttention(DIM, heads=4, causal=True, position="rotary", head_dim=8, dtype=torch.float64),
        GroupedQueryAttention(DIM, heads=4, kv_heads=2, causal=True, dtype=torch.float64),
    ],
)
def test_converted_layers_of_ours_have_the_softmax_layer_inside(layer: Attention) -> None:
    x = tokens(2, 9, DIM)
    assert_close(softmax_output(hedgehog_from(layer.eval()), x), layer(x), rtol=1e-10, atol=1e-10)


def test_conversion_copies() -> None:
    layer = MultiHeadAttention(DIM, heads=4, dtype=torch.float64).eval()
    linear = hedgehog_from(layer, feature_map="softmax")
    assert not linear.training
    assert linear.query_map.kind == "softmax"
    with torch.no_grad():
        linear.query.weight.zero_()
    assert layer.query.weight.abs().min() > 0


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (MultiHeadAttention(8, heads=2, position="alibi"), "position 'alibi'"),
        (MultiHeadAttention(8, heads=2, context_dim=4), "context_dim 4"),
        (SigmoidAttention(8, heads=2), "normalizes by"),
        (WindowAttention(8, heads=2, window=2), "WindowAttention has"),
        (HeadEmbeddingAttention(8, heads=2), "HeadEmbeddingAttention has"),
        (HedgehogAttention(8, heads=2), "HedgehogAttention has"),
        (nn.Linear(8, 8), "whether it is causal"),
    ],
)
def test_what_is_not_plain_softmax_attention_is_refused(layer: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=f"hedgehog_from: .*{message}"):
        hedgehog_from(layer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 8}, "sliding_window"),
        ({"q_norm": nn.Identity()}, "q_norm"),
        ({"config": SimpleNamespace(rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0})}, "'linear'"),
        ({"config": SimpleNamespace(rope_theta=1e4, partial_rotary_factor=0.5)}, "turning 0.5"),
        ({"is_causal": None}, "whether it is causal"),
    ],
)
def test_hosts_that_linear_attention_cannot_follow_are_refused(change: dict[str, object], message: str) -> None:
    layer = Llama()
    for name, value in change.items():
        setattr(layer, name, value)
    with pytest.raises(ValueError, match=f"hedgehog_from: .*{message}"):
        hedgehog_from(layer)


def test_causal_can_be_said_for_a_host_that_does_not() -> None:
    layer = BertSelf()
    del layer.is_decoder
    with pytest.raises(ValueError, match="pass causal=True or False"):
        hedgehog_from(layer)
    assert hedgehog_from(layer, causal=True).causal


def test_distillation_fits_the_maps_and_nothing_else() -> None:
    torch.manual_seed(0)
    layer = hedgehog_from(MultiHeadAttention(DIM, heads=4, causal=True, position="rotary", dtype=torch.float64))
    kept = {name: value.clone() for name, value in layer.state_dict().items() if "_map" not in name}
    x, told = tokens(4, 12, DIM), []
    batches = [x, Batch(x.flip(0), Padding(torch.tensor([12, 5, 3, 9])), torch.arange(1, 13))]
    report = distill(layer, batches, steps=30, progress=lambda step, loss: told.append((step, loss)))
    assert (report.after.divergence < report.before.divergence).all()
    assert tuple(told) == tuple(enumerate(report.losses))
    assert len(told) == 30
    for name, value in kept.items():
        assert_close(layer.state_dict()[name], value, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_distillation_takes_another_optimizer() -> None:
    layer = hedgehog_from(MultiHeadAttention(DIM, heads=4, dtype=torch.float64))
    before = layer.query_map.weight.clone()
    distill(layer, [tokens(1, 5, DIM)], steps=2, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    assert_close(layer.query_map.weight, before, rtol=0, atol=0)


class Classifier(nn.Module):
    """Two softmax layers, one of them with a mask, and a windowed one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MultiHeadAttention(DIM, heads=4), MultiHeadAttention(DIM, heads=2)])
        self.window = WindowAttention(DIM, heads=2, window=2)
        self.head = nn.Linear(DIM, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layers[0](x, mask=Padding(torch.full((x.shape[0],), 7)))
        x = x + self.layers[1](x)
        return self.head((x + self.window(x)).mean(1))


def test_linearized_models_give_nearly_what_they_gave_and_learn() -> None:
    torch.manual_seed(0)
    model, x = Classifier(), tokens(8, 10, DIM).float()
    expected, window = model(x).detach(), model.window
    reports = linearize(model, [x[:4], x[4:]], fit=partial(distill, steps=0))
    before = F.mse_loss(model(x), expected)
    assert set(reports) == {"layers.0", "layers.1"}
    assert model.window is window
    assert model.training
    for layer in model.layers:
        assert isinstance(layer, HedgehogAttention)
        assert not layer._forward_pre_hooks

    torch.manual_seed(0)
    model = Classifier()
    reports = linearize(model, [x[:4], x[4:]], fit=partial(distill, steps=60), feature_map="softmax")
    assert all((report.after.divergence < report.before.divergence).all() for report in reports.values())
    assert F.mse_loss(model(x), expected) < before
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_linearize_needs_a_model_around_a_softmax_layer() -> None:
    with pytest.raises(ValueError, match="no plain softmax layer"):
        linearize(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match="use hedgehog_from"):
        linearize(MultiHeadAttention(8), [])
