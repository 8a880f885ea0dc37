"""A memory that is a network, written by gradient descent token by token and read in chunks.

    ℓ(M; k, v) = ‖M(k) − v‖²                             M a network of linear maps with GELU between, or k + LN of one
    S_t = η_t S_{t−1} − θ_t ∇ℓ(M_{t'}; k_t, v_t)         surprise, with momentum
    M_t = (1 − α_t) M_{t−1} + S_t                        the state: all W of the network

t' is the last token of the chunk before t's, so that inside a chunk nothing is sequential: every ∇ℓ is an outer product
a_i δ_iᵀ for each layer, and two scans over η and 1 − α give the coefficients of M_t = A_t M_{t'} + B_t S_{t'} −
Σ_i C_ti a_i δ_iᵀ. A layer then reads

    a M_t = A_t (a M_{t'}) + B_t (a S_{t'}) − ((a · a_i) ⊙ C_ti) δ_i

as linear attention does, and no token has weights of its own. From "Titans: Learning to Memorize at Test Time", 2024,
arXiv 2501.00663. Cost: for n tokens, chunks of c, width d and p weights, O(n (p + c d)) time and, with gradients,
O(n (d + c) + p n / c) memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from regard.ops.precision import exact
from regard.ops.scan import associative_scan

Weights = tuple[Float[Tensor, "batch heads inputs outputs"], ...]


class Rates(NamedTuple):
    """θ, and η and α where there are any."""

    step: Float[Tensor, "batch heads length"]
    momentum: Float[Tensor, "batch heads length"] | None
    forgetting: Float[Tensor, "batch heads length"] | None


class Norm(NamedTuple):
    """LN of a memory with a residual connection."""

    gain: Float[Tensor, "heads 1 head_dim"]
    shift: Float[Tensor, "heads 1 head_dim"]


class Memory(NamedTuple):
    """A network, its surprise, the network at the start of the chunk, and how many tokens of the chunk were seen."""

    weights: Weights
    surprise: Weights
    start: Weights
    place: int


@exact
def memorize(
    query: Float[Tensor, "batch heads length head_dim"],
    key: Float[Tensor, "batch heads length head_dim"],
    value: Float[Tensor, "batch heads length head_dim"],
    rates: Rates,
    memory: Memory,
    chunk_size: int,
    norm: Norm | None,
) -> tuple[Float[Tensor, "batch heads length head_dim"], Memory]:
    """``M_t(q_t)`` for all t, and the memory after the last token. The chunk that `memory` stands in is finished first.

    All is at least float32; gradients of what is read go back through the inner gradients, to any order.
    """
    # Split, not sliced: the gradient of a slice is as long as the sequence.
    sizes = chunks(query.shape[2], memory.place, chunk_size)
    pieces = _coefficients(rates, memory.place, chunk_size).split(sizes, memory.place)
    tokens = (tensor.split(sizes, dim=2) for tensor in (query, key, value))
    found = []
    for asked, keys, values, piece in zip(*tokens, pieces, strict=True):
        inputs, slopes = _gradients(keys, values, memory.start, norm)
        found.append(_read_chunk(asked, memory, piece, inputs, slopes, norm))
        memory = _written(memory, piece, inputs, slopes, chunk_size)
    return torch.cat(found, dim=2), memory


@exact
def read(query: Float[Tensor, "batch heads length head_dim"], weights: Weights, norm: Norm | None) -> Tensor:
    """``M(q)`` of given weights."""
    activation = query
    for index, weight in enumerate(weights):
        activation = (F.gelu(activation) if index else activation) @ weight
    return activation if norm is None else query + _normalized(activation) * norm.gain + norm.shift


class _Coefficients(NamedTuple):
    """``M_t = old M + surprised S − Σ_i writes a_i δ_iᵀ`` and ``S_t = lasting S − Σ_i pushes a_i δ_iᵀ``.

    M and S are those at the start of the chunk, or of this call.
    """

    old: Float[Tensor, "batch heads length 1"]
    surprised: Float[Tensor, "batch heads length 1"] | None
    writes: Float[Tensor, "batch heads length chunk"]
    lasting: Float[Tensor, "batch heads length 1"] | None
    pushes: Float[Tensor, "batch heads length chunk"]

    def split(self, sizes: list[int], place: int) -> Iterator[_Coefficients]:
        """Those of pieces of a chunk each, the first of which begins at `place`."""
        parts = (repeat(None) if tensor is None else tensor.split(sizes, dim=2) for tensor in self)
        for size, old, surprised, writes, lasting, pushes in zip(sizes, *parts, strict=False):
            own = slice(place, place + size)
            yield _Coefficients(old, surprised, writes[..., own], lasting, pushes[..., own])
            place = 0


def chunks(length: int, place: int, size: int) -> list[int]:
    """How `length` tokens, the first at `place` of a chunk, fall into chunks of `size`."""
    first = min(length, size - place)
    whole, left = divmod(length - first, size)
    return [first] + [size] * whole + [left] * (left > 0)


def _coefficients(rates: Rates, place: int, chunk_size: int) -> _Coefficients:
    """Two linear recurrences, of surprise and of memory, that begin anew in each chunk; one column a token of it."""
    step = rates.step.unsqueeze(-1)
    places = (place + torch.arange(step.shape[2], device=step.device)) % chunk_size
    starts = (places == 0).index_fill(0, places.new_zeros(1), True).view(1, 1, -1)
    pushes = step * (places[:, None] == torch.arange(chunk_size, device=step.device)).to(step.dtype)
    lasting, arriving = None, pushes
    if rates.momentum is not None:
        lasting, pushes = associative_scan(_decayed, (rates.momentum.unsqueeze(-1), pushes), dim=2, starts=starts)
        arriving = torch.cat([pushes, lasting], dim=-1)
    kept = torch.ones_like(step) if rates.forgetting is None else 1 - rates.forgetting.unsqueeze(-1)
    old, arrived = associative_scan(_decayed, (kept, arriving), dim=2, starts=starts)
    surprised = None if lasting is None else arrived[..., chunk_size:]
    return _Coefficients(old, surprised, arrived[..., :chunk_size], lasting, pushes)


def _decayed(earlier: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return earlier[0] * later[0], earlier[1] * later[0] + later[1]


def _gradients(key: Tensor, value: Tensor, weights: Weights, norm: Norm | None) -> tuple[list[Tensor], list[Tensor]]:
    """What enters each layer, and the gradient of the loss for what leaves it: their outer product is the weight's."""
    inputs, sums = [key], []
    for index, weight in enumerate(weights):
        if index:
            inputs.append(F.gelu(sums[-1]))
        sums.append(inputs[-1] @ weight)
    if norm is None:
        slope = 2 * (sums[-1] - value)
    else:
        normalized = _normalized(sums[-1])
        slope = 2 * (key + normalized * norm.gain + norm.shift - value) * norm.gain
        along = normalized * (slope * normalized).mean(-1, keepdim=True)
        slope = (slope - slope.mean(-1, keepdim=True) - along) * _inverse_deviation(sums[-1])
    slopes = [slope]
    for index in range(len(weights) - 1, 0, -1):
        slopes.insert(0, (slopes[0] @ weights[index].mT) * _gelu_slope(sums[index - 1]))
    return inputs, slopes


