"""The additive scan against its recurrence, token by token, in logarithms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from regard.ops.additive_scan import AdditiveState, additive_scan, additive_scan_both_ways
from regard.testing.checks.memory import peak_bytes

HEADS, WIDTH, VALUES = 2, 3, 4


def draw(length: int, *, copies: int = 1, size: float = 1.0, seed: int = 0) -> list[Tensor]:
    """Query, key, value and turn; `size` is that of the keys."""
    generator = torch.Generator().manual_seed(seed)
    widths = (copies * WIDTH, WIDTH, VALUES, copies * WIDTH)
    made = [torch.randn(2, HEADS, length, width, generator=generator, dtype=torch.float64) for width in widths]
    made[1] = size * made[1]
    return [tensor.requires_grad_() for tensor in made]


def recurrence(
    query: Tensor, key: Tensor, value: Tensor, turn: Tensor, starts: Tensor, state: AdditiveState | None = None
) -> tuple[Tensor, AdditiveState]:
    """g_t = g_{t−1} + exp(k_t),  S_t = (g_{t−1} / g_t) S_{t−1} + (exp(k_t) / g_t) r_t v_tᵀ,  o_t = q_t S_t."""
    copies = query.shape[-1] // key.shape[-1]
    nothing = AdditiveState.empty(*key.shape[:2], WIDTH, VALUES, copies=copies, dtype=key.dtype)
    (total, average), outputs = state or nothing, []
    for t in range(key.shape[2]):
        again = starts[:, t, None, None]
        before, average = total.where(~again, nothing.log_total), average.where(~again[..., None], nothing.average)
        total = torch.logaddexp(before, key[:, :, t])
        kept, new = ((part - total).exp().repeat(1, 1, copies)[..., None] for part in (before, key[:, :, t]))
        average = kept * average + new * turn[:, :, t, :, None] * value[:, :, t, None, :]
        outputs.append((query[:, :, t, None] @ average).squeeze(-2))
    return torch.stack(outputs, 2), AdditiveState(total, average)


def every(length: int, *places: int) -> Tensor:
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[0, list(places)] = True
    starts[1, [place // 2 for place in places]] = True
    return starts


@given(
    length=st.integers(1, 150),
    copies=st.integers(1, 2),
    size=st.sampled_from([0.0, 1.0, 1e4]),
    places=st.lists(st.integers(0, 149), max_size=4),
    goes_on=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_the_scan_is_the_recurrence(length: int, copies: int, size: float, places: list[int], goes_on: bool):
    query, key, value, turn = draw(length, copies=copies, size=size)
    starts, state = every(length, *(place % length for place in places)), None
    if goes_on:
        earlier = draw(9, copies=copies, size=size, seed=1)
        _, state = recurrence(*earlier, every(9))
    found, after = additive_scan(query, key, value, turn=turn, starts=starts, initial_state=state)
    wanted, last = recurrence(query, key, value, turn, starts, state)
    assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert_close(after, last, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize("places", [(), (0, 5, 6, 64, 99)], ids=["one", "restarts"])
def test_its_gradients_are_those_of_the_recurrence(size: float, places: tuple[int, ...]):
    leaves, starts = draw(101, copies=2, size=size), every(101, *places)
    query, key, value, turn = leaves
    found = additive_scan(query, key, value, turn=turn, starts=starts if places else None)
    wanted = recurrence(*leaves, starts)

    def gradients(out: Tensor, state: AdditiveState) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.sin().sum() + state.average.sin().sum(), leaves)

    assert_close(gradients(*found), gradients(*wanted), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_both_ways_every_token_averages_all_of_its_sequence(size: float):
    leaves = draw(140, copies=2, size=size)
    query, key, value, turn = leaves
    starts = every(140, 0, 1, 30, 100)
    found = additive_scan_both_ways(query, key, value, turn=turn, starts=starts)
    ids = starts.cumsum(-1)
    same = (ids[:, :, None] == ids[:, None, :])[:, None, :, :, None]
    weights = key[:, :, None].masked_fill(~same, -torch.inf).softmax(3).repeat(1, 1, 1, 1, 2)
    wanted = torch.einsum("bhtd,bhtsd,bhsd,bhse->bhte", query, weights, turn, value)
    assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)]
    assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_padding_is_in_no_sum():
    query, key, value, turn = draw(90)
    lengths = torch.tensor([90, 37])
    real = torch.arange(90) < lengths[:, None]
    out, state = additive_scan(query, key, value, turn=turn, real=real)
    for sample, length in enumerate(lengths.tolist()):
        alone = [part[sample : sample + 1, :, :length] for part in (query, key, value, turn)]
        wanted, last = additive_scan(*alone[:3], turn=alone[3])
        assert_close(out[sample : sample + 1, :, :length], wanted, rtol=1e-12, atol=1e-12)
        assert_close(state.average[sample], last.average[0], rtol=1e-12, atol=1e-12)
    nothing, state = additive_scan(query, key, value, real=torch.zeros_like(real))
    assert nothing.abs().max() == 0 == state.average.abs().max()


@pytest.mark.parametrize("pieces", [[1] * 70, [3, 64, 1, 2]], ids=["tokens", "pieces"])
def test_pieces_that_go_on_from_a_state_are_the_whole(pieces: list[int]):
    query, key, value, _ = draw(70, size=30.0)
    state, outputs = AdditiveState.empty(2, HEADS, WIDTH, VALUES, dtype=torch.float64), []
    for part in zip(*(tensor.split(pieces, 2) for tensor in (query, key, value)), strict=True):
        out, state = additive_scan(*part, initial_state=state)
        outputs.append(out)
    whole, last = additive_scan(query, key, value)
    assert_close(torch.cat(outputs, 2), whole, rtol=1e-10, atol=1e-10)
    assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_float32_averages_of_far_keys_stay_between_their_values(offset: float):
    query, key, value, _ = (part.detach().float() for part in draw(200))
    out, _ = additive_scan(torch.ones_like(query) / WIDTH, key + offset, value)
    low, high = value.cummin(2).values, value.cummax(2).values
    assert (out >= low - 1e-4).all()
    assert (out <= high + 1e-4).all()


def test_memory_grows_as_the_length():
    def peak(length: int) -> int:
        query, key, value, _ = draw(length)
        return peak_bytes(lambda: additive_scan(query, key, value)[0].sum().backward())

    assert peak(4096) < 2.2 * peak(2048)


@pytest.mark.parametrize("wrong", ["query", "value", "turn"])
def test_sizes_that_do_not_fit_are_named(wrong: str):
    parts = dict(zip(("query", "key", "value", "turn"), draw(5, copies=2), strict=True))
    parts[wrong] = parts[wrong][..., :-1] if wrong != "value" else parts[wrong][:, :, :-1]
    with pytest.raises(ValueError, match=r"additive_scan: query \(2, 2, 5, \d\), key \(2, 2, 5, 3\).*; give one"):
        additive_scan(**parts)
