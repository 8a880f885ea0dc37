"""The neural memory of Titans. "Titans: Learning to Memorize at Test Time", Behrouz et al., 2024, arXiv 2501.00663.

    k_t, q_t = ℓ2(SiLU(conv(x_t W_K))), ℓ2(SiLU(conv(x_t W_Q))),   v_t = SiLU(conv(x_t W_V))
    ℓ(M; x_t) = ‖M(k_t) − v_t‖²                          M(k) = k + LN(σ(k W_1) W_2), a network of L_M layers
    S_t = η_t S_{t−1} − θ_t ∇ℓ(M_{t'}; x_t)              surprise, with momentum
    M_t = (1 − α_t) M_{t−1} + S_t                        the state: all W of the network; M_0 is learned
    o_t = (RMSNorm(M_t(q_t)) ⊙ SiLU(x_t W_G)) W_O        η, θ, α = sigmoid(x_t W + b), each a number per token and head

t' is the last token of the chunk before t's. With ``chunk_size=1`` that is online gradient descent, ∇ℓ(M_{t−1}; x_t).
Inside a chunk nothing is sequential: every ∇ℓ is an outer product a_i δ_iᵀ for each layer, and two scans over η and
1 − α give the coefficients of M_t = A_t M_{t'} + B_t S_{t'} − Σ_i C_ti a_i δ_iᵀ, so that a layer reads

    a M_t = A_t (a M_{t'}) + B_t (a S_{t'}) − ((a · a_i) ⊙ C_ti) δ_i

as linear attention does, and no token has weights of its own. MLP: GELU, expansion e. `titans_blocks` puts it to use.

Cost: time O(n d² + n L_M e d² / h + n c e d) with chunks of c tokens, n / c of them one after the other; memory
O(n (d + c h) + (n / c) L_M e d² / h) with gradients. The decoding state is three times the network and the last inputs
of the convolutions: M_t, S_t and M_{t'}.

Differences: LN, residual, GELU, e = 4, L_M = 2 and convolutions of 4 tokens are those of the paper's later version; the
first has an MLP without LN and residual, ``memory_residual=False``, which may diverge on large inputs as gradient
descent does. LN's gain and shift are learned outside the memory. The paper has one memory, here ``heads=1``, and does
not say what rates begin with: 0.1 / w, 0.5, 0.01. LN makes a step w times as large, w the width before the last layer,
so that θ = sigmoid(·) / w with it, and sigmoid(·) without. Of the last gate the paper names the place; SiLU is ours. α
is a number, as in the first version, not a vector. Residual connections around the mechanism belong to the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, repeat
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.mechanism import Mechanism, head_width
from regard.ops.checks import require
from regard.ops.masks import Mask
from regard.ops.precision import exact, statistics_dtype
from regard.ops.scan import associative_scan

Weights = tuple[Float[Tensor, "batch heads inputs outputs"], ...]

STEP, MOMENTUM, FORGETTING = 0.1, 0.5, 0.01
"""What θ (times w, see above), η and α begin with."""


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


class NeuralMemoryState(NamedTuple):
    """What the layer keeps while decoding: the memory and the last inputs of the convolutions."""

    memory: Memory
    query: Float[Tensor, "batch kept dim"]
    key: Float[Tensor, "batch kept dim"]
    value: Float[Tensor, "batch kept dim"]


class Projection(nn.Module):
    """A linear map, a causal depthwise convolution over `width` tokens (0: none) and SiLU."""

    def __init__(
        self, dim: int, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.linear = nn.Linear(dim, dim, bias=False, **factory)
        self.convolution = nn.Conv1d(dim, dim, width, groups=dim, bias=False, **factory) if width else None
        self.kept = max(width - 1, 0)

    def init_state(self, batch: int) -> Float[Tensor, "batch kept dim"]:
        """Zeros: nothing came before the first token."""
        return self.linear.weight.new_zeros(batch, self.kept, self.linear.out_features)

    def forward(self, x: Float[Tensor, "batch new dim"], state: Tensor) -> tuple[Tensor, Tensor]:
        """The projected tokens and the state after them."""
        seen = torch.cat([state, self.linear(x)], dim=1)
        out = seen if self.convolution is None else self.convolution(seen.mT).mT
        # A copy, as a view would keep the whole of `seen`.
        return F.silu(out), seen[:, seen.shape[1] - self.kept :].clone()


@register(
    "titans_memory",
    paper="titans",
    contract=Contract(
        input="tokens",
        patterns=("causal self",),
        time="n*d*d + n*depth*expansion*d*d/h + n*chunk_size*expansion*d",
        memory="n*(d + chunk_size*h + depth*expansion*d*d/(h*chunk_size))",
        padding=True,
        step=True,
        state="constant",
        options=(
            OptionSet({"chunk_size": 5, "expansion": 2}),
            OptionSet({"chunk_size": 32, "depth": 3}),
            OptionSet({"heads": 1, "depth": 1, "chunk_size": 16, "momentum": False}),
            OptionSet({"memory_residual": False, "forgetting": False, "convolution": 0}),
            OptionSet({"memory_residual": False, "depth": 1, "chunk_size": 7, "momentum": False, "forgetting": False}),
        ),
    ),
)
class NeuralMemory(Mechanism):
    """A network per head that learns each token's key-value pair by gradient descent while it reads the sequence.

    Args:
        dim: width of the tokens.
        heads: number of memories, each of width ``dim / heads``.
        depth: number of layers of a memory; 1 is a matrix.
        expansion: width of its hidden layers beside its own.
        memory_residual: whether a memory is ``k + LN(MLP(k))`` instead of ``MLP(k)``.
        chunk_size: number of tokens whose gradients are taken at the same weights.
        convolution: tokens that the convolution after each projection sees, the own one included; 0 for none.
        momentum: whether surprise lasts, η; otherwise η = 0.
        forgetting: whether the memory decays, α; otherwise α = 0.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        depth: int = 2,
        expansion: int = 4,
        memory_residual: bool = True,
        chunk_size: int = 64,
        convolution: int = 4,
        momentum: bool = True,
        forgetting: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, head_width(self._name, dim, heads, None)
        for name, value, least in (
            ("depth", depth, 1),
            ("expansion", expansion, 1),
            ("chunk_size", chunk_size, 1),
            ("convolution", convolution, 0),
        ):
            require(value >= least, self._name, f"{name} {value}", f"give at least {least}")
        self.chunk_size, self.momentum, self.forgetting = chunk_size, momentum, forgetting
        factory = {"device": device, "dtype": dtype}
        self.query = Projection(dim, convolution, **factory)
        self.key = Projection(dim, convolution, **factory)
        self.value = Projection(dim, convolution, **factory)
        self.rates = nn.Linear(dim, heads * (1 + momentum + forgetting), **factory)
        widths = (self.head_dim, *(expansion * self.head_dim,) * (depth - 1), self.head_dim)
        self.initial = nn.ParameterList(torch.empty(heads, *shape, **factory) for shape in pairwise(widths))
        self.step_scale = 1 / widths[-2] if memory_residual else 1.0
        self.gain = nn.Parameter(torch.ones(heads, 1, self.head_dim, **factory)) if memory_residual else None
        self.shift = nn.Parameter(torch.zeros(heads, 1, self.head_dim, **factory)) if memory_residual else None
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-6, **factory)
        self.gate = nn.Linear(dim, dim, bias=False, **factory)
        self.output = nn.Linear(dim, dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of the memory that keep the size of its inputs, and rates near their first values."""
        for weight in self.initial:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        first = [STEP, *[MOMENTUM] * self.momentum, *[FORGETTING] * self.forgetting]
        nn.init.normal_(self.rates.weight, std=0.02)
        with torch.no_grad():
            self.rates.bias.copy_(torch.tensor(first).logit().repeat(self.heads))

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Write and read token by token. `mask` may be a ``Padding``."""
        self.check_tokens(x, None, mask, None, takes_positions=False)
        self.check_width(x, self.dim)
        return self._advance(without_padding(x, mask), self.init_state(x.shape[0]))[0]

    def init_state(self, batch: int) -> NeuralMemoryState:
        """The state before the first token: the learned memory without surprise, at least float32."""
        precise = statistics_dtype(self.initial[0].dtype)
        weights = tuple(weight.to(precise).expand(batch, -1, -1, -1) for weight in self.initial)
        surprise = tuple(torch.zeros_like(weight) for weight in weights) if self.momentum else ()
        kept = (projection.init_state(batch) for projection in (self.query, self.key, self.value))
        return NeuralMemoryState(Memory(weights, surprise, weights, 0), *kept)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: NeuralMemoryState
    ) -> tuple[Float[Tensor, "batch new dim"], NeuralMemoryState]:
        """The outputs of one or more further tokens, and the state after them."""
        self.check_step(x, self.dim, state.key.shape[0])
        return self._advance(x, state)

    def retrieve(self, query: Float[Tensor, "batch length dim"], weights: Weights) -> Float[Tensor, "batch length dim"]:
        """What a memory answers to queries, which are normalised first; nothing is written."""
        found = read(unit(split(query, self.heads)), weights, self._layer_norm())
        return rearrange(found, "batch heads length width -> batch length (heads width)").to(query.dtype)

    def _advance(self, x: Tensor, state: NeuralMemoryState) -> tuple[Tensor, NeuralMemoryState]:
        query, kept_query = self.query(x, state.query)
        key, kept_key = self.key(x, state.key)
        value, kept_value = self.value(x, state.value)
        query, key, value = (split(tensor, self.heads) for tensor in (query, key, value))
        found, memory = memorize(
            unit(query), unit(key), value, self._rates_of(x), state.memory, self.chunk_size, self._layer_norm()
        )
        found = rearrange(self.norm(found.to(x.dtype)), "batch heads length width -> batch length (heads width)")
        out = self.output(found * F.silu(self.gate(x)))
        return out, NeuralMemoryState(memory, kept_query, kept_key, kept_value)

    def _rates_of(self, x: Tensor) -> Rates:
        rates = self.rates(x).to(statistics_dtype(x.dtype)).sigmoid()
        step, *others = rearrange(rates, "batch length (heads rate) -> rate batch heads length", heads=self.heads)
        momentum = others.pop(0) if self.momentum else None
        return Rates(step * self.step_scale, momentum, others.pop(0) if self.forgetting else None)

    def _layer_norm(self) -> Norm | None:
        if self.gain is None or self.shift is None:
            return None
        precise = statistics_dtype(self.gain.dtype)
        return Norm(self.gain.to(precise), self.shift.to(precise))


def without_padding(x: Tensor, mask: Mask | None) -> Tensor:
    """Tokens with zeros beyond the lengths: causality hides padding, but what is infinite times zero is not hidden."""
    if mask is None:
        return x
    batch, length = x.shape[:2]
    mask.validate(batch, 1, length, length)
    return x.masked_fill(~mask.real(length).to(x.device).unsqueeze(-1), 0.0)  # pyright: ignore[reportAttributeAccessIssue] only Padding is declared


def split(tensor: Tensor, heads: int) -> Float[Tensor, "batch heads length head_dim"]:
    """Heads of a projection, at least float32."""
    precise = tensor.to(statistics_dtype(tensor.dtype))
    return rearrange(precise, "batch length (heads width) -> batch heads length width", heads=heads)


def unit(tensor: Tensor) -> Tensor:
    """ℓ2-normalised; zeros stay zeros and have a gradient."""
    return tensor * torch.rsqrt(tensor.square().sum(-1, keepdim=True) + 1e-6)


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
