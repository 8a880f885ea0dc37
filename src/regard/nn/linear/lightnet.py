"""LightNet. "You Only Scan Once: Efficient Multi-dimension Sequential Modeling with LightNet", Qin et al., 2024, arXiv
2405.21022.

    g_t = Σ_{s≤t} exp(k_s),   S_t = (g_{t−1} / g_t) S_{t−1} + (exp(k_t) / g_t) v_tᵀ,   o_t = q_t S_t
    y   = (LayerNorm(o) ⊙ sigmoid(x W_u1 W_u2)) W_o                q = SiLU(x W_q),  k = x W_k,  v = x W_v

g is taken for each key feature. A decay that is a quotient of sums makes every feature an average of values with a
softmax of its keys, Σ_{s≤t} softmax_s(k) v_s: it does not matter in which order tokens come, so that without causality
(g over all tokens) one pass over them in any order serves data of any number of axes. Positions come from

    MD-TPE    x ← Σ_a W_a RMSNorm(Σ_{m≤n_a} t^a_{n_a−m} x_{… m …}),  t^a_i = Σ_e c_e b_e λ^i,  λ = exp(−exp(γ_a))
    MD-LRPE   q_sd exp(k_td) becomes q_sd exp(k_td) cos(θ_d (s_a − t_a)), each axis a with its share of the features

MD-TPE is a Toeplitz product along each axis a, before the first layer only (`tpe`); its exponential form is a
recurrence, one λ, b and c per head and axis. θ is learnable and the same for all axes.

Cost: time O(n d² / h + n c d) with chunks of c tokens, memory O(n d); the decoding state is 2 d² / h numbers for LRPE,
and 2 d and a count. Running sums are kept as logarithms and weights taken relative to later sums: nothing overflows.

Differences: the details of both encodings are those of the first author's code: MD-TPE has a norm and a projection per
axis and no residual, and looks back along every axis also where attention does not; MD-LRPE shares θ among axes. There
λ is a sigmoid, and θ fixed and the same for all heads; as in TransNormerLLM it is learnable here. That code's recurrent
layer adds 1 to g, which this does not, and has RMSNorm in place of LayerNorm.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.linear.efficient_attention import softmax_over_positions
from regard.nn.mechanism import Mechanism, head_width
from regard.ops.additive_scan import AdditiveState, additive_scan, additive_scan_both_ways, widened
from regard.ops.checks import require
from regard.ops.linear import linear_attention
from regard.ops.masks import Mask, Padding, Segments
from regard.ops.positions import grid_positions, lrpe, lrpe_angles
from regard.ops.precision import statistics_dtype


class LightNetState(NamedTuple):
    """What a layer keeps while decoding."""

    log_total: Float[Tensor, "batch heads head_dim"]
    """log g."""
    average: Float[Tensor, "batch heads width head_dim"]
    """S, with a cosine and a sine of every key feature where there is LRPE."""
    toeplitz: Float[Tensor, "batch heads 1 head_dim"]
    """The state of TPE; of no heads without it."""
    seen: Int[Tensor, ""]


class MdTpe(nn.Module):
    """Multi-dimensional Toeplitz positional encoding: a causal Toeplitz product along every axis, and their sum.

    Args:
        dim: width of a position.
        heads: number of groups of features with a decay of their own.
        axes: number of axes.
        bias: whether the projections have biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        axes: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.axes = heads, axes
        head_dim, factory = head_width("MdTpe", dim, heads, None), {"device": device, "dtype": dtype}
        self.read = nn.Parameter(torch.ones(axes, heads, head_dim, **factory))
        self.write = nn.Parameter(torch.ones(axes, heads, head_dim, **factory))
        half = math.log(math.log(2))  # λ = 1/2
        self.log_rate = nn.Parameter(torch.full((axes, heads), half, **factory))
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-6, **factory) for _ in range(axes))
        self.outputs = nn.ModuleList(nn.Linear(dim, dim, bias=bias, **factory) for _ in range(axes))

    def forward(
        self, x: Float[Tensor, "batch *grid dim"], *, starts: Bool[Tensor, "#batch length"] | None = None
    ) -> Float[Tensor, "batch *grid dim"]:
        """Encode. Of one axis, `starts` may say where another sequence begins."""
        parts = []
        for axis in range(self.axes):
            lines = x.movedim(axis + 1, -2)
            mixed, _ = self.along(axis, lines.flatten(0, -3), starts=starts)
            parts.append(mixed.view(lines.shape).movedim(-2, axis + 1))
        return torch.stack(parts).sum(0)

    def along(
        self,
        axis: int,
        x: Float[Tensor, "batch length dim"],
        *,
        starts: Tensor | None = None,
        state: Float[Tensor, "batch heads 1 head_dim"] | None = None,
    ) -> tuple[Float[Tensor, "batch length dim"], Float[Tensor, "batch heads 1 head_dim"]]:
        """The part of one axis, and the state after it."""
        value = rearrange(x, "batch length (heads width) -> batch heads length width", heads=self.heads)
        batch, _, length, _ = value.shape
        precise = statistics_dtype(self.log_rate.dtype)
        decay = -self.log_rate[axis].to(precise).exp()
        if starts is not None:
            decay = decay.view(1, -1, 1).masked_fill(starts[:, None], -torch.inf).expand(batch, -1, length)
        # One feature of query and key: longer chunks would be more scores than the values they mix.
        strength = (self.read[axis] * self.write[axis]).sum(-1).view(1, -1, 1, 1).to(value.dtype)
        one = value.new_ones(()).expand(batch, self.heads, length, 1)
        mixed, state = linear_attention(
            strength.expand_as(one), one, value, log_decay=decay, initial_state=state, return_state=True, chunk_size=16
        )
        return self.outputs[axis](self.norms[axis](mixed.transpose(1, 2).flatten(2))), state


