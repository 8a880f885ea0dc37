"""Every engine is the reference, and the reference is the textbook."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Sizes, biases, masks, sizes
from torch import Tensor

from regard.ops import attention, attention_weights, attention_with_lse, explain
from regard.ops.biases import Alibi, Bias, RelativeBias
from regard.ops.engines import tile_loop
from regard.ops.masks import Causal, Dense, Padding, Segments, Window
from regard.ops.normalizers import Normalizer, Sigmoid
from regard.testing.checks.memory import peak_bytes

ENGINE_SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def outputs_and_gradients(backend: str, tensors, mask, bias, normalizer, dropout=0.0) -> list[Tensor]:
    """Output, log-sum-exp and the gradients of a loss over both."""
    torch.manual_seed(3)
    options = {"mask": mask, "bias": bias, "dropout": dropout, "backend": backend}
    if normalizer == "softmax" and backend != "fused":
        out, lse = attention_with_lse(*tensors, **options)
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
    else:
        out, lse = attention(*tensors, normalizer=normalizer, **options), torch.zeros(())
    loss = out.to(torch.float64).sin().sum() + lse.to(torch.float64).cos().sum() * (backend != "fused")
    leaves = [*tensors, *(bias.flatten()[1] if bias is not None else [])]
    return [out, lse, *torch.autograd.grad(loss, leaves)]


def assert_engine_is_reference(backend, dtype, size, mask, bias, normalizer, dropout, tolerance) -> None:
    tensors = size.tensors(dtype, seed=0)
    found = outputs_and_gradients(backend, tensors, mask, bias, normalizer, dropout)
    wanted = outputs_and_gradients("reference", tensors, mask, bias, normalizer, dropout)
    for ours, reference in zip(found, wanted, strict=True):
        scale = max(1.0, reference.abs().max().item()) if reference.numel() else 1.0
        assert (ours - reference).abs().max().item() <= tolerance * scale


@ENGINE_SETTINGS
@given(st.data(), st.sampled_from(["softmax", "sigmoid", "relu", "softplus_l1"]), st.sampled_from([0.0, 0.4]))
def test_tiled_equals_reference_in_float64(data, normalizer, dropout):
    size = data.draw(sizes())
    mask, bias = data.draw(masks(size)), data.draw(biases(size, torch.float64))
    assert_engine_is_reference("tiled", torch.float64, size, mask, bias, normalizer, dropout, 1e-10)


def doubled(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor


@ENGINE_SETTINGS
@given(st.data())
def test_tiled_in_float32_is_as_near_to_float64_as_the_reference_in_float32(data):
    """Not nearer to the reference than that is to the truth: the gradient of a slope is a sum that cancels."""
    size = data.draw(sizes())
    mask, bias = data.draw(masks(size)), data.draw(biases(size, torch.float32))
    tensors = size.tensors(torch.float32, seed=0)
    found, plain = (outputs_and_gradients(name, tensors, mask, bias, "softmax") for name in ("tiled", "reference"))
    if bias is not None:
        text, parameters = bias.flatten()
        bias = Bias.unflatten(text, [doubled(parameter) for parameter in parameters])
    exact = outputs_and_gradients("reference", [doubled(tensor) for tensor in tensors], mask, bias, "softmax")
    for ours, reference, wanted in zip(found, plain, exact, strict=True):
        if wanted.numel():
            scale = max(1.0, wanted.abs().max().item())
            allowed = max(1e-5 * scale, 4 * (reference - wanted).abs().max().item())
            assert (ours - wanted).abs().max().item() <= allowed


@ENGINE_SETTINGS
@given(st.data())
def test_fused_equals_reference_in_float64_and_float32(data):
    size = data.draw(sizes())
    mask = data.draw(masks(size))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        bias = data.draw(biases(size, dtype))
        leaves = [*size.tensors(dtype, seed=0), *(bias.flatten()[1] if bias is not None else [])]
        outs = [attention(*leaves[:3], mask=mask, bias=bias, backend=name) for name in ("fused", "reference")]
        found, wanted = ([out, *torch.autograd.grad(out.sin().sum(), leaves)] for out in outs)
        for ours, reference in zip(found, wanted, strict=True):
            assert (ours - reference).abs().max() <= tolerance * max(1.0, reference.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, Causal(), Causal() & Window(60), Padding(torch.tensor([0, 200]))], ids=repr)
def test_flex_equals_reference(mask):
    query, key, value = (tensor.detach() for tensor in Sizes(2, 4, 2, 200, 300, 16, 16).tensors(torch.float32, 0))
    found = attention(query, key, value, mask=mask, backend="flex")
    torch.testing.assert_close(
        found, attention(query, key, value, mask=mask, backend="reference"), rtol=1e-5, atol=1e-5
    )


def test_reference_is_the_textbook_formula():
    query, key, value = Sizes(2, 4, 2, 5, 7, 3, 6).tensors(torch.float64, 0)
    out, lse = attention_with_lse(query, key, value, mask=Causal(), scale=0.7, backend="reference")
    for batch, head, row in ((0, 0, 0), (1, 3, 4), (0, 2, 2)):
        seen = row + 3  # queries align with the end of the keys
        scores = 0.7 * key[batch, head // 2, :seen] @ query[batch, head, row]
        weights = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(out[batch, head, row], weights @ value[batch, head // 2, :seen])
        torch.testing.assert_close(lse[batch, head, row], scores.exp().sum().log())


def test_default_scale_is_inverse_root_of_head_dim():
    tensors = Sizes(1, 2, 2, 6, 6, 9, 4).tensors(torch.float64, 0)
    torch.testing.assert_close(attention(*tensors), attention(*tensors, scale=1 / 3))


@pytest.mark.parametrize("backend", ["reference", "tiled", "fused"])
def test_empty_rows_give_zeros_and_no_gradient(backend):
    tensors = Sizes(2, 2, 1, 150, 140, 4, 4).tensors(torch.float32, 0)
    mask = Causal() & Padding(torch.tensor([0, 140]))  # all of sample 0, and the first 10 queries of sample 1
    out = attention(*tensors, mask=mask, backend=backend)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert (out[0] == 0).all()
    assert (out[1, :, :10] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][0] == 0).all()
    assert (grads[2][0] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_lse_of_an_empty_row_is_minus_infinity(backend):
    tensors = Sizes(1, 1, 1, 3, 200, 4, 4).tensors(torch.float32, 0)
    _, lse = attention_with_lse(*tensors, mask=Padding(torch.tensor([0])), backend=backend)
    assert (lse == -torch.inf).all()
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "tiled", "fused"])
@pytest.mark.parametrize("magnitude", [1e4, -1e4])
def test_logits_of_1e4_stay_finite(backend, magnitude):
    query = torch.full((1, 1, 140, 4), 50.0, requires_grad=True)
    key = torch.full((1, 1, 140, 4), magnitude / 200, requires_grad=True)
    value = torch.randn(1, 1, 140, 4, requires_grad=True)
    out = attention(query, key, value, mask=Causal(), scale=1.0, backend=backend)
    grads = torch.autograd.grad(out.sum(), (query, key, value))
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(out[0, 0, -1], value[0, 0].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "relu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_keep_float32_statistics(normalizer, dtype):
    tensors = Sizes(1, 2, 1, 300, 300, 16, 16).tensors(dtype, 0)
    found = attention(*tensors, mask=Causal(), normalizer=normalizer, backend="tiled")
    exact = attention(*(t.double() for t in tensors), mask=Causal(), normalizer=normalizer, backend="reference")
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "softplus_l1"])
def test_gradcheck(backend, normalizer):
    query, key, value = Sizes(1, 4, 2, 5, 6, 3, 2).tensors(torch.float64, 0)
    table = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)

    def call(query, key, value, table):
        bias = RelativeBias(table, 3)
        return attention(query, key, value, mask=Causal(), bias=bias, normalizer=normalizer, backend=backend)

    assert torch.autograd.gradcheck(call, (query, key, value, table))


def test_relative_bias_on_a_grid_trains_through_tiled():
    size = Sizes(2, 2, 2, 15 * 14, 15 * 14, 4, 4)
    table = torch.randn(2, 49, dtype=torch.float64, requires_grad=True)
    bias = RelativeBias(table, (3, 3), (15, 14))
    assert_engine_is_reference("tiled", torch.float64, size, None, bias, "softmax", 0.0, 1e-10)


def test_dropout_drops_the_same_weights_whatever_the_tiles(monkeypatch):
    tensors = Sizes(2, 2, 1, 300, 300, 4, 4).tensors(torch.float64, 0)

    def run():
        torch.manual_seed(1)
        return attention(*tensors, mask=Causal(), dropout=0.5, backend="tiled")

    whole = run()
    monkeypatch.setattr(tile_loop, "WIDE_TILE", 32)
    torch.testing.assert_close(run(), whole)


def test_dropout_rate_and_seed():
    tensors = Sizes(1, 1, 1, 200, 200, 4, 4).tensors(torch.float32, 0)
    ones = torch.eye(200).view(1, 1, 200, 200)
    torch.manual_seed(0)
    first = attention(*tensors[:2], ones, dropout=0.25)
    torch.manual_seed(0)
    again = attention(*tensors[:2], ones, dropout=0.25)
    other = attention(*tensors[:2], ones, dropout=0.25)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # 40 000 Bernoulli draws: three standard deviations are 0.0065.
    assert abs((first == 0).float().mean().item() - 0.25) < 0.0065


def test_sigmoid_bias_defaults_to_minus_log_of_the_keys_in_sight():
    query, key, value = Sizes(1, 1, 1, 6, 6, 4, 4).tensors(torch.float64, 0)
    plain = attention(query, key, value, normalizer="sigmoid")
    torch.testing.assert_close(plain, attention(query, key, value, normalizer=Sigmoid(-math.log(6))))
    padded = attention(query, key, value, mask=Padding(torch.tensor([4])), normalizer="sigmoid")
    short = attention(query, key[:, :, :4], value[:, :, :4], normalizer="sigmoid")
    torch.testing.assert_close(padded, short)


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "relu", "softplus_l1"])
def test_weights_times_value_is_the_output(normalizer):
    query, key, value = Sizes(2, 4, 2, 9, 12, 4, 3).tensors(torch.float64, 0)
    weights = attention_weights(query, key, mask=Causal(), normalizer=normalizer)
    out = attention(query, key, value, mask=Causal(), normalizer=normalizer, backend="tiled")
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), out)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("normalizer", ["softmax", "relu"])
def test_opcheck(normalizer, dropout):
    from regard.ops.engines.tiled import tiled_attention

    query, key, value = Sizes(2, 4, 2, 9, 150, 4, 3).tensors(torch.float32, 0)
    mask_text, mask_tensors = (Causal() & Padding(torch.tensor([100, 150]))).flatten()
    bias_text, bias_tensors = Alibi(torch.rand(4, requires_grad=True)).flatten()
    seed = torch.tensor(5) if dropout else None
    normalizer = {"softmax": "Softmax()", "relu": "Relu()"}[normalizer]
    texts = (mask_text, bias_text, normalizer, 0.5, dropout)
    torch.library.opcheck(tiled_attention, (query, key, value, mask_tensors, bias_tensors, seed, *texts))


@pytest.mark.parametrize("value_dim", [4, 24])
def test_values_of_another_width_take_no_memory_of_all_pairs(value_dim):
    query, key = torch.randn(2, 1, 4, 2048, 8).requires_grad_()
    value = torch.randn(1, 4, 2048, value_dim, requires_grad=True)
    call = {"mask": Causal(), "backend": "fused"}
    torch.testing.assert_close(
        attention(query, key, value, **call), attention(query, key, value, mask=Causal(), backend="reference")
    )
    peak = peak_bytes(lambda: attention(query, key, value, **call).sum().backward())
    assert peak < 2048 * 2048 * 4


def test_second_derivative_of_tiled_is_refused_and_of_reference_right():
    tensors = Sizes(1, 1, 1, 4, 4, 2, 2).tensors(torch.float64, 0)
    out = attention(*tensors, backend="tiled")
    (grad,) = torch.autograd.grad(out.sin().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    assert torch.autograd.gradgradcheck(lambda *t: attention(*t, mask=Causal(), backend="reference"), tensors)


@pytest.mark.parametrize("mask", [None, Causal() & Window(100), "dense", "segments"], ids=repr)
def test_compiles_into_one_node(mask):
    size = Sizes(2, 2, 1, 300, 300, 4, 4)
    if mask == "dense":
        mask = Dense(torch.rand(300, 300) < 0.5)
    elif mask == "segments":
        mask = Segments.from_lengths([100, 200]) & Causal()
    tensors = size.tensors(torch.float32, 0)

    def call(query, key, value):
        return attention(query, key, value, mask=mask, backend="tiled").sin()

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), call(*tensors))
    found = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    wanted = torch.autograd.grad(call(*tensors).sum(), tensors)
    torch.testing.assert_close(found, wanted)
    graph = torch.export.export(Exported(mask), tuple(t.detach() for t in tensors)).graph
    assert sum("tiled_attention" in str(node.target) for node in graph.nodes) == 1


class Exported(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, query, key, value):
        return attention(query, key, value, mask=self.mask, backend="tiled")


def test_tiled_memory_is_linear_in_the_length():
    def forward_backward(length):
        tensors = Sizes(1, 1, 1, length, length, 8, 8).tensors(torch.float32, 0)
        mask = Causal() & Window(100)
        return lambda: torch.autograd.grad(attention(*tensors, mask=mask, backend="tiled").sum(), tensors)

    small, large = (peak_bytes(forward_backward(length)) for length in (2048, 8192))
    assert large <= 4.5 * small
    assert large < 8192 * 8192  # not even one byte per pair


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_autocast_does_not_round_what_is_inside(backend):
    tensors = Sizes(1, 2, 1, 200, 200, 8, 8).tensors(torch.float32, 0)

    def run(enabled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = attention(*tensors, mask=Causal(), backend=backend)
        return [out, *torch.autograd.grad(out.sin().sum(), tensors)]

    torch.testing.assert_close(run(True), run(False))


def test_inputs_are_not_written_to():
    tensors = Sizes(1, 2, 1, 200, 200, 4, 4).tensors(torch.float32, 0)
    kept = [tensor.detach().clone() for tensor in tensors]
    out = attention(*tensors, mask=Causal(), backend="tiled")
    torch.autograd.grad(out.sum(), tensors)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, kept, strict=True))


def test_non_contiguous_heads_give_the_same():
    query, key, value = Sizes(2, 4, 2, 200, 200, 4, 4).tensors(torch.float64, 0)
    strided = [tensor.detach().transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)]
    torch.testing.assert_close(
        attention(*strided, mask=Causal(), backend="tiled"), attention(query, key, value, mask=Causal())
    )


def test_auto_takes_sdpa_for_causal_tiled_for_windows_and_dropout():
    tensors = Sizes(1, 1, 1, 600, 600, 4, 4).tensors(torch.float32, 0)
    assert explain(*tensors, mask=Causal()).engine == "fused"
    assert explain(*tensors, mask=Causal() & Window(9)).engine == "tiled"
    assert explain(*tensors, dropout=0.1).engine == "tiled"
    assert explain(*tensors, needs_lse=True).engine == "tiled"
    assert "backward on CPU" in str(explain(*tensors))


class WholeRow(Normalizer):
    """A normalizer that needs the row."""

    def weights(self, scores, counts):
        return torch.softmax(scores, -1)


def test_a_normalizer_that_needs_whole_rows_goes_to_reference():
    from dataclasses import dataclass

    whole_row = dataclass(frozen=True, eq=False, repr=False)(WholeRow)()
    tensors = Sizes(1, 1, 1, 6, 6, 4, 4).tensors(torch.float32, 0)
    assert explain(*tensors, normalizer=whole_row).engine == "reference"
    with pytest.raises(ValueError, match="needs whole rows"):
        attention(*tensors, normalizer=whole_row, backend="tiled")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 4)}, r"query of shape \(2, 3, 4\)"),
        ({"query": torch.zeros(1, 2, 3, 4, dtype=torch.long)}, "int64"),
        ({"key": torch.zeros(1, 2, 3, 4, dtype=torch.float64)}, "key is torch.float64"),
        ({"key": torch.zeros(1, 2, 3, 5)}, r"key of shape \(1, 2, 3, 5\)"),
        ({"value": torch.zeros(1, 2, 4, 4)}, r"value of shape \(1, 2, 4, 4\)"),
        ({"query": torch.zeros(1, 3, 3, 4)}, "3 query heads for 2 key heads"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, r"wrap a boolean tensor as masks.Dense"),
        ({"mask": Padding(torch.tensor([1, 2]))}, "2 entries for a batch of 1"),
        ({"mask": Dense(torch.ones(3, 4, dtype=torch.bool))}, "3 queries and 3 keys"),
        ({"bias": Alibi(torch.ones(3))}, "for 2 query heads"),
        ({"normalizer": "sofmax"}, "did you mean 'softmax'"),
        ({"backend": "tile"}, "did you mean 'tiled'"),
        ({"backend": "fused", "normalizer": "relu"}, "has no Relu"),
        ({"backend": "fused", "dropout": 0.1}, "cannot be reproduced"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
    ids=str,
)
def test_a_bad_argument_is_named(change, message):
    arguments = {name: torch.zeros(1, 2, 3, 4) for name in ("query", "key", "value")} | change
    tensors = [arguments.pop(name) for name in ("query", "key", "value")]
    with pytest.raises(ValueError, match=message):
        attention(*tensors, **arguments)


def test_lse_of_a_normalizer_without_one_is_refused():
    tensors = Sizes(1, 1, 1, 3, 3, 4, 4).tensors(torch.float32, 0)
    with pytest.raises(ValueError, match="no log-sum-exp"):
        attention_with_lse(*tensors, normalizer="sigmoid")
