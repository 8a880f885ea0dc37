"""Long convolutions and Toeplitz products against direct convolution and dense matrices."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.ops.long_convolution import _FAST_SIZES, long_convolution, toeplitz_product
from regard.testing.checks.memory import peak_bytes

EXACT = {"rtol": 1e-11, "atol": 1e-11}
lengths, drawn = st.integers(1, 40), settings(deadline=None, max_examples=50)


def numbers(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def direct(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution by torch's direct one, a group for each channel."""
    taps = kernel.shape[-1]
    return F.conv1d(F.pad(x, (taps - 1, 0)), kernel.flip(-1).unsqueeze(1), groups=len(kernel))


def toeplitz(offsets: Tensor, queries: int, keys: int) -> Tensor:
    return offsets[..., queries - 1 + torch.arange(keys) - torch.arange(queries)[:, None]]


def assert_same_with_gradients(found: Tensor, wanted: Tensor, leaves: tuple[Tensor, ...]) -> None:
    assert_close(found, wanted, **EXACT)
    for ours, theirs in zip(*(torch.autograd.grad(out.sin().sum(), leaves) for out in (found, wanted)), strict=True):
        assert_close(ours, theirs, **EXACT)


@drawn
@given(length=lengths, taps=lengths)
def test_causal_is_direct_convolution(length, taps):
    x, kernel = numbers(2, 3, length), numbers(3, taps, seed=1)
    assert_same_with_gradients(long_convolution(x, kernel), direct(x, kernel), (x, kernel))


@drawn
@given(length=lengths, taps=lengths)
def test_circular_is_a_circulant_matrix(length, taps):
    x, kernel = numbers(2, 3, length), numbers(3, taps, seed=1)
    rounds = F.pad(kernel, (0, -taps % length)).unflatten(-1, (-1, length)).sum(-2)
    circulant = rounds[:, (torch.arange(length)[:, None] - torch.arange(length)) % length]
    wanted = torch.einsum("cij,bcj->bci", circulant, x)
    assert_same_with_gradients(long_convolution(x, kernel, causal=False), wanted, (x, kernel))


@drawn
@given(queries=lengths, keys=lengths, causal=st.booleans())
def test_toeplitz_product_is_the_matrix_product(queries, keys, causal):
    x, offsets = numbers(2, 3, keys), numbers(3, queries + keys - 1, seed=1)
    matrix = toeplitz(offsets, queries, keys)
    wanted = torch.einsum("cij,bcj->bci", matrix.tril() if causal else matrix, x)
    assert_same_with_gradients(toeplitz_product(x, offsets, causal=causal), wanted, (x, offsets))


@pytest.mark.parametrize("length", [997, 4096])
@pytest.mark.parametrize("taps", [3, 1021, 5000])
def test_long_ones_too(length, taps):
    x, kernel = numbers(1, 2, length), numbers(2, taps, seed=1)
    assert_close(long_convolution(x, kernel), direct(x, kernel), **EXACT)


@drawn
@given(cuts=st.lists(st.integers(1, 15), min_size=1, max_size=5), taps=lengths)
def test_segments_are_the_whole(cuts, taps):
    x, kernel = numbers(2, 3, sum(cuts)), numbers(3, taps, seed=1)
    whole, final = long_convolution(x, kernel, return_state=True)
    state, outputs = None, []
    for piece in x.split(cuts, dim=-1):
        out, state = long_convolution(piece, kernel, initial_state=state, return_state=True)
        outputs.append(out)
    assert_same_with_gradients(torch.cat(outputs, -1), whole, (x, kernel))
    assert torch.equal(state, final)


@pytest.mark.parametrize("seen", [0, 3, 6, 7, 30])
def test_a_state_is_any_number_of_earlier_inputs(seen):
    x, kernel = numbers(2, 3, 40), numbers(3, 7, seed=1)
    out = long_convolution(x[..., 30:], kernel, initial_state=x[..., 30 - seen : 30])
    assert_close(out, direct(x[..., 30 - seen :], kernel)[..., seen:], **EXACT)


def test_the_state_is_no_longer_than_the_kernel_and_keeps_nothing_else_alive():
    _, state = long_convolution(numbers(2, 3, 1000).detach(), numbers(3, 8), return_state=True)
    assert state.shape == (2, 3, 7)
    assert state.untyped_storage().nbytes() == state.nbytes


@pytest.mark.parametrize("causal", [True, False])
def test_one_sequence_under_many_kernels(causal):
    x, kernel = numbers(2, 1, 19), numbers(4, 19, seed=1)
    out = long_convolution(x, kernel, causal=causal)
    assert_same_with_gradients(out, long_convolution(x.expand(2, 4, 19), kernel, causal=causal), (x, kernel))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "taps"), [(1, 1), (1, 3), (5, 3), (4, 9)])