def _read_chunk(
    query: Tensor,
    memory: Memory,
    piece: _Coefficients,
    inputs: Sequence[Tensor],
    slopes: Sequence[Tensor],
    norm: Norm | None,
) -> Tensor:
    """`read`, where every token has the weights after its own write."""
    activation = query
    for index, weight in enumerate(memory.weights):
        entering = F.gelu(activation) if index else activation
        activation = piece.old * (entering @ weight)
        activation = activation - ((entering @ inputs[index].mT) * piece.writes) @ slopes[index]
        if piece.surprised is not None:
            activation = activation + piece.surprised * (entering @ memory.surprise[index])
    return activation if norm is None else query + _normalized(activation) * norm.gain + norm.shift


def _written(
    memory: Memory, piece: _Coefficients, inputs: Sequence[Tensor], slopes: Sequence[Tensor], chunk_size: int
) -> Memory:
    """The memory after the last token of a piece."""
    last = piece.old.shape[2] - 1

    def total(coefficients: Tensor, index: int) -> Tensor:
        return inputs[index].mT @ (coefficients[:, :, last].unsqueeze(-1) * slopes[index])

    weights, surprise = [], []
    for index, weight in enumerate(memory.weights):
        new = piece.old[:, :, last:] * weight - total(piece.writes, index)
        if piece.surprised is not None and piece.lasting is not None:
            new = new + piece.surprised[:, :, last:] * memory.surprise[index]
            surprise.append(piece.lasting[:, :, last:] * memory.surprise[index] - total(piece.pushes, index))
        weights.append(new)
    place = (memory.place + last + 1) % chunk_size
    return Memory(tuple(weights), tuple(surprise), memory.start if place else tuple(weights), place)


def _inverse_deviation(tensor: Tensor) -> Tensor:
    return torch.rsqrt(tensor.var(-1, correction=0, keepdim=True) + 1e-5)


def _normalized(tensor: Tensor) -> Tensor:
    return (tensor - tensor.mean(-1, keepdim=True)) * _inverse_deviation(tensor)


def _gelu_slope(tensor: Tensor) -> Tensor:
    density = torch.exp(-0.5 * tensor.square()) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(tensor / math.sqrt(2))) + tensor * density
