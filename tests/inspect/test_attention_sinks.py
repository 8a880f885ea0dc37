"""Attention sinks: the metric by hand, the paper's formula on eager maps, and the attention that has none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regard.inspect.attention_sinks import AttentionSinks, attention_sinks
from regard.inspect.sink_bias import normalized_by, sink_bias
from regard.ops.attention import attention
from regard.ops.normalizers import Sigmoid
from regard.sites import AttentionCall, Site, attach
from regard.sites.call import product, softmax
from tests.inspect.pretrained_bert import load, sentences
from tests.sites.families import FAMILIES

SITE = Site("plain", "plain", 0, 1, "self", 2, 2, 4, False, "plain")


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[name].build().double().eval()


def with_equal_scores(name: str, projection: str) -> nn.Module:
    model = tiny(name)
    for part, weight in model.named_parameters():
        if projection in part:
            nn.init.zeros_(weight)
    return model


def ids(length: int, batch: int = 1) -> Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(2))


def call_of(query: Tensor, key: Tensor, value: Tensor) -> AttentionCall:
    def scores(rows: slice, heads: Any) -> Tensor:
        return product(query, key, query.shape[-1] ** -0.5, rows, heads)

    def attend(bias: Tensor | None) -> Tensor:
        return softmax(scores(slice(None), None)) @ value

    return AttentionCall(SITE, query, key, value, query.shape[2], scores, lambda x, heads: softmax(x), attend, 0, 0)


@pytest.fixture
def tensors() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    query, key, value = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64, generator=random)
    return query, key, value


def test_uniform_causal_attention_receives_harmonic_sums():
    found = attention_sinks(with_equal_scores("Llama", "q_proj"), {"input_ids": ids(6)})
    by_hand = [sum(1 / i for i in range(k, 7)) / (7 - k) for k in range(1, 7)]
    for layer in found.layers:
        torch.testing.assert_close(layer.received[0, 3].tolist(), by_hand, rtol=1e-12, atol=0)


def test_metric_counts_the_heads_over_the_threshold():
    # The first of six tokens receives 2.45 / 6 > 0.3, the second 1.45 / 5 < 0.3.
    found = attention_sinks(with_equal_scores("Llama", "q_proj"), {"input_ids": ids(6)})
    assert (found.metric(0), found.metric(1)) == (1.0, 0.0)
    assert found.layers[0].by_head.tolist() == [1.0] * 4


def test_every_token_receives_as_much_from_an_encoder_without_preference():
    found = attention_sinks(with_equal_scores("BERT", "query"), {"input_ids": ids(5)})
    torch.testing.assert_close(found.layers[1].received, torch.full((1, 4, 5), 0.2).double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma3"])
def test_metric_of_decoders_is_the_papers_on_eager_maps(name: str):
    model = tiny(name)
    found = attention_sinks(model, {"input_ids": ids(6, 3)}, threshold=0.25)
    model.set_attn_implementation("eager")
    maps = torch.stack(model(ids(6, 3), output_attentions=True).attentions, 1)
    received = (maps / torch.arange(6, 0, -1)).sum(-2)
    torch.testing.assert_close(torch.stack([layer.received for layer in found.layers], 1), received)
    assert found.metric(2) == pytest.approx((received > 0.25).double().mean((0, 1, 2))[2].item())


@pytest.mark.parametrize("name", ["Llama", "BERT"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_is_left_out(name: str, left: bool):
    model, alone = tiny(name), ids(5)
    padding = torch.zeros(1, 3, dtype=torch.long)
    padded = torch.cat([padding, alone] if left else [alone, padding], 1)
    data = {"input_ids": padded, "attention_mask": (padded > 0).long()}
    if left:
        data["position_ids"] = (data["attention_mask"].cumsum(1) - 1).clamp(min=0)
    short, long = attention_sinks(model, {"input_ids": alone}).layers, attention_sinks(model, data).layers
    for one, other in zip(short, long, strict=True):
        for of in ("received", "key_norm", "value_norm", "hidden_norm"):
            torch.testing.assert_close(getattr(other, of)[..., :5], getattr(one, of))
        assert other.received[..., 5:].isnan().all()
        assert other.positions[0].tolist() == [*range(3 if left else 0, 8 if left else 5), -1, -1, -1]


def test_norms_are_those_of_hidden_states_and_values():
    model = tiny("Llama")
    layer = attention_sinks(model, {"input_ids": ids(4)}).layers[0]
    hidden = model.model.embed_tokens(ids(4))
    block = model.model.layers[0]
    value = block.self_attn.v_proj(block.input_layernorm(hidden)).unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(layer.hidden_norm, hidden.norm(dim=-1))
    torch.testing.assert_close(layer.value_norm, value.norm(dim=-1))


def test_peak_is_the_mean_norm_of_sinks_by_that_of_others():
    found = attention_sinks(with_equal_scores("Llama", "q_proj"), {"input_ids": ids(6)}).layers[0]
    norms = torch.tensor([[6.0, 1.0, 2.0, 3.0, 1.0, 1.0]])
    assert replace(found, hidden_norm=norms).peak("hidden") == pytest.approx(6 / 1.6)


def test_key_bias_is_a_further_key_of_no_value(tensors: tuple[Tensor, Tensor, Tensor]):
    query, key, value = tensors
    bias = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    further = torch.cat([bias[None, :, None].expand(2, -1, -1, -1), key], 2)
    weights = (query @ further.mT / 2).softmax(-1)
    call = sink_bias(bias)(call_of(query, key, value))
    torch.testing.assert_close(call.weights(slice(None)), weights[..., 1:])
    torch.testing.assert_close(call.output(), weights[..., 1:] @ value)


def test_key_and_value_bias_is_a_further_token(tensors: tuple[Tensor, Tensor, Tensor]):
    query, key, value = tensors
    biases = torch.randn(2, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    further = [
        torch.cat([bias[None, :, None].expand(2, -1, -1, -1), x], 2)
        for bias, x in zip(biases, (key, value), strict=True)
    ]
    torch.testing.assert_close(sink_bias(*biases)(call_of(query, key, value)).output(), attention(query, *further))


def test_value_bias_is_added_to_every_output(tensors: tuple[Tensor, Tensor, Tensor]):
    value = torch.arange(4.0, dtype=torch.float64)[None]
    changed = sink_bias(value=value)(call_of(*tensors))
    torch.testing.assert_close(changed.output(), attention(*tensors) + value)


def test_a_stronger_bias_takes_the_mass_of_the_sink():
    # Logits ln 16 for the first of 5 keys and 0 for the others: 16 / 20. A bias of twice the logit leaves 16 / 276.
    query = torch.ones(1, 2, 5, 4, dtype=torch.float64)
    key = torch.zeros_like(query)
    key[:, :, 0] = torch.tensor(16.0).double().log() / 2
    plain = call_of(query, key, torch.ones_like(query))
    relieved = sink_bias(2 * key[0, :, 0])(plain)
    assert plain.weights(slice(None))[..., 0].unique().tolist() == pytest.approx([0.8])
    assert relieved.weights(slice(None))[..., 0].flatten().tolist() == pytest.approx([16 / 276] * 10)
    assert 1 - relieved.weights(slice(None)).sum(-1).flatten()[0].item() == pytest.approx(256 / 276)


def test_sigmoid_is_that_of_the_attention_operator(tensors: tuple[Tensor, Tensor, Tensor]):
    changed = normalized_by(Sigmoid(bias=0.0))(call_of(*tensors))
    torch.testing.assert_close(changed.output(), attention(*tensors, normalizer=Sigmoid(bias=0.0)))


def test_a_key_that_is_a_sink_to_softmax_is_none_to_sigmoid():
    # A score of 20 among zeros: softmax gives it all, sigmoid at most a share of 2 / (n + 1).
    key = torch.zeros(1, 2, 8, 4, dtype=torch.float64)
    key[:, :, 0] = 10.0
    plain = call_of(torch.ones_like(key), key, torch.ones_like(key))
    weights = normalized_by(Sigmoid(bias=0.0))(plain).weights(slice(None))
    assert plain.weights(slice(None))[..., 0].min() > 0.99
    assert (weights[..., 0] / weights.sum(-1)).max().item() == pytest.approx(2 / 9)


def test_gradients_reach_the_bias():
    model, key = tiny("Llama"), torch.zeros(4, 8, dtype=torch.float64, requires_grad=True)
    with attach(model, sink_bias(key)):
        model(ids(4))[0].square().sum().backward()
    assert key.grad is not None
    assert key.grad.abs().amin(1).gt(0).all()


def test_shares_of_rows_are_measured_where_weights_are_not_normalised():
    model = with_equal_scores("BERT", "query")
    with attach(model, normalized_by(Sigmoid(bias=0.0))):
        plain = attention_sinks(model, {"input_ids": ids(5)})
        shares = attention_sinks(model, {"input_ids": ids(5)}, proxy=True)
    torch.testing.assert_close(plain.layers[0].received, torch.full((1, 4, 5), 0.5).double())
    torch.testing.assert_close(shares.layers[0].received, torch.full((1, 4, 5), 0.2).double(), rtol=1e-6, atol=0)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"threshold 1\.5; give a share"):
        attention_sinks(tiny("BERT"), {"input_ids": ids(5)}, threshold=1.5)
    with pytest.raises(ValueError, match="neither key nor value"):
        sink_bias()
    with pytest.raises(ValueError, match="position 9 of 5; give 0 to 4"):
        attention_sinks(tiny("BERT"), {"input_ids": ids(5)}).metric(9)


@pytest.fixture(scope="module")
def bert_sinks() -> AttentionSinks:
    model, tokenizer = load()
    data = tokenizer(sentences()[:8], padding=True, return_tensors="pt")
    labels = [tokenizer.convert_ids_to_tokens(row) for row in data["input_ids"].tolist()]
    return attention_sinks(model, dict(data), labels=labels)


def test_pretrained_bert_has_its_sinks_on_the_separator_tokens(bert_sinks: AttentionSinks):
    found = bert_sinks.tokens()
    separators = found.get("[CLS]", 0.0) + found.get("[SEP]", 0.0)
    assert separators > 0.6
    assert separators > 10 * max(share for label, share in found.items() if label not in ("[CLS]", "[SEP]"))


def test_values_of_the_sinks_of_pretrained_bert_are_small(bert_sinks: AttentionSinks):
    assert all(layer.peak("value") < 0.25 for layer in bert_sinks.layers[1:4])


def test_a_copy_of_the_sinks_key_takes_its_mass_in_pretrained_bert(bert_sinks: AttentionSinks):
    model, tokenizer = load()
    data = dict(tokenizer(sentences()[:1], return_tensors="pt"))

    def copied(call: AttentionCall) -> AttentionCall:
        assert call.key is not None
        return sink_bias(2 * call.key[0, :, 0])(call)

    before = attention_sinks(model, data).metric()
    with attach(model, copied):
        after = attention_sinks(model, data).metric()
    assert before > 0.6
    assert after < 0.1


def test_result_prints_and_plots(bert_sinks: AttentionSinks):
    assert bert_sinks.table().row_count == 6
    assert "[CLS]" in list(bert_sinks.table().columns[3].cells)
    assert len(bert_sinks.figure().data) == 4
