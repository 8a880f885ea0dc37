"""The neural memory of Titans. "Titans: Learning to Memorize at Test Time", Behrouz et al., 2024, arXiv 2501.00663.

    k_t, q_t = ℓ2(SiLU(conv(x_t W_K))), ℓ2(SiLU(conv(x_t W_Q))),   v_t = SiLU(conv(x_t W_V))
    ℓ(M; x_t) = ‖M(k_t) − v_t‖²                          M(k) = k + LN(σ(k W_1) W_2), a network of L_M layers
    S_t = η_t S_{t−1} − θ_t ∇ℓ(M_{t'}; x_t)              surprise, with momentum
    M_t = (1 − α_t) M_{t−1} + S_t                        the state: all W of the network; M_0 is learned
    o_t = (RMSNorm(M_t(q_t)) ⊙ SiLU(x_t W_G)) W_O        η, θ, α = sigmoid(x_t W + b), each a number per token and head

t' is the last token of the chunk before t's. With ``chunk_size=1`` that is online gradient descent, ∇ℓ(M_{t−1}; x_t).
Inside a chunk nothing is sequential: `regard.ops.neural_memory`. MLP: GELU, expansion e. `titans_blocks` uses it.

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

from itertools import pairwise
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
from regard.ops.neural_memory import Memory, Norm, Rates, Weights, memorize, read
from regard.ops.precision import statistics_dtype

STEP, MOMENTUM, FORGETTING = 0.1, 0.5, 0.01
"""What θ (times w, see above), η and α begin with."""


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