def test_gradients_are_finite_differences_to_the_second_order(causal, length, taps):
    inputs = (numbers(1, 2, length), numbers(2, taps, seed=1))

    def convolve(x: Tensor, kernel: Tensor) -> Tensor:
        return long_convolution(x, kernel, causal=causal)

    assert torch.autograd.gradcheck(convolve, inputs)
    assert torch.autograd.gradgradcheck(convolve, inputs)


def test_gradients_reach_the_state():
    inputs = (numbers(1, 2, 4), numbers(2, 6, seed=1), numbers(1, 2, 5, seed=2))
    assert torch.autograd.gradcheck(
        lambda x, kernel, state: long_convolution(x, kernel, initial_state=state, return_state=True), inputs
    )


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_a_toeplitz_product_are_finite_differences(causal):
    inputs = (numbers(1, 2, 5), numbers(2, 9, seed=1))
    assert torch.autograd.gradcheck(lambda x, offsets: toeplitz_product(x, offsets, causal=causal), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 77])
def test_half_types_round_the_float32_result_once(dtype, length):
    x, kernel = numbers(2, 3, length).to(dtype), numbers(3, 50, seed=1).to(dtype)
    out, state = long_convolution(x, kernel, return_state=True)
    assert out.dtype == state.dtype == dtype
    assert torch.equal(out, long_convolution(x.float(), kernel.float()).to(dtype))
    product = toeplitz_product(x, numbers(3, 2 * length - 1).to(dtype))
    assert product.dtype == dtype


def test_a_kernel_may_be_more_precise_than_the_sequence():
    x, kernel = numbers(2, 3, 30, dtype=torch.float32), numbers(3, 30, seed=1)
    assert torch.equal(long_convolution(x, kernel), long_convolution(x.double(), kernel).float())


def test_float32_is_close_to_float64():
    x, kernel = numbers(1, 4, 8000), numbers(4, 8000, seed=1)
    exact = long_convolution(x, kernel)
    assert (long_convolution(x.float(), kernel.float()) - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("length", [1, 40])
def test_autocast_does_not_round_inside(length):
    x, kernel = numbers(1, 2, length, dtype=torch.float32), numbers(2, 9, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = long_convolution(x, kernel)
    assert torch.equal(found, long_convolution(x, kernel))


def test_transforms_have_small_factors_and_are_little_longer_than_asked():
    for size in _FAST_SIZES:
        for factor in (2, 3, 5):
            while size % factor == 0:
                size //= factor
        assert size == 1
    assert all(later <= 1.125 * size for size, later in pairwise(_FAST_SIZES) if size >= 48)


def test_memory_grows_with_the_length_not_its_square():
    def peak(length: int) -> int:
        x, kernel = numbers(1, 2, length, dtype=torch.float32), numbers(2, length, dtype=torch.float32)
        return peak_bytes(lambda: long_convolution(x, kernel).sum().backward())

    assert peak(16384) <= 2.2 * peak(8192)


def test_compiled_once_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(long_convolution, fullgraph=True, backend="aot_eager", dynamic=True)
    kernel = numbers(3, 20, seed=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (50, 63, 64, 65, 129, 1000):
            x = numbers(2, 3, length)
            assert_same_with_gradients(compiled(x, kernel), long_convolution(x, kernel), (x, kernel))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: long_convolution(torch.ones(1, 2, 3).long(), torch.ones(2, 3)), "x is torch.int64"),
        (lambda: long_convolution(torch.ones(1, 2, 0), torch.ones(2, 3)), r"x is .* \(1, 2, 0\); give real floats"),
        (lambda: long_convolution(torch.ones(1, 2, 3), torch.ones(2, 0)), r"kernel is .* \(2, 0\)"),
        (lambda: long_convolution(torch.ones(1, 2, 3), torch.ones(2, 3) * 1j), "kernel is torch.complex64"),
        (lambda: long_convolution(torch.ones(1, 2, 3), torch.ones(3, 3)), r"kernel \(3, 3\); give axes .* broadcast"),
        (
            lambda: long_convolution(torch.ones(1, 2, 3), torch.ones(2, 3), initial_state=torch.ones(1, 1, 2)),
            r"the state is .* \(1, 1, 2\), x \(1, 2, 3\); give earlier inputs",
        ),
        (
            lambda: long_convolution(torch.ones(1, 2, 3), torch.ones(2, 3), causal=False, return_state=True),
            "return_state with causal=False, .*; drop them",
        ),
        (lambda: toeplitz_product(torch.ones(2, 5), torch.ones(2, 4)), "4 offsets for 5 keys; give 9, from 1 - 5"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=f"^(long_convolution|toeplitz_product): .*{message}"):
        call()
