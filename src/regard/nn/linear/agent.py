"""Agent attention. "Agent Attention: On the Integration of Softmax and Linear Attention", Han et al., 2023, arXiv
2312.08874.

    A   = pool(Q)                                           n agents, averages of the queries in n bins of the grid
    V_A = softmax(A Kᵀ / √d_h + B₁) V                       agents gather from all tokens
    O   = softmax(Q Aᵀ / √d_h + B₂) V_A                     tokens ask the agents
    y   = (O + DWC(V)) W^O                                  DWC: depthwise convolution, 3 wide on every axis

This is linear attention, O = φ_q(Q) φ_k(K)ᵀ V with φ_q(Q) = softmax(Q Aᵀ + B₂) and φ_k(K) = softmax(A Kᵀ + B₁)ᵀ, whose
feature maps look at all queries. B₁ and B₂ have a value per head, agent and position: the sum of a block of 7 per axis
and of one table of `window` entries for each axis, all stretched linearly to the size of the grid. A class token stands
beside the grid: it is in no pool and not convolved, and has one bias of its own per head and agent in B₁ and in B₂.

Cost: time O(N n d), memory O(N d + N n h).

Differences: none for grids (`agent_2d`). Over plain tokens (`agent`), which the paper does not have, bins, biases and
convolution run along their one axis, and padding is in none of them. The authors' Stable Diffusion variant, which
changes a trained model without training it (agents from merged tokens, V in place of the convolution, no bias), and
PVT's reduced keys are not here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.laid_out import LaidOut, OverImage, OverTokens
from regard.nn.mechanism import head_width
from regard.ops.attention import attention, attention_weights
from regard.ops.biases import Bias, TableBias
from regard.ops.checks import require
from regard.ops.masks import Padding
from regard.ops.precision import statistics_dtype

BLOCK = 7
"""Entries per axis of the coarse bias."""


class AgentBias(nn.Module):
    """B₁, and B₂ transposed: tables that are stretched over the grid, and a value for the class token."""

    def __init__(
        self, heads: int, agents: int, window: tuple[int, ...], *, class_token: bool, factory: dict[str, object]
    ) -> None:
        super().__init__()
        axes = len(window)
        shapes = [(BLOCK,) * axes, *((1,) * axis + (window[axis],) + (1,) * (axes - axis - 1) for axis in range(axes))]
        self.tables = nn.ParameterList(torch.empty(heads, agents, *shape, **factory) for shape in shapes)  # pyright: ignore[reportArgumentType]
        self.class_token = nn.Parameter(torch.empty(heads, agents, 1, **factory)) if class_token else None  # pyright: ignore[reportArgumentType]
        for table in self.parameters():
            nn.init.trunc_normal_(table, std=0.02)

    def forward(
        self, grid: tuple[int, ...], lengths: Tensor | None
    ) -> Float[Tensor, "batch_or_1 heads agents class_and_grid"]:
        stretched = [self._stretch(table, grid, lengths) for table in self.tables]
        bias = torch.stack(torch.broadcast_tensors(*stretched)).sum(0).flatten(3)
        if self.class_token is None:
            return bias
        return torch.cat([self.class_token.to(bias.dtype).expand(bias.shape[0], -1, -1, -1), bias], dim=-1)

    def _stretch(self, table: Tensor, grid: tuple[int, ...], lengths: Tensor | None) -> Tensor:
        table = table.to(statistics_dtype(table.dtype))[None]
        for axis, size in enumerate(grid, start=3):
            entries = table.shape[axis]
            if entries > 1:
                weights = stretching(size, entries, lengths, like=table)
                table = (table.movedim(axis, -1) @ along(weights, grid).mT).movedim(-1, axis)
        return table


class AgentMechanism(LaidOut):
    """Agents, biases and convolution over a grid of `axes` axes."""

    axes: ClassVar[int]

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        agents: int = 49,
        window: int | tuple[int, ...] = 14,
        class_token: bool = False,
        agent_bias: bool = True,
        convolution: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, head_width(self._name, dim, heads, None)
        self.agents, self.class_token, self.dropout = agents, class_token, dropout
        side = round(max(agents, 0) ** (1 / self.axes))
        self.pools = (side,) * self.axes
        require(
            agents > 0 and side**self.axes == agents,
            self._name,
            f"agents {agents} for {self.axes} axes",
            "give a positive number, which on a grid is a square",
        )
        sizes = (window,) * self.axes if isinstance(window, int) else tuple(window)
        require(
            len(sizes) == self.axes and all(size > 0 for size in sizes),
            self._name,
            f"window {window} for {self.axes} axes",
            "give a positive size, or one per axis",
        )
        require(0.0 <= dropout < 1.0, self._name, f"dropout {dropout}", "give a probability in [0, 1)")
        factory = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias, **factory)
        self.output = nn.Linear(dim, dim, **factory)
        self.gather_bias = self.ask_bias = self.convolution = None
        if agent_bias:
            self.gather_bias = AgentBias(heads, agents, sizes, class_token=class_token, factory=factory)
            self.ask_bias = AgentBias(heads, agents, sizes, class_token=class_token, factory=factory)
        if convolution:
            kind = (nn.Conv1d, nn.Conv2d)[self.axes - 1]
            self.convolution = kind(dim, dim, 3, padding=1, groups=dim, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation: truncated normal of standard deviation 0.02, zero biases."""
        for projection in (self.qkv, self.output):
            nn.init.trunc_normal_(projection.weight, std=0.02)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def combine(self, mixed: Float[Tensor, "batch heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        """Concatenate the heads and project."""
        return self.output(rearrange(mixed, "batch heads length width -> batch length (heads width)"))

    def feature_maps(
        self, x: Float[Tensor, "batch length dim"], grid: tuple[int, ...], mask: Padding | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """φ_q(Q) and φ_k(K), (batch, heads, length, agents), and the values: linear attention of them is O."""
        query, key, value, agents, gather_bias, ask_bias = self._prepare(x, grid, mask)
        gather = attention_weights(agents, key, mask=mask, bias=gather_bias)
        return attention_weights(query, agents, bias=ask_bias), gather.mT, value

    def attend(self, x: Tensor, grid: tuple[int, ...], mask: Padding | None) -> Tensor:
        """Attention of the flattened grid, with the class token before it if there is one, to itself."""
        query, key, value, agents, gather_bias, ask_bias = self._prepare(x, grid, mask)
        dropout = self.dropout if self.training else 0.0
        # The bias is as large as the scores: an engine that does not build those would save nothing.
        backend = "auto" if gather_bias is None else "fused" if dropout == 0 else "reference"
        gathered = attention(agents, key, value, mask=mask, bias=gather_bias, dropout=dropout, backend=backend)
        mixed = attention(query, agents, gathered, bias=ask_bias, dropout=dropout, backend=backend)
        if self.convolution is not None:
            mixed = mixed + self._convolved(value, grid, mask)
        return self.combine(mixed)

    def _prepare(
        self, x: Tensor, grid: tuple[int, ...], mask: Padding | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Bias | None, Bias | None]:
        """Query, key and value heads, agents, B₁ and B₂."""
        heads = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        lengths = None
        if mask is not None:
            batch, length = x.shape[:2]
            mask.validate(batch, self.heads, length, length)
            lengths = (mask.real(length).sum(-1) - int(self.class_token)).clamp(min=0).to(x.device)
        agents = self._pool(query[:, :, self.class_token :], grid, lengths)
        if self.gather_bias is None or self.ask_bias is None:
            return query, key, value, agents, None, None
        gather_bias, ask_bias = self.gather_bias(grid, lengths), self.ask_bias(grid, lengths)
        return query, key, value, agents, TableBias(gather_bias), TableBias(ask_bias.mT)

    def _pool(self, query: Tensor, grid: tuple[int, ...], lengths: Tensor | None) -> Tensor:
        """Averages over bins of the grid, as adaptive average pooling cuts them."""
        pooled = query.unflatten(2, grid).to(statistics_dtype(query.dtype))
        for axis, (size, count) in enumerate(zip(grid, self.pools, strict=True), start=2):
            weights = along(averaging(size, count, lengths, like=pooled), grid)
            pooled = (weights @ pooled.movedim(axis, -2)).movedim(-2, axis)
        return pooled.flatten(2, -2).to(query.dtype)

    def _convolved(self, value: Tensor, grid: tuple[int, ...], mask: Padding | None) -> Tensor:
        """DWC(V) in heads, zero at the class token; what is padding counts as zeros."""
        assert self.convolution is not None
        if mask is not None:
            value = value.masked_fill(~mask.real(value.shape[2]).to(value.device)[:, None, :, None], 0.0)
        field = value[:, :, self.class_token :].mT.flatten(1, 2).unflatten(2, grid)
        # Beside a class token there may be nothing else, which a convolution refuses.
        convolved = self.convolution(field) if field.numel() else field
        heads = convolved.flatten(2).unflatten(1, (self.heads, self.head_dim)).mT
        return F.pad(heads, (0, 0, int(self.class_token), 0))


@register(
    "agent",
    paper="agent",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self",),
        time="n*agents*d + n*d*d",
        memory="n*d + n*agents*h",
        padding=True,
        options=(
            OptionSet({"agents": 5, "class_token": True, "window": 9}),
            OptionSet({"agents": 8, "agent_bias": False, "convolution": False, "bias": False}, {"attention_map": True}),
            OptionSet({"convolution": False, "class_token": True}, {"attention_map": True}),
        ),
    ),
)
class AgentAttention(AgentMechanism, OverTokens):
    """Softmax attention from tokens to a few pooled agents, and from the agents to tokens.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        agents: number of agents.
        window: length that the finer part of the agent bias is stored for; others stretch it.
        class_token: whether the first token is a class token.
        agent_bias: whether scores have the biases B₁ and B₂.
        convolution: whether convolved values are added.
        bias: whether queries, keys and values have biases.
        dropout: probability of dropping an attention weight in training.
    """

    axes: ClassVar[int] = 1

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch heads length length"], Float[Tensor, "batch heads length head_dim"]]:
        """The map φ_q(Q) φ_k(K)ᵀ and the values: ``combine(weights @ value)`` is the output.

        This one is n × n. Raises ValueError with ``convolution=True``, which adds what no map mixes.
        """
        self.check_tokens(x, context, mask, positions, takes_positions=False)
        self.check_width(x, self.dim)
        require(
            self.convolution is None,
            self._name,
            "attention_map with convolution=True, which adds to what the map mixes",
            "build with convolution=False",
        )
        ask, gather, value = self.feature_maps(x, (x.shape[1] - self.class_token,), mask)
        return (ask @ gather.mT).to(value.dtype), value


@register(
    "agent_2d",
    paper="agent",
    contract=Contract(
        input="grid",
        patterns=("noncausal self",),
        time="n*agents*d + n*d*d",
        memory="n*d + n*agents*h",
        grid_dims=(2,),
        options=(
            OptionSet({"agents": 4, "window": (5, 3), "bias": False}),
            OptionSet({"agents": 9, "agent_bias": False, "convolution": False}),
        ),
    ),
)
class AgentAttention2d(AgentMechanism, OverImage):
    """Agent attention over an image: agents, biases and convolution follow its two axes.

    Args are those of `AgentAttention`; `agents` is a square, `window` may have a size per axis.
    """

    axes: ClassVar[int] = 2


def averaging(size: int, count: int, lengths: Tensor | None, *, like: Tensor) -> Float[Tensor, "batch_or_1 count size"]:
    """Weights of adaptive average pooling from `size` positions, or as many of them as `lengths` says, to `count`."""
    bins = torch.arange(count, device=like.device)[:, None]
    length = torch.full_like(bins, size) if lengths is None else lengths[:, None, None]
    start, end = bins * length // count, -(-(bins + 1) * length // count)
    position = torch.arange(size, device=like.device)
    inside = ((position >= start) & (position < end)).to(like.dtype)
    weights = inside / (end - start).clamp(min=1)
    return weights[None] if lengths is None else weights


def stretching(
    size: int, entries: int, lengths: Tensor | None, *, like: Tensor
) -> Float[Tensor, "batch_or_1 size entries"]:
    """Weights of linear interpolation from `entries` to `size` positions, or as many as `lengths` says, edges held."""
    position = torch.arange(size, device=like.device, dtype=like.dtype)[:, None] + 0.5
    length = max(size, 1) if lengths is None else lengths[:, None, None].clamp(min=1)
    source = (position * entries / length - 0.5).clamp(0, entries - 1)
    distance = (source - torch.arange(entries, device=like.device)).abs()
    weights = (1 - distance).clamp(min=0)
    return weights[None] if lengths is None else weights


def along(weights: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A matrix per sample with the axes that stand between it and the samples."""
    return weights.reshape(weights.shape[0], *(1,) * len(grid), *weights.shape[-2:])
