"""SeqBoat. "Sparse Modular Activation for Efficient Sequence Modeling", Ren et al., 2023, arXiv 2306.11197.

    m      = SiLU(EMA(LayerNorm(x)))                                        the state space model, `damped_ema`
    u_t    = W_u m_t + b_u,   c_t = softmax(u_t / τ)_2,   a_t = [u_t2 > u_t1]      the latent configurator, τ learned
    M      = the m_t with a_t = 1, one after the other                      compress: r tokens
    Z, R, V = SiLU(M W + b),  Q = γ_q Z + β_q,  K = γ_k Z + β_k             the gated attention unit
    G_i    = W_o (R_i ⊙ Σ_j w(Q_i · K_j + b_ij) V_j) + b_o                  j at most `window` places before i in M
    y_t    = SiLU(W m_t + b + c_t a_t G_(place of t in M) + x_t)            extract and aggregate

and without causality j up to `window` places after i as well. w is softmax of scores scaled by 1/√d_z, or the square of
the positive part of scores divided by w, the window (2 w without causality). b_ij depends on how far apart the two
tokens are in x, or in M; or Q and K are turned by where they stand in x.

Who is activated is a step function of m, which passes no gradient. The configurator learns from the confidence c_t with
which the output of the attention unit is weighted; a token that is not activated tells it nothing.

Cost: time O(n d (d + e + log n) + r d (d + w)), memory O(n d + √n d e), with e = 16 numbers that average a feature. The
decoding state is that of the average and the last w activated tokens, the working memory, however far back they were.

Differences: of the paper only the abstract could be read; this is the authors' layer. Of its options are left out
batch and scale normalisation and the average's cut-off at a length, which some of their recipes use; dropout of weights
and of V, which none does; Laplace's function of the scores, T5's bias, and the switch that activates every token. Under
torch.compile and torch.export, where shapes must not depend on data, M is as long as x, with the same results.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, Taxonomy, register
from regard.nn.linear.damped_ema import DampedEMA
from regard.nn.mechanism import Mechanism
from regard.ops.attention import attention
from regard.ops.biases import Bias, RelativeBias
from regard.ops.checks import one_of, require
from regard.ops.masks import Keys, Mask, Padding, Window
from regard.ops.normalizers import Pointwise
from regard.ops.positions import rotary
from regard.ops.precision import statistics_dtype

EMA_SIZE = 16
"""How many decays average a feature: the same in all the authors' models."""

MAX_POSITIONS = 1024


@dataclass(frozen=True, eq=False, repr=False)
class SquaredRelu(Pointwise):
    """``max(s_ij, 0)²``."""

    def weights(self, scores: Tensor, counts: Tensor) -> Tensor:
        return torch.relu(scores).square()

    def slope(self, weights: Tensor, counts: Tensor) -> Tensor:
        return 2 * weights.sqrt()