class _LightNet(Mechanism):
    """What tokens and grids have in common: all but positions and masks."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        causal: bool,
        axes: int,
        gate_rank: int | None,
        tpe: bool,
        lrpe: bool,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        require(axes in (1, 2, 3), self._name, f"axes {axes}", "give 1, 2 or 3")
        self.dim, self.heads, self.causal, self.axes = dim, heads, causal, axes
        self.head_dim = head_width(self._name, dim, heads, None)
        rank = self.head_dim if gate_rank is None else gate_rank
        require(rank > 0, self._name, f"gate_rank {rank}", "give a positive width")
        factory = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, dim, bias=bias, **factory)
        # Softmax takes off again what a bias adds to all keys.
        self.key = nn.Linear(dim, dim, bias=False, **factory)
        self.value = nn.Linear(dim, dim, bias=bias, **factory)
        self.gate = nn.Sequential(
            nn.Linear(dim, rank, bias=bias, **factory), nn.Linear(rank, dim, bias=bias, **factory)
        )
        self.norm = nn.LayerNorm(dim, **factory)
        self.output = nn.Linear(dim, dim, bias=bias, **factory)
        self.tpe = MdTpe(dim, heads=heads, axes=axes, bias=bias, **factory) if tpe else None
        angles = lrpe_angles(heads, self.head_dim, device=device)[:, : -(-self.head_dim // axes)]
        self.angles = nn.Parameter(angles.to(dtype=dtype).clone()) if lrpe else None

    def _attend(self, x: Tensor, places: Tensor, mask: Mask | None, starts: Tensor | None) -> Tensor:
        query, key, turn, value = self._project(x, places)
        if not self.causal and starts is None:
            weights = softmax_over_positions(key, mask if isinstance(mask, Padding) else None)
            return self._read_out(x, linear_attention(query, widened(weights, turn), value, causal=False))
        if self.causal or starts is None:
            real = mask.real(x.shape[1]).to(x.device) if isinstance(mask, Padding) else None
            mixed, _ = additive_scan(query, key, value, turn=turn, real=real, starts=starts)
        else:
            mixed = additive_scan_both_ways(query, key, value, turn=turn, starts=starts)
        return self._read_out(x, mixed)

    def _project(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Turned queries, logarithms of keys, what turns keys, and values, in heads and at least float32."""
        precise = statistics_dtype(x.dtype)
        query, key, value = (
            rearrange(part.to(precise), "batch length (heads width) -> batch heads length width", heads=self.heads)
            for part in (F.silu(self.query(x)), self.key(x), self.value(x))
        )
        turn = torch.ones_like(key)
        if self.angles is not None:
            query, turn = md_lrpe(query, places, self.angles), md_lrpe(turn, places, self.angles)
        return query, key, turn, value

    def _read_out(self, x: Tensor, mixed: Tensor) -> Tensor:
        mixed = rearrange(mixed, "batch heads length width -> batch length (heads width)").to(x.dtype)
        return self.output(self.norm(mixed) * self.gate(x).sigmoid())


