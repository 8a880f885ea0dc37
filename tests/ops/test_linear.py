"""Linear attention against its two definitions: the quadratic one over pairs, and the recurrence over tokens."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.ops import _linear_chunks
from regard.ops.linear import linear_attention, linear_attention_step
from regard.testing.checks.memory import peak_bytes

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def path_decay(log_decay: Tensor) -> Tensor:
    """(..., N) to (..., N, N): the decay from token j to token i, as a product of the decays between; 0 for j > i."""
    length = log_decay.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool).tril(-1)
    between = torch.where(later, log_decay.unsqueeze(-1), 0.0).cumsum(-2)
    return torch.where(later.mT, 0.0, between.exp())


def per_token(log_decay: Tensor | None, key: Tensor) -> Tensor:
    if log_decay is None:
        return key.new_zeros(key.shape[:3])
    return log_decay.unsqueeze(-1).expand(key.shape[:3]) if log_decay.dim() == 1 else log_decay


def with_ones(value: Tensor) -> Tensor:
    return torch.cat([value, torch.ones_like(value[..., :1])], -1)


def divided(out: Tensor) -> Tensor:
    return out[..., :-1] / out[..., -1:]


def dense(query, key, value, log_decay=None, state=None, *, causal=True, normalize=False):
    """Output and final state from all pairs of tokens at once."""
    value = with_ones(value) if normalize else value
    groups = query.shape[1] // key.shape[1]
    decay = per_token(log_decay, key)
    past = path_decay(decay)
    weights = past if causal else past + past.mT - torch.eye(key.shape[2], dtype=key.dtype)
    if log_decay is None and not causal:
        weights = torch.ones(query.shape[2], key.shape[2], dtype=key.dtype)
    scores = query @ key.repeat_interleave(groups, 1).mT
    scores = scores * (weights if weights.dim() == 2 else weights.repeat_interleave(groups, 1))
    out = scores @ value.repeat_interleave(groups, 1)
    final = (key * past[..., -1, :].unsqueeze(-1) if causal else key).mT @ value
    if state is not None:
        entering = decay.cumsum(-1).exp().unsqueeze(-1).repeat_interleave(groups, 1) if causal else 1.0
        out = out + (query @ state.repeat_interleave(groups, 1)) * entering
        final = final + (state * decay.sum(-1).exp()[..., None, None] if causal else state)
    return divided(out) if normalize else out, final


def recurrent(query, key, value, log_decay=None, state=None, *, normalize=False):
    """Output and final state token by token."""
    value = with_ones(value) if normalize else value
    groups = query.shape[1] // key.shape[1]
    decay = per_token(log_decay, key).exp()
    state = key.new_zeros(*key.shape[:2], key.shape[3], value.shape[3]) if state is None else state
    outputs = []
    for token in range(key.shape[2]):
        state = decay[:, :, token, None, None] * state
        state = state + torch.einsum("bhd,bhe->bhde", key[:, :, token], value[:, :, token])
        read = torch.einsum("bhd,bhde->bhe", query[:, :, token], state.repeat_interleave(groups, 1))
        outputs.append(read)
    out = torch.stack(outputs, 2)
    return divided(out) if normalize else out, state


@dataclass(frozen=True)
class Case:
    batch: int
    heads: int
    groups: int
    length: int
    head_dim: int
    value_dim: int
    decay: str
    normalize: bool
    with_state: bool
    chunk_size: int
    elements_per_step: int
    seed: int

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            # Sums of positive weights stay away from zero, where a quotient is ill-conditioned.
            drawn = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
            return drawn if self.normalize else drawn * 2 - 1.2

        query_heads, columns = self.heads * self.groups, self.value_dim + self.normalize
        tensors = {
            "query": draw(self.batch, query_heads, self.length, self.head_dim),
            "key": draw(self.batch, self.heads, self.length, self.head_dim),
            "value": draw(self.batch, self.heads, self.length, self.value_dim),
            "log_decay": self.log_decay(generator),
            "state": draw(self.batch, self.heads, self.head_dim, columns) if self.with_state else None,
        }
        return {name: None if tensor is None else tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}

    def log_decay(self, generator: torch.Generator) -> Tensor | None:
        if self.decay == "none":
            return None
        shape = (self.heads,) if self.decay == "head" else (self.batch, self.heads, self.length)
        drawn = -torch.rand(shape, generator=generator, dtype=torch.float64)
        if self.decay == "resets":
            drawn[torch.rand(shape, generator=generator) < 0.1] = -torch.inf
            drawn[torch.rand(shape, generator=generator) < 0.1] = -1e4
        return drawn

    def run(self, tensors: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """The operator, with steps and segments small enough that a few tokens fill several."""
        with mock.patch.object(_linear_chunks, "_ELEMENTS_PER_STEP", self.elements_per_step):
            return linear_attention(
                tensors["query"],
                tensors["key"],
                tensors["value"],
                log_decay=tensors["log_decay"],
                initial_state=tensors["state"],
                normalize=self.normalize,
                chunk_size=self.chunk_size,
                return_state=True,
            )

    def gradients(self, outputs: tuple[Tensor, Tensor], tensors: dict[str, Tensor | None]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
        loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
        with mock.patch.object(_linear_chunks, "_ELEMENTS_PER_STEP", self.elements_per_step):
            inputs = [tensor for tensor in tensors.values() if tensor is not None]
            return list(torch.autograd.grad(loss, inputs, materialize_grads=True))


cases = st.builds(
    Case,
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    length=st.integers(1, 70),
    head_dim=st.integers(1, 6),
    value_dim=st.integers(1, 6),
    decay=st.sampled_from(["none", "head", "token", "resets"]),
    normalize=st.booleans(),
    with_state=st.booleans(),
    chunk_size=st.integers(1, 40),
    elements_per_step=st.sampled_from([1, 100, 2**17]),
    seed=st.integers(0, 10_000),
)
drawn = settings(deadline=None, max_examples=60)
PLAIN = Case(2, 2, 1, 50, 5, 4, "none", False, False, 8, 100, seed=0)
EACH = [
    PLAIN,
    Case(2, 2, 3, 45, 5, 4, "head", False, True, 2, 100, seed=1),
    Case(1, 2, 1, 37, 4, 3, "resets", True, True, 16, 2**17, seed=2),
]


def assert_equal_with_gradients(case: Case, definition) -> None:
    tensors = case.tensors()
    ours, theirs = case.run(tensors), definition(**tensors, normalize=case.normalize)
    torch.testing.assert_close(ours, tuple(theirs), **EXACT)
    torch.testing.assert_close(case.gradients(ours, tensors), case.gradients(theirs, tensors), **EXACT)


@drawn
@given(cases)
def test_causal_equals_the_sum_over_pairs(case):
    assert_equal_with_gradients(case, dense)


@drawn
@given(cases)
def test_causal_equals_the_recurrence_over_tokens(case):
    assert_equal_with_gradients(case, recurrent)


@drawn
@given(cases)
def test_bidirectional_decay_equals_the_sum_over_pairs(case):
    tensors = case.tensors() | {"state": None}
    if tensors["log_decay"] is not None and tensors["log_decay"].dim() == 3:
        tensors["log_decay"] = tensors["log_decay"].detach()[0, :, 0].requires_grad_()
    inputs = [tensors[name] for name in ("query", "key", "value")]
    options = {"causal": False, "normalize": case.normalize}
    ours = linear_attention(*inputs, log_decay=tensors["log_decay"], chunk_size=case.chunk_size, **options)
    theirs, _ = dense(**tensors, **options)
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(case.gradients((ours,), tensors), case.gradients((theirs,), tensors), **EXACT)


@drawn
@given(cases, st.integers(1, 20))
def test_undecayed_queries_of_any_number_read_all_keys(case, queries):
    tensors = case.tensors() | {"log_decay": None}
    tensors["query"] = tensors["query"].detach()[:, :, :1].repeat(1, 1, queries, 1).requires_grad_()
    inputs = [tensors[name] for name in ("query", "key", "value")]
    options = {"causal": False, "normalize": case.normalize}
    ours = linear_attention(*inputs, initial_state=tensors["state"], return_state=True, **options)
    theirs = dense(**tensors, **options)
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(case.gradients(ours, tensors), case.gradients(theirs, tensors), **EXACT)


@drawn
@given(cases)
def test_steps_equal_the_whole(case):
    tensors = case.tensors()
    whole, final = case.run(tensors)
    state, outputs = tensors["state"], []
    for token in range(case.length):
        now = slice(token, token + 1)
        query, key, value = (tensors[name][:, :, now] for name in ("query", "key", "value"))
        decay = tensors["log_decay"]
        decay = decay[:, :, now] if decay is not None and decay.dim() == 3 else decay
        out, state = linear_attention_step(query, key, value, state, log_decay=decay, normalize=case.normalize)
        outputs.append(out)
    stepped = (torch.cat(outputs, 2), state)
    torch.testing.assert_close(stepped, (whole, final), **EXACT)
    torch.testing.assert_close(case.gradients(stepped, tensors), case.gradients((whole, final), tensors), **EXACT)


@drawn
@given(cases, st.data())
def test_segments_equal_the_whole(case, data):
    if case.length < 2:
        return
    cut = data.draw(st.integers(1, case.length - 1))
    tensors = case.tensors()
    whole = case.run(tensors)
    state, outputs = tensors["state"], []
    for part in (slice(0, cut), slice(cut, None)):
        sequences = {name: tensors[name][:, :, part] for name in ("query", "key", "value")}
        decay = tensors["log_decay"]
        decay = decay[:, :, part] if decay is not None and decay.dim() == 3 else decay
        out, state = case.run(sequences | {"log_decay": decay, "state": state})
        outputs.append(out)
    parts = (torch.cat(outputs, 2), state)
    torch.testing.assert_close(parts, whole, **EXACT)
    torch.testing.assert_close(case.gradients(parts, tensors), case.gradients(whole, tensors), **EXACT)


@pytest.mark.parametrize("decay", ["none", "head", "token"])
def test_chunk_size_changes_nothing(decay):
    sizes = (1, 3, 16, 50, 64, 1000)
    variants = [Case(2, 2, 2, 50, 5, 4, decay, False, True, size, 300, seed=3) for size in sizes]
    tensors = variants[0].tensors()
    results = [case.run(tensors) for case in variants]
    gradients = [case.gradients(result, tensors) for case, result in zip(variants, results, strict=True)]
    for result, gradient in zip(results, gradients, strict=True):
        torch.testing.assert_close(result, results[0], **EXACT)
        torch.testing.assert_close(gradient, gradients[0], **EXACT)


@pytest.mark.parametrize("causal", [True, False])
def test_grouped_heads_equal_repeated_key_heads(causal):
    query = torch.randn(2, 6, 33, 5, dtype=torch.float64)
    key, value = torch.randn(2, 2, 33, 5, dtype=torch.float64), torch.randn(2, 2, 33, 3, dtype=torch.float64)
    decay = -torch.rand(2, dtype=torch.float64)
    grouped = linear_attention(query, key, value, log_decay=decay, causal=causal, chunk_size=8)
    key, value, decay = key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), decay.repeat_interleave(3)
    repeated = linear_attention(query, key, value, log_decay=decay, causal=causal, chunk_size=8)
    torch.testing.assert_close(grouped, repeated, **EXACT)


@pytest.mark.parametrize("case", EACH)
def test_gradients_equal_finite_differences(case):
    case = Case(1, case.heads, case.groups, 7, 2, 2, case.decay, case.normalize, case.with_state, 3, 1, seed=4)
    tensors = case.tensors()
    if tensors["log_decay"] is not None:
        tensors["log_decay"] = tensors["log_decay"].detach().clamp(min=-3).requires_grad_()
    names = [name for name, tensor in tensors.items() if tensor is not None]

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        return case.run(tensors | dict(zip(names, given, strict=True)))

    assert torch.autograd.gradcheck(call, [tensors[name] for name in names])


@pytest.mark.parametrize("case", EACH)
def test_float32_is_close_to_float64(case):
    case = Case(1, 2, case.groups, 700, 16, 16, case.decay, case.normalize, case.with_state, 64, 4096, seed=5)
    single, double = case.tensors(torch.float32), case.tensors()
    ours, exact = case.run(single), case.run(double)
    pairs = zip((*ours, *case.gradients(ours, single)), (*exact, *case.gradients(exact, double)), strict=True)
    for ours, exact in pairs:
        assert (ours - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_half_types_round_the_float32_result_once(dtype, normalize, causal):
    query, key, value = (torch.rand(2, 2, 77, 8).to(dtype) for _ in range(3))
    decay = -torch.rand(2)
    options = {"log_decay": decay, "normalize": normalize, "causal": causal, "chunk_size": 16}
    half = linear_attention(query, key, value, **options)
    single = linear_attention(query.float(), key.float(), value.float(), **options)
    assert half.dtype == dtype
    assert torch.equal(half, single.to(dtype))


def test_state_of_half_types_is_float32():
    query, key, value = (torch.rand(1, 2, 9, 4).bfloat16().requires_grad_() for _ in range(3))
    out, state = linear_attention(query, key, value, normalize=True, return_state=True)
    token = slice(0, 1)
    out, state = linear_attention_step(query[:, :, token], key[:, :, token], value[:, :, token], state, normalize=True)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert state.shape == (1, 2, 4, 5)
    assert torch.autograd.grad(out.sum() + state.sum(), query)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("causal", [True, False])
def test_autocast_does_not_round_inside(causal):
    query, key, value = (torch.randn(1, 2, 40, 8) for _ in range(3))

    def run() -> tuple[Tensor, ...]:
        out, state = linear_attention(query, key, value, causal=causal, chunk_size=8, return_state=True)
        token = (tensor[:, :, :1] for tensor in (query, key, value))
        return out, state, *linear_attention_step(*token, state)

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
    torch.testing.assert_close(found, expected)


def test_causal_backward_under_autocast_does_not_round_inside():
    inputs = [torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3)]
    out = linear_attention(*inputs, chunk_size=8)
    expected = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("forget", [-torch.inf, -1e4])
@pytest.mark.parametrize("position", [0, 1, 15, 16, 20, 31])
def test_a_reset_forgets_everything_before_it_exactly(forget, position):
    query, key, value = (torch.randn(1, 2, 32, 4) for _ in range(3))
    decay = -torch.rand(1, 2, 32)
    decay[..., position] = forget
    decay.requires_grad_()
    state = torch.randn(1, 2, 4, 4)
    out, final = linear_attention(
        query, key, value, log_decay=decay, initial_state=state, chunk_size=16, return_state=True
    )
    kept = decay.detach()[..., position:].clone()
    kept[..., 0] = 0
    after = [tensor[:, :, position:] for tensor in (query, key, value)]
    fresh, fresh_final = linear_attention(*after, log_decay=kept, return_state=True)
    torch.testing.assert_close(out[:, :, position:], fresh, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, fresh_final, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(out.sum() + final.sum(), decay)
    assert grad.isfinite().all()
    assert (grad[..., position] == 0).all()
    changed = key.clone()
    changed[:, :, :position] *= 1e6
    again = linear_attention(query, changed, value, log_decay=decay, chunk_size=16)
    assert torch.equal(again[:, :, position:], out[:, :, position:])


def test_a_head_that_forgets_everything_sees_itself_only():
    query, key, value = (torch.randn(1, 1, 40, 4, dtype=torch.float64) for _ in range(3))
    out = linear_attention(query, key, value, log_decay=torch.tensor([-torch.inf]), chunk_size=16)
    torch.testing.assert_close(out, (query * key).sum(-1, keepdim=True) * value, **EXACT)


def test_strong_decay_neither_overflows_nor_loses_the_recent_tokens():
    query, key, value = (torch.randn(1, 1, 300, 8) for _ in range(3))
    decay = torch.full((1, 1, 300), -80.0)
    decay[..., 1::2] = -0.01
    inputs = [tensor.double() for tensor in (query, key, value, decay)]
    exact, _ = recurrent(*inputs)
    out = linear_attention(query, key, value, log_decay=decay, chunk_size=64)
    assert (out - exact).norm() <= 1e-3 * exact.norm()


def test_zero_normalisers_give_zero_and_zero_gradients():
    query = torch.rand(1, 2, 20, 4, requires_grad=True)
    key, value = torch.zeros(1, 2, 20, 4, requires_grad=True), torch.randn(1, 2, 20, 4, requires_grad=True)
    for causal in (True, False):
        out = linear_attention(query, key, value, causal=causal, normalize=True)
        assert (out == 0).all()
        for grad in torch.autograd.grad(out.sum(), (query, key, value)):
            assert (grad == 0).all()


@pytest.mark.parametrize("normalize", [False, True])
def test_scores_of_ten_thousand_stay_finite(normalize):
    query, key, value = (torch.rand(1, 2, 100, 8, requires_grad=True) for _ in range(3))
    out = linear_attention(query * 1e2, key * 1e2, value, normalize=normalize)
    exact, _ = dense(query.double() * 1e2, key.double() * 1e2, value.double(), normalize=normalize)
    assert (out - exact).norm() <= 1e-5 * exact.norm()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (query, key, value)))


@pytest.mark.parametrize("case", EACH)
def test_strided_inputs_equal_contiguous_ones(case):
    tensors = case.tensors()
    strided = {
        name: tensor if tensor is None or tensor.dim() != 4 else tensor.mT.contiguous().mT
        for name, tensor in tensors.items()
    }
    ours, expected = case.run(strided), case.run(tensors)
    torch.testing.assert_close(ours, expected, **EXACT)
    gradients = torch.autograd.grad(ours[0].sum(), [t for t in tensors.values() if t is not None])
    expected = torch.autograd.grad(expected[0].sum(), [t for t in tensors.values() if t is not None])
    torch.testing.assert_close(gradients, expected, **EXACT)


@pytest.mark.parametrize("case", EACH)
def test_inputs_are_not_written_to(case):
    tensors = case.tensors()
    before = {name: None if tensor is None else tensor.detach().clone() for name, tensor in tensors.items()}
    case.gradients(case.run(tensors), tensors)
    now = [tensor[:, :, :1] for name, tensor in tensors.items() if name in ("query", "key", "value")]
    linear_attention_step(*now, tensors["state"], normalize=case.normalize)
    for name, tensor in tensors.items():
        assert tensor is None or torch.equal(tensor, before[name]), name


@pytest.fixture
def poisoned_memory():
    """New buffers hold NaN until something is written to them."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("case", EACH)