@dataclass(frozen=True, eq=False, repr=False)
class PlacedBias(Bias):
    """A learned value per distance in the sequence that queries and keys were taken from, clipped at both ends."""

    table: Float[Tensor, " distances"]
    places: Int[Tensor, "batch keys"]
    shift_invariant: ClassVar[bool] = False

    def score(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        reach = self.table.shape[0] // 2
        distance = self.places[batch, key] - self.places[batch, query]
        return self.table[distance.clamp(-reach, reach) + reach]


class WorkingMemory(NamedTuple):
    """The last activated tokens, the latest at the end, and where they stood."""

    key: Float[Tensor, "batch 1 window head_dim"]
    value: Float[Tensor, "batch 1 window value_dim"]
    places: Int[Tensor, "batch window"]
    filled: Int[Tensor, " batch"]


class SeqBoatState(NamedTuple):
    """What decoding keeps."""

    average: Float[Tensor, "batch dim size"]
    memory: WorkingMemory
    seen: int


@register(
    "seqboat",
    paper="seqboat",
    taxonomy=Taxonomy(positions="local"),
    contract=Contract(
        input="tokens",
        patterns=("noncausal self", "causal self"),
        time="n*d*(d + log2(n) + min(n, window))",
        memory="n*d",
        padding=True,
        step=True,
        state="constant",
        options=(
            OptionSet({"window": 3, "head_dim": 10, "max_positions": 6, "temperature": 0.3}),
            OptionSet({"position": "rotary", "normalizer": "softmax", "window": 4, "norm_first": False}),
            OptionSet({"position": "local", "window": 5, "dropout": 0.1}),
        ),
    ),
)
class SparseModularActivation(Mechanism):
    """A moving average decides which tokens go through local attention among themselves.

    Args:
        dim: width of the tokens.
        causal: whether a token sees only itself and what came before.
        window: how many activated tokens before its own an activated token attends to, and without causality after it.
        head_dim: width d_z of queries and keys. Values are twice as wide as tokens.
        temperature: what τ starts with, in units of √dim.
        normalizer: ``"relu2"`` or ``"softmax"``.
        position: ``"relative"`` adds a learned bias per distance in the sequence, ``"local"`` per distance among the
            activated tokens; ``"rotary"`` turns queries and keys.
        max_positions: with ``"relative"``, distances from this on share a bias; 1024 by default.
        norm_first: whether the normalisation stands before the average, or else after everything.
        dropout: probability of dropping a feature of the average and of what is added to x in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        causal: bool = False,
        window: int = 256,
        head_dim: int = 96,
        temperature: float = 1.0,
        normalizer: Literal["relu2", "softmax"] = "relu2",
        position: Literal["relative", "local", "rotary"] = "relative",
        max_positions: int | None = None,
        norm_first: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("window", window), ("head_dim", head_dim), ("temperature", temperature)):
            require(value > 0, self._name, f"{name} {value}", "give a positive number")
        one_of(self._name, "normalizer", normalizer, ("relu2", "softmax"))
        one_of(self._name, "position", position, ("relative", "local", "rotary"))
        require(0.0 <= dropout < 1.0, self._name, f"dropout {dropout}", "give a probability in [0, 1)")
        require(
            position != "rotary" or head_dim % 2 == 0,
            self._name,
            f"head_dim {head_dim} is odd with position='rotary'",
            "rotary turns pairs of features: use an even head_dim",
        )
        require(
            max_positions is None or (position == "relative" and max_positions > 0),
            self._name,
            f"max_positions {max_positions} with position={position!r}",
            "give a positive number, with position='relative'",
        )
        self.dim, self.causal, self.window, self.head_dim = dim, causal, window, head_dim
        self.temperature, self.normalizer, self.position = temperature, normalizer, position
        self.norm_first, self.dropout = norm_first, dropout
        factory = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(dim, **factory)
        self.average = DampedEMA(dim, size=EMA_SIZE, causal=causal, **factory)
        self.configurator = nn.Linear(dim, 2, **factory)
        self.log_temperature = nn.Parameter(torch.empty(1, **factory))
        self.skip = nn.Linear(dim, dim, **factory)
        self.unit = nn.Linear(dim, head_dim + 4 * dim, **factory)
        self.gain = nn.Parameter(torch.empty(2, head_dim, **factory))
        self.shift = nn.Parameter(torch.empty(2, head_dim, **factory))
        self.output = nn.Linear(2 * dim, dim, **factory)
        if position != "rotary":
            reach = window if position == "local" else (max_positions or MAX_POSITIONS) - 1
            self.relative = nn.Parameter(torch.empty(2 * reach + 1, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal values of 0.02 cut off at 2σ, zero biases and shifts."""
        layers = (self.configurator, self.skip, self.unit, self.output)
        biases = () if self.position == "rotary" else (self.relative,)
        for parameter in (*(layer.weight for layer in layers), self.gain, *biases):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        for parameter in (*(layer.bias for layer in layers), self.shift):
            nn.init.zeros_(parameter)
        nn.init.constant_(self.log_temperature, math.log(self.temperature * self.dim**0.5))
        self.norm.reset_parameters()
        self.average.reset_parameters()

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Average, choose, attend and add. `mask` may be `Padding`."""
        self.check_tokens(x, None, mask, None, takes_positions=False)
        self.check_width(x, self.dim)
        real = None
        if isinstance(mask, Padding):
            mask.validate(x.shape[0], 1, x.shape[1], x.shape[1])
            real = mask.real(x.shape[1]).to(x.device)
        return self._layer(x, real, None)[0]

    def init_state(self, batch: int) -> SeqBoatState:
        """The state before the first token: an average of nothing and an empty working memory."""
        weight = self.unit.weight
        nothing = torch.zeros(batch, self.window, dtype=torch.long, device=weight.device)
        memory = WorkingMemory(
            weight.new_zeros(batch, 1, self.window, self.head_dim),
            weight.new_zeros(batch, 1, self.window, 2 * self.dim),
            nothing,
            nothing[:, 0].clone(),
        )
        return SeqBoatState(self.average.init_state(batch), memory, 0)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: SeqBoatState
    ) -> tuple[Float[Tensor, "batch new dim"], SeqBoatState]:
        """The outputs of one or more further tokens, and the state after them."""
        self.check_step(x, self.dim, state.average.shape[0])
        out, state_after = self._layer(x, None, state)
        assert state_after is not None
        return out, state_after

    def choose(
        self, averaged: Float[Tensor, "batch length dim"], real: Bool[Tensor, "batch length"] | None = None
    ) -> tuple[Bool[Tensor, "batch length"], Float[Tensor, "batch length"]]:
        """Which tokens are activated, and the confidence in that; `real` ones are no padding."""
        preference = self.configurator(averaged).to(statistics_dtype(averaged.dtype))
        lead = preference[..., 1] - preference[..., 0]
        confidence = (lead / self.log_temperature.to(lead.dtype).exp()).sigmoid()
        active = lead > 0 if real is None else (lead > 0) & real
        return active, confidence.to(averaged.dtype)

    def attend(
        self,
        tokens: Float[Tensor, "batch slots dim"],
        places: Int[Tensor, "batch slots"],
        count: Int[Tensor, " batch"],
        memory: WorkingMemory | None,
    ) -> tuple[Float[Tensor, "batch slots dim"], WorkingMemory | None]:
        """The gated attention unit over the first `count` tokens, which follow those in `memory`, if there is one."""
        widths = (self.head_dim, 2 * self.dim, 2 * self.dim)
        shared, gate, value = F.silu(self.unit(tokens)).unsqueeze(1).split(widths, dim=-1)
        query, key = (shared * gain + shift for gain, shift in zip(self.gain, self.shift, strict=True))
        if self.position == "rotary":
            query, key = (rotary(part, places, layout="interleaved") for part in (query, key))
        # Under autocast a projection is half, and not what was multiplied or remembered.
        dtype = value.dtype if memory is None else memory.value.dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        near = Window(self.window, 0 if self.causal else self.window)
        known = Padding(count)
        if memory is not None:
            key, value = torch.cat([memory.key, key], dim=2), torch.cat([memory.value, value], dim=2)
            places = torch.cat([memory.places, places], dim=1)
            slot = torch.arange(-self.window, tokens.shape[1], device=tokens.device)
            known = Keys((slot >= -memory.filled.unsqueeze(1)) & (slot < count.unsqueeze(1)))
            memory = self._remembered(key, value, places, memory.filled, count)
        squares = self.normalizer == "relu2"
        reach = self.window if self.causal else 2 * self.window
        mixed = attention(
            query,
            key,
            value,
            mask=near & known,
            bias=self._bias(places),
            normalizer=SquaredRelu() if squares else "softmax",
            scale=1 / reach if squares else self.head_dim**-0.5,
        )
        return self.output((mixed * gate).squeeze(1)), memory

    def _layer(self, x: Tensor, real: Tensor | None, state: SeqBoatState | None) -> tuple[Tensor, SeqBoatState | None]:
        source = self.norm(x) if self.norm_first else x
        if real is not None:
            # A transform would spread the roundoff of padding.
            source = source.masked_fill(~real.unsqueeze(-1), 0.0)
        averaged, average = self.average(source, None if state is None else state.average)
        averaged = F.dropout(F.silu(averaged), self.dropout, self.training)
        active, confidence = self.choose(averaged, real)
        count = active.sum(1)
        slots = x.shape[1] if torch.compiler.is_compiling() else max(1, int(count.max()))
        places = (~active).to(torch.uint8).argsort(dim=1, stable=True)[:, :slots]
        index = places.unsqueeze(-1).expand(-1, -1, self.dim)
        seen = 0 if state is None else state.seen
        mixed, memory = self.attend(averaged.gather(1, index), places + seen, count, state and state.memory)
        added = torch.zeros_like(averaged).scatter(1, index, mixed.to(averaged.dtype)) * (
            confidence * active
        ).unsqueeze(-1)
        if self.causal:
            added = F.dropout(self.skip(averaged) + added, self.dropout, self.training)
        else:
            added = self.skip(averaged) + F.dropout(added, self.dropout, self.training)
        out = F.silu(added + x)
        if not self.norm_first:
            out = self.norm(out)
        if average is None or memory is None:
            return out, None
        return out, SeqBoatState(average, memory, seen + x.shape[1])

    def _remembered(self, key: Tensor, value: Tensor, places: Tensor, filled: Tensor, count: Tensor) -> WorkingMemory:
        """The last `window` known tokens of each sample."""
        last = count.unsqueeze(1) + torch.arange(self.window, device=count.device)
        key, value = (
            part.gather(2, last[:, None, :, None].expand(-1, -1, -1, part.shape[-1])) for part in (key, value)
        )
        return WorkingMemory(key, value, places.gather(1, last), (filled + count).clamp(max=self.window))

    def _bias(self, places: Int[Tensor, "batch keys"]) -> Bias | None:
        if self.position == "relative":
            return PlacedBias(self.relative, places)
        return RelativeBias(self.relative.unsqueeze(0), self.window) if self.position == "local" else None