@register(
    "lightnet",
    paper="lightnet",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self", "causal self"),
        time="n*d*d/h + n*d*d",
        memory="n*d",
        padding=True,
        packed=True,
        step=True,
        state="constant",
        options=(
            OptionSet({"tpe": False, "lrpe": False, "bias": True}, {"permutation": "equivariant"}),
            OptionSet({"tpe": False, "gate_rank": 3}),
            OptionSet({"lrpe": False, "bias": True}),
        ),
    ),
)
class LightNetAttention(_LightNet):
    """Linear attention whose decay is a quotient of sums, which makes every key feature a softmax over tokens.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        causal: whether a token sees only those up to it.
        gate_rank: width between the two projections of the output gate; ``dim / heads`` by default.
        tpe: whether MD-TPE stands before the layer: for the first layer of a network.
        lrpe: whether queries and keys are turned by learnable angles.
        bias: whether the projections have biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        gate_rank: int | None = None,
        tpe: bool = True,
        lrpe: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            causal=causal,
            axes=1,
            gate_rank=gate_rank,
            tpe=tpe,
            lrpe=lrpe,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Attend. `mask` may be `Padding`, or `Segments` whose tokens stand together."""
        self.check_tokens(x, None, mask, None, takes_positions=False)
        self.check_width(x, self.dim)
        batch, length, _ = x.shape
        starts, places = None, torch.arange(length, device=x.device)
        if mask is not None:
            mask.validate(batch, self.heads, length, length)
        if isinstance(mask, Segments):
            starts, places = mask.starts().view(-1, length).to(x.device), mask.places().to(x.device)
        x = x if self.tpe is None else self.tpe(x, starts=starts)
        return self._attend(x, places.unsqueeze(-1), mask, starts)

    def init_state(self, batch: int) -> LightNetState:
        """The state before the first token: no sums yet. At least float32."""
        weight = self.key.weight
        dtype = statistics_dtype(weight.dtype)
        copies = 1 if self.angles is None else 2
        sums = AdditiveState.empty(
            batch, self.heads, self.head_dim, self.head_dim, copies=copies, device=weight.device, dtype=dtype
        )
        toeplitz = sums.average.new_zeros(batch, 0 if self.tpe is None else self.heads, 1, self.head_dim)
        return LightNetState(*sums, toeplitz, torch.zeros((), dtype=torch.int64, device=weight.device))

    def step(
        self, x: Float[Tensor, "batch new dim"], state: LightNetState
    ) -> tuple[Float[Tensor, "batch new dim"], LightNetState]:
        """The outputs of one or more further tokens, and the state after them."""
        self.check_step(x, self.dim, state.average.shape[0])
        places, toeplitz = state.seen + torch.arange(x.shape[1], device=x.device), state.toeplitz
        if self.tpe is not None:
            x, toeplitz = self.tpe.along(0, x, state=toeplitz)
        query, key, turn, value = self._project(x, places.unsqueeze(-1))
        before = AdditiveState(state.log_total, state.average)
        mixed, sums = additive_scan(query, key, value, turn=turn, initial_state=before)
        return self._read_out(x, mixed), LightNetState(*sums, toeplitz, state.seen + x.shape[1])


@register(
    "lightnet_grid",
    paper="lightnet",
    contract=Contract(
        input="grid",
        patterns=("noncausal self", "causal self"),
        time="n*d*d/h + n*d*d",
        memory="n*d",
        grid_dims=(2,),
        options=(
            OptionSet({"tpe": False, "gate_rank": 3}),
            OptionSet({"lrpe": False, "bias": True}),
            OptionSet({"axes": 1}, {"grid_dims": (1,)}),
            OptionSet({"axes": 3}, {"grid_dims": (3,)}),
        ),
    ),
)
class LightNetGridAttention(_LightNet):
    """LightNet attention over grids: one pass in any order, with positions along every axis.

    Args:
        dim: width of a position.
        heads: number of heads.
        causal: whether a position sees only those up to it in row-major order.
        axes: number of axes of the grid, 1 to 3.
        gate_rank: width between the two projections of the output gate; ``dim / heads`` by default.
        tpe: whether MD-TPE stands before the layer: for the first layer of a network.
        lrpe: whether queries and keys are turned by learnable angles.
        bias: whether the projections have biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        axes: int = 2,
        gate_rank: int | None = None,
        tpe: bool = True,
        lrpe: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            causal=causal,
            axes=axes,
            gate_rank=gate_rank,
            tpe=tpe,
            lrpe=lrpe,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Float[Tensor, "batch *grid dim"]) -> Float[Tensor, "batch *grid dim"]:
        """Attend over the whole grid."""
        self.check_shape(x, f"(batch, {self.axes} grid axes, dim)", self.axes + 2)
        self.check_width(x, self.dim)
        encoded = x if self.tpe is None else self.tpe(x)
        places = grid_positions(*x.shape[1:-1], device=x.device)
        return self._attend(encoded.flatten(1, -2), places, None, None).view(x.shape)


def md_lrpe(
    x: Float[Tensor, "batch heads length head_dim"],
    places: Int[Tensor, "*batch length axes"],
    angles: Float[Tensor, "heads share"],
) -> Float[Tensor, "batch heads length doubled"]:
    """`lrpe` with every axis turning its share of the features by the same angles: all cosines, then all sines."""
    shares = x.tensor_split(places.shape[-1], dim=-1)
    turned = [
        lrpe(share, places[..., axis], angles[:, : share.shape[-1]]).chunk(2, dim=-1)
        for axis, share in enumerate(shares)
    ]
    return torch.cat([part for parts in zip(*turned, strict=True) for part in parts], dim=-1)