@pytest.mark.usefixtures("poisoned_memory")
def test_nothing_uninitialised_is_read(case):
    assert torch.empty(3).isnan().all()
    assert_equal_with_gradients(case, dense)


@pytest.mark.parametrize("case", EACH)
def test_two_calls_agree_bit_for_bit(case):
    tensors = case.tensors(torch.float32)
    first, second = case.run(tensors), case.run(tensors)
    pairs = zip((*first, *case.gradients(first, tensors)), (*second, *case.gradients(second, tensors)), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("length", [1, 50])
def test_the_final_state_shares_memory_with_nothing(length):
    query, key, value = (torch.randn(1, 2, length, 3) for _ in range(3))
    initial = torch.randn(1, 2, 3, 3)
    _, state = linear_attention(query, key, value, initial_state=initial, chunk_size=1, return_state=True)
    assert state.data_ptr() != initial.data_ptr()
    assert state.untyped_storage().nbytes() == state.nbytes


@pytest.mark.parametrize("case", EACH)
def test_operators_keep_the_rules_of_torch(case):
    tensors = case.tensors()
    arguments = [tensors[name] for name in ("query", "key", "value", "log_decay")]
    if case.normalize:
        arguments[2] = with_ones(arguments[2]).detach().requires_grad_()
    torch.library.opcheck(_linear_chunks._forward, (*arguments, tensors["state"], case.chunk_size))
    detached = [None if tensor is None else tensor.detach() for tensor in arguments]
    out, checkpoints = _linear_chunks._forward(*detached, None, case.chunk_size)
    torch.library.opcheck(
        _linear_chunks._backward,
        (out, checkpoints[-1].clone(), *detached, checkpoints, case.chunk_size, detached[3] is not None),
    )


@pytest.mark.parametrize("case", EACH)
def test_compiled_equals_eager(case):
    torch._dynamo.reset()
    tensors = case.tensors()
    sequences = [tensors[name] for name in ("query", "key", "value")]
    options = {"log_decay": tensors["log_decay"], "normalize": case.normalize, "chunk_size": 8}

    def run(query: Tensor, key: Tensor, value: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        return linear_attention(query, key, value, initial_state=state, return_state=True, **options)

    def step(query: Tensor, key: Tensor, value: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention_step(query, key, value, state, normalize=case.normalize)

    eager = run(*sequences, tensors["state"])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*sequences, tensors["state"])
    torch.testing.assert_close(compiled, eager, **EXACT)
    torch.testing.assert_close(case.gradients(compiled, tensors), case.gradients(eager, tensors), **EXACT)
    now = [tensor[:, :, :1] for tensor in sequences]
    stepped = torch.compile(step, fullgraph=True, backend="aot_eager")(*now, eager[1])
    torch.testing.assert_close(stepped, step(*now, eager[1]), **EXACT)


def test_compiled_bidirectional_equals_eager():
    torch._dynamo.reset()
    query, key, value = (torch.randn(1, 2, 30, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    decay = -torch.rand(2, dtype=torch.float64)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return linear_attention(query, key, value, log_decay=decay, causal=False, chunk_size=8)

    eager, compiled = (
        function(query, key, value) for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager"))
    )
    torch.testing.assert_close(compiled, eager, **EXACT)
    grads = (torch.autograd.grad(out.square().sum(), (query, key, value)) for out in (compiled, eager))
    torch.testing.assert_close(*grads, **EXACT)


def test_export_holds_one_operator_for_any_length():
    class Attend(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return linear_attention(query, key, value)

    def draw(length: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(1, 2, length, 4) for _ in range(3))

    length = torch.export.Dim("length", min=2, max=4096)
    axes = {name: {2: length} for name in ("query", "key", "value")}
    program = torch.export.export(Attend(), draw(100), dynamic_shapes=axes)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in called if "regard" in name] == ["regard.linear_attention.default"]
    assert not any("mul" in name or "mm" in name for name in called)
    for tensors in (draw(2), draw(3000)):
        assert torch.equal(program.module()(*tensors), Attend()(*tensors))


def test_second_derivative_is_refused():
    query, key, value = (torch.randn(1, 1, 5, 2, requires_grad=True) for _ in range(3))
    out = linear_attention(query, key, value)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_attention: .* no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("decay", ["none", "token"])
def test_memory_beyond_the_outputs_is_a_fraction_of_them(decay):
    def growth(backward: bool) -> float:
        """Bytes a token adds, between 4096 tokens and 12288."""
        peaks = []
        for length in (4096, 12288):
            query, key, value = (torch.randn(1, 2, length, 32, requires_grad=True) for _ in range(3))
            log_decay = -torch.rand(1, 2, length) if decay == "token" else None
            weight = torch.randn(1, 2, length, 32)
            out = linear_attention(query, key, value, log_decay=log_decay)
            peaks.append(
                peak_bytes(lambda: torch.autograd.grad(out, (query, key, value), weight))  # noqa: B023  called at once
                if backward
                else peak_bytes(lambda: linear_attention(query, key, value, log_decay=log_decay))  # noqa: B023  called at once
            )
        return (peaks[1] - peaks[0]) / 8192

    one_output = 2 * 32 * 4
    assert growth(backward=False) <= 1.25 * one_output
    assert growth(backward=True) <= 3.25 * one_output


def tensors_of(query=(2, 4, 6, 3), key=(2, 2, 6, 3), value=(2, 2, 6, 5)) -> list[Tensor]:
    return [torch.randn(shape) for shape in (query, key, value)]


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (tensors_of(query=(4, 6, 3)), {}, "query has 3 axes; give"),
        (tensors_of(value=(2, 2, 6, 5, 1)), {}, "value has 5 axes; give"),
        ([tensor.long() for tensor in tensors_of()], {}, "query is torch.int64"),
        ([*tensors_of()[:2], tensors_of()[2].half()], {}, "value is torch.float16, query torch.float32; use one"),
        (tensors_of(key=(2, 2, 7, 3)), {}, "same batch, heads and length"),
        (tensors_of(key=(2, 3, 6, 3)), {}, "same batch, heads and length"),
        (tensors_of(query=(2, 4, 6, 4)), {}, "same batch and width"),
        (tensors_of(query=(1, 4, 6, 3)), {}, "same batch and width"),
        (tensors_of(query=(2, 3, 6, 3)), {}, "multiple of key's heads"),
        (tensors_of((2, 2, 0, 3), (2, 2, 0, 3), (2, 2, 0, 5)), {}, "at least one token"),
        (tensors_of(query=(2, 4, 5, 3)), {}, "query has length 5 and key 6"),
        (tensors_of(), {"chunk_size": 0}, "chunk_size 0 is below 1"),
        (tensors_of(), {"log_decay": torch.zeros(4)}, r"log_decay is .* \(4,\); give floats of shape \(2,\)"),
        (tensors_of(), {"log_decay": torch.zeros(2, 2, 5)}, r"log_decay .* or \(2, 2, 6\)"),
        (tensors_of(), {"log_decay": torch.zeros(2).long()}, "log_decay is torch.int64"),
        (tensors_of(), {"log_decay": torch.zeros(2, 2, 6), "causal": False}, "one per token, with causal=False"),
        (tensors_of(), {"initial_state": torch.zeros(2, 2, 3, 4)}, r"the state .* of shape \(2, 2, 3, 5\)"),
        (tensors_of(), {"initial_state": torch.zeros(2, 2, 3, 5).double()}, "the state is torch.float64"),
        (
            tensors_of(),
            {"initial_state": torch.zeros(2, 2, 3, 5), "normalize": True},
            r"with normalize=True; give torch.float32 of shape \(2, 2, 3, 6\)",
        ),
        (
            tensors_of(),
            {"log_decay": torch.zeros(2), "causal": False, "return_state": True},
            "leaves no state; drop",
        ),
        (
            tensors_of(),
            {"log_decay": torch.zeros(2), "causal": False, "initial_state": torch.zeros(2, 2, 3, 5)},
            "leaves no state; drop",
        ),
    ],
)
def test_what_does_not_fit_is_named(tensors, options, message):
    with pytest.raises(ValueError, match=f"^linear_attention: .*{message}"):
        linear_attention(*tensors, **options)


def test_a_step_takes_one_token_of_the_state_it_is_given():
    with pytest.raises(ValueError, match="linear_attention_step: query has length 6 and key 6, a step takes one"):
        linear_attention_step(*tensors_of(), None)
    one = tensors_of((2, 4, 1, 3), (2, 2, 1, 3), (2, 2, 1, 5))
    with pytest.raises(ValueError, match=r"linear_attention_step: the state is .*normalize=True; give"):
        linear_attention_step(*one, torch.zeros(2, 2, 3, 5), normalize=True)
