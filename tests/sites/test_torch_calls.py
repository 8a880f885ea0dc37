"""Hosts that call torch's attention, or regard's, themselves: every way of calling, on modules of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from regard import sites
from regard.catalogue import create
from regard.ops.attention import attention
from regard.ops.masks import Causal, Padding
from regard.sites.call import AttentionCall, RowChange, mix
from tests.sites.families import FAMILIES, IDS, SMALL, text
from tests.sites.properties import Running, snapshot

HEADS, DIM = 4, 32


class Attention(nn.Module):
    """Projections around `mixed`, a way of attending (B, H, N, D)."""

    def __init__(self, mixed: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.mixed = HEADS, DIM // HEADS, mixed
        self.project = nn.Linear(DIM, 3 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.mix(*heads).transpose(1, 2).flatten(2)


class Fused(Attention):
    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.mixed(query, key, value, F.scaled_dot_product_attention)


class Written(Attention):
    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        logits = query @ key.mT * query.shape[-1] ** -0.5
        return self.mixed(logits, value, F.softmax, torch.matmul)


def shared(query: Tensor, key: Tensor, value: Tensor, sdpa: Any) -> Tensor:
    return sdpa(query, key[:, :2], value[:, :2], enable_gqa=True)


def masked(query: Tensor, key: Tensor, value: Tensor, sdpa: Any) -> Tensor:
    mask = torch.arange(key.shape[2]) < torch.tensor([[6], [9]])
    return sdpa(query, key, value, mask[:, None, None])


def added(query: Tensor, key: Tensor, value: Tensor, sdpa: Any) -> Tensor:
    return sdpa(query, key, value, attn_mask=torch.linspace(-1, 1, key.shape[2]).expand(9, 9), scale=0.3)


def merged(query: Tensor, key: Tensor, value: Tensor, sdpa: Any) -> Tensor:
    flat = (each.flatten(0, 1) for each in (query, key, value))
    return sdpa(*flat, is_causal=True).unflatten(0, (-1, HEADS))


def by_keyword(query: Tensor, key: Tensor, value: Tensor, sdpa: Any) -> Tensor:
    return sdpa(value=value, query=query, key=key)


FUSED = [shared, masked, added, merged, by_keyword]


def products(logits: Tensor, value: Tensor, softmax: Any, matmul: Any) -> Tensor:
    return matmul(F.dropout(softmax(logits, -1, dtype=torch.float64).type_as(value), 0.1, False), value)


def operators(logits: Tensor, value: Tensor, softmax: Any, matmul: Any) -> Tensor:
    return logits.softmax(dim=-1) @ value


def batched(logits: Tensor, value: Tensor, softmax: Any, matmul: Any) -> Tensor:
    weights = softmax(logits.flatten(0, 1), dim=-1)
    return torch.bmm(weights, value.flatten(0, 1)).unflatten(0, (-1, HEADS))


def flattened(logits: Tensor, value: Tensor, softmax: Any, matmul: Any) -> Tensor:
    weights = torch.softmax(logits, 3).view(-1, *logits.shape[2:])
    return torch.bmm(weights, value.flatten(0, 1)).unflatten(0, (-1, HEADS))


def einsum(logits: Tensor, value: Tensor, softmax: Any, matmul: Any) -> Tensor:
    return torch.einsum("bhij, b j h d -> bihd", softmax(logits, -1), value.transpose(1, 2)).transpose(1, 2)


def einsum_of_one_value_head(logits: Tensor, value: Tensor, softmax: Any, matmul: Any) -> Tensor:
    return torch.einsum("bhnm,bmd->bhnd", softmax(logits, -1), value[:, 0])


WRITTEN = [products, operators, batched, flattened, einsum, einsum_of_one_value_head]
WAYS = [pytest.param(Fused, each, id=each.__name__) for each in FUSED]
WAYS += [pytest.param(Written, each, id=each.__name__) for each in WRITTEN]


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize(("module", "way"), WAYS)
def test_every_way_of_calling_shows_its_weights_and_takes_a_bias(module: Any, way: Any, x: Tensor) -> None:
    model = nn.Sequential(module(way)).double()
    bias = torch.randn(2, HEADS, 1, 9, dtype=torch.float64)
    every = torch.ones(9, dtype=torch.bool)

    def read(call: AttentionCall) -> AttentionCall:
        assert torch.allclose(mix(call.weights(slice(0, 9)), call.value), call.attend(None), atol=1e-12)
        return call.add(bias)

    def written(call: AttentionCall) -> AttentionCall:
        return call.change_logits(RowChange(every, lambda values, rows, heads: values + bias))

    plain = model(x)
    with sites.attach(model) as attached:
        assert torch.equal(model(x), plain)
    assert attached.called == {"0"}
    with sites.attach(model, read):
        on_kernel = model(x)
    with sites.attach(model, written):
        assert torch.allclose(model(x), on_kernel, atol=1e-12)
    assert not torch.allclose(on_kernel, plain)


@pytest.mark.parametrize(("module", "way"), WAYS)
def test_a_query_whose_keys_are_all_masked_gets_zeros(module: Any, way: Any, x: Tensor) -> None:
    model = nn.Sequential(module(way)).double()
    bias = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    bias[..., 3, :] = -torch.inf
    with sites.attach(model, lambda call: call.add(bias)):
        out = model(x)
    assert torch.equal(out[:, 3], torch.zeros_like(out[:, 3]))
    assert out.isfinite().all()


def test_the_innermost_module_is_the_one_that_attends(x: Tensor) -> None:
    class OuterAttention(Fused):
        def __init__(self) -> None:
            super().__init__(by_keyword)
            self.inner = Fused(by_keyword)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.inner(x))

    seen: list[str] = []
    model = nn.Sequential(OuterAttention()).double()
    with sites.attach(model, lambda call: seen.append(call.site.name) or call):
        model(x)
    assert seen == ["0.inner", "0"]


def test_what_an_instrument_computes_is_not_intercepted(x: Tensor) -> None:
    calls: list[int] = []
    model = nn.Sequential(Fused(by_keyword)).double()

    def instrument(call: AttentionCall) -> AttentionCall:
        calls.append(1)
        F.scaled_dot_product_attention(call.query, call.key, call.value)
        torch.softmax(call.query @ call.key.mT, -1) @ call.value
        return call

    with sites.attach(model, instrument):
        model(x)
    assert len(calls) == 1


def test_a_forward_replaced_by_someone_else_is_put_back(x: Tensor) -> None:
    model = nn.Sequential(Fused(by_keyword)).double()
    own = model[0].forward
    replaced = model[0].forward = lambda x: own(x) * 2
    with sites.attach(model, lambda call: call.change_output(torch.zeros_like)):
        assert not model(x).any()
    assert vars(model[0])["forward"] is replaced


def test_attention_that_cannot_be_reached_is_listed_with_the_reason() -> None:
    class LinearAttention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ (x.mT @ x)

    model = nn.ModuleDict({"linear": LinearAttention(), "other": create("lightning", dim=8, heads=2)})
    assert {each.name: each.reason for each in sites.find(model).unreached} == {
        "linear": "its forward calls neither scaled_dot_product_attention nor a softmax and a product",
        "other": "it does not attend through regard.ops.attention",
    }


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_multi_head_attention_is_opened(need_weights: bool, train: bool, x: Tensor) -> None:
    model = nn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=torch.float64).train(train)
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    given = {"query": x, "key": x, "value": x, "attn_mask": mask, "need_weights": need_weights}
    plain, host_weights = model(**given, average_attn_weights=False)
    read: list[Tensor] = []
    with sites.attach(model, lambda call: read.append(call.weights(slice(0, 9))) or call):
        assert torch.allclose(model(**given)[0], plain, atol=1e-12)
    assert not read[0].triu(1).any()
    if need_weights:
        assert torch.allclose(read[0], host_weights, atol=1e-12)


@pytest.mark.parametrize("name", ["GPTJ", "Bloom"])
def test_decoders_with_attention_of_their_own_generate_the_same(name: str) -> None:
    settings = {**SMALL, **IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings)).eval()
    plain = model.generate(**text(), max_new_tokens=4, do_sample=False)
    starts: list[Any] = []
    with sites.attach(model, lambda call: starts.append(call.query_start) or call) as attached:
        assert torch.equal(model.generate(**text(), max_new_tokens=4, do_sample=False), plain)
    assert starts == [0, 0, 12, 12, 13, 13, 14, 14]
    assert len(attached.called) == 2


@pytest.mark.parametrize("family", ["UNet2DCondition", "timm Swin", "Swin"])
def test_unfused_implementations_are_reached_too(family: str) -> None:
    running = Running(FAMILIES[family])
    if family == "UNet2DCondition":
        from diffusers.models.attention_processor import AttnProcessor

        running.model.set_attn_processor(AttnProcessor())
    elif family == "timm Swin":
        for module in running.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    else:
        running.model.set_attn_implementation("eager")

    def compare(call: AttentionCall) -> AttentionCall:
        weights = call.weights(slice(0, call.queries))
        assert torch.allclose(mix(weights, call.value), call.attend(None), atol=1e-6)
        return call

    before = snapshot(running.model)
    assert torch.equal(running(compare), running.plain)
    assert snapshot(running.model) == before


MECHANISMS = {
    "multi_head": {"position": "alibi"},
    "gqa": {"kv_heads": 2, "position": "relative"},
    "sigmoid_attention": {},
    "window": {"window": 3},
    "nap": {},
    "additive_attention": {},
    "lssa": {},
}


@pytest.mark.parametrize("key", MECHANISMS)
def test_mechanisms_show_the_map_that_they_declare(key: str, x: Tensor) -> None:
    torch.manual_seed(0)
    model = create(key, dim=DIM, heads=HEADS, causal=True, dtype=torch.float64, **MECHANISMS[key]).eval()
    padding = Padding(torch.tensor([9, 6]))
    expected = model.attention_map(x, mask=padding)[0]
    read: list[Tensor] = []

    def note(call: AttentionCall) -> AttentionCall:
        two = call.weights(slice(2, 5))[:, [1, 3]]
        assert torch.allclose(call.weights(slice(2, 5), [1, 3]), two, atol=1e-12)
        read.append(torch.cat([call.weights(rows) for rows in call.tiles(4)], 2))
        return call

    plain = model(x, mask=padding)
    with sites.attach(model, note):
        assert torch.equal(model(x, mask=padding), plain)
    assert torch.allclose(read[0], expected, atol=1e-12)


@pytest.mark.parametrize("key", ["multi_head", "sigmoid_attention", "nap", "urpe"])
def test_a_masking_bias_is_a_mask_to_every_mechanism(key: str, x: Tensor) -> None:
    """A masked key does not count for a normalizer, nor in the log-sum-exp by which URPE joins two attentions."""
    model = create(key, dim=DIM, heads=HEADS, dtype=torch.float64).eval()
    bias = torch.zeros(1, 1, 1, 9, dtype=torch.float64)
    bias[..., 6:] = -torch.inf
    with sites.attach(model, lambda call: call.add(bias)):
        masked = model(x)
    assert torch.allclose(masked, model(x, mask=Padding(torch.tensor([6, 6]))), atol=1e-12)


def test_the_door_sees_a_mechanism_decode(x: Tensor) -> None:
    model = create("multi_head", dim=DIM, heads=HEADS, causal=True, dtype=torch.float64).eval()
    places: list[Any] = []
    with sites.attach(model, lambda call: places.append((call.query_start, call.queries, call.keys)) or call):
        state = model.init_state(2)
        for length in (4, 1):
            _, state = model.step(x[:, :length], state)
    assert places == [(0, 4, 4), (4, 1, 5)]


def test_attention_takes_part_in_torchs_override_protocol() -> None:
    seen: list[object] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    heads = torch.randn(1, 2, 5, 4)
    with Watch():
        out = attention(heads, heads, heads, mask=Causal())
    assert seen == [attention]
    assert torch.equal(out, attention(heads, heads, heads, mask=Causal()))


SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("Llama", "Flux", "regard Decoder")]


@pytest.mark.parametrize("family", ["timm ViT", *SLOW])
@pytest.mark.parametrize("order", ["compiled before", "compiled within"])
def test_compiled_models_are_reached(family: str, order: str) -> None:
    torch._dynamo.reset()
    running = Running(FAMILIES[family])
    compiled = torch.compile(running.model, backend="eager")

    def halve(call: AttentionCall) -> AttentionCall:
        return call.add(torch.arange(call.keys).expand(1, 1, 1, -1) / 4.0).change_output(lambda out: out / 2)

    expected = running(lambda call: halve(call))
    with torch.no_grad():
        if order == "compiled before":
            compiled(**running.inputs)
        with sites.attach(compiled, halve) as attached:
            out = running.family.output(compiled(**running.inputs))
        assert torch.allclose(out, expected, atol=1e-5)
        assert not torch.allclose(out, running.plain, atol=1e-4)
        assert attached.step == 0
        assert len(attached.called) == len(attached.sites)
        after = running.family.output(compiled(**running.inputs))
    assert torch.allclose(after, running.plain, atol=1e-6)
