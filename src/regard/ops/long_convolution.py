"""Long convolutions and Toeplitz products by FFT: N log N time and linear memory for kernels as long as the sequence.

    causal      y_t = Σ_{s <= t} kernel_s x_{t-s}
    circular    y_t = Σ_s kernel_s x_{(t-s) mod N}
    Toeplitz    y_i = Σ_j c_{j-i} x_j

Convolution theorem on zero-padded sequences, as in "Hyena Hierarchy" (Poli et al., 2023, arXiv 2302.10866) and
"Stable, Fast and Accurate" (Luo et al., 2021, arXiv 2106.12566). Segments of a sequence by overlap-save: the state is
the inputs that the kernel still reaches.

A transform mixes all positions: where the mathematics has a zero, as before a later token, it leaves the roundoff of
the largest input. Fill padding with zeros before the call.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from regard.ops.checks import require
from regard.ops.precision import exact

_SMOOTH = (1, 3, 5, 9, 15, 25, 27, 45, 75, 81, 125, 135)
_FAST_SIZES = sorted(size for odd in _SMOOTH for power in range(1, 40) if (size := odd << power) <= 1 << 40)
"""Even numbers with small prime factors, at most an eighth apart from 48 on."""


@overload
def long_convolution(
    x: Tensor,
    kernel: Tensor,
    *,
    causal: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
) -> Tensor: ...


@overload
def long_convolution(
    x: Tensor,
    kernel: Tensor,
    *,
    causal: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def long_convolution(
    x: Float[Tensor, "*batch length"],
    kernel: Float[Tensor, "*channels kernel_length"],
    *,
    causal: bool = True,
    initial_state: Float[Tensor, "*batch seen"] | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each channel of x (batch, channels, length) convolved with its kernel of (channels, kernel_length).

    Causal, or with ``causal=False`` circular with the period of `x`.

    The kernel may be longer or shorter than the sequence: what a causal kernel has beyond the sequence is not used, and
    a circular one goes round. The axes before the last may be any that broadcast: with x (batch, 1, length) all kernels
    are applied to the same sequence, which is transformed once.

    A sequence may come in segments. The state is the last inputs, of the dtype of `x` and as many as the kernel
    reaches, at most ``kernel_length - 1``; `initial_state` continues from one, and may be any number of earlier inputs.
    What stands before it is zero.

    Returns the dtype of `x`, and the state if `return_state`. Half types are computed in float32, and in float64 if
    either is. A single token is a plain product with the state. Raises ``ValueError`` for what does not fit together.
    """
    owner = "long_convolution"
    _check(owner, x, kernel, "kernel")
    if initial_state is not None:
        given = f"the state is {initial_state.dtype} of shape {tuple(initial_state.shape)}, x {tuple(x.shape)}"
        fits = initial_state.dtype == x.dtype and initial_state.shape[:-1] == x.shape[:-1]
        require(fits, owner, given, "give earlier inputs: the dtype of x, and its shape but for the length")
    if causal:
        out, state = _causal(x, kernel, initial_state)
        return (out, state) if return_state else out
    given = "initial_state or return_state with causal=False, which has no beginning and no end"
    require(initial_state is None and not return_state, owner, given, "drop them, or use causal=True")
    return _circular(x, kernel)


def toeplitz_product(
    x: Float[Tensor, "*batch keys"], offsets: Float[Tensor, "*channels offsets"], *, causal: bool = False
) -> Float[Tensor, "*batch queries"]:
    """``y_i = Σ_j c_{j-i} x_j`` for N keys and as many queries as the offsets say, without the matrix.

    `offsets` holds c from the farthest past to the farthest future: for as many queries as keys, ``c_{1-N} … c_{N-1}``,
    2N - 1 values; in general the queries and keys less one, with ``c_{j-i}`` at index ``queries - 1 + j - i``. Queries
    and keys are counted from 0. `causal` takes ``j <= i`` only and does not read what is beyond.

    The axes before the last broadcast. Returns the dtype of `x`; half types are computed in float32 inside.
    """
    owner = "toeplitz_product"
    _check(owner, x, offsets, "offsets")
    length, queries = x.shape[-1], offsets.shape[-1] - x.shape[-1] + 1
    require(
        queries > 0,
        owner,
        lambda: f"{offsets.shape[-1]} offsets for {length} keys",
        lambda: f"give {2 * length - 1}, from 1 - {length} to {length} - 1",
    )
    kernel = offsets.flip(-1)
    if causal:
        return _causal(F.pad(x, (0, queries - length)), kernel[..., length - 1 :], None)[0]
    return _convolved(x, kernel, length - 1, queries).to(x.dtype)


def _causal(x: Tensor, kernel: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The outputs of `x`, and as much of its end as the kernel reaches later."""
    kept, length = kernel.shape[-1] - 1, x.shape[-1]
    seen = x if state is None else torch.cat([state[..., max(0, state.shape[-1] - kept) :], x], -1)
    before = seen.shape[-1] - length
    out = _convolved(seen, kernel[..., : before + length], before, length)
    # A copy, so that a short state does not keep a long sequence alive.
    return out.to(x.dtype), seen[..., max(0, before + length - kept) :].clone()


def _circular(x: Tensor, kernel: Tensor) -> Tensor:
    """A period before the sequence makes it causal, once the kernel is no longer than the period."""
    period = x.shape[-1]
    rounds = -(-kernel.shape[-1] // period)
    if rounds > 1:
        kernel = F.pad(kernel, (0, rounds * period - kernel.shape[-1])).unflatten(-1, (rounds, period)).sum(-2)
    return _causal(x, kernel, x)[0]


@exact
def _convolved(x: Tensor, kernel: Tensor, first: int, count: int) -> Tensor:
    """Values ``first`` to ``first + count - 1`` of the full convolution, in the type it is computed in."""
    dtype = torch.float64 if torch.float64 in (x.dtype, kernel.dtype) else torch.float32
    x, kernel = x.to(dtype), kernel.to(dtype)
    taps = kernel.shape[-1]
    if count == 1 and taps <= first + 1:
        return (x[..., first + 1 - taps : first + 1] * kernel.flip(-1)).sum(-1, keepdim=True)
    # What goes round in a shorter transform falls on values that are not asked for.
    size = _fast_size(max(first + count, x.shape[-1] + taps - 1 - first))
    spectrum = torch.fft.rfft(x, n=size) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., first : first + count]


def _fast_size(length: int) -> int:
    """A length of transform, at least this, that factors into small primes."""
    if torch.compiler.is_compiling():
        # A search would compile again for every size it finds.
        return (length // 64 + 1) * 64
    return _FAST_SIZES[bisect_left(_FAST_SIZES, length)]


def _check(owner: str, x: Tensor, kernel: Tensor, name: str) -> None:
    for tensor, called in ((x, "x"), (kernel, name)):
        require(
            tensor.is_floating_point() and tensor.dim() > 0 and tensor.shape[-1] > 0,
            owner,
            f"{called} is {tensor.dtype} of shape {tuple(tensor.shape)}",
            "give real floats, the length last and at least 1",
        )
    try:
        torch.broadcast_shapes(x.shape[:-1], kernel.shape[:-1])
    except RuntimeError:
        fits = False
    else:
        fits = True
    given = f"x has shape {tuple(x.shape)}, {name} {tuple(kernel.shape)}"
    require(fits, owner, given, "give axes before the last that broadcast")
