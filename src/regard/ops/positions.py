"""Positions: rotary embedding of queries and keys in one or several dimensions, its learnable form for linear
attention, and sinusoidal embedding of inputs."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.ops.checks import one_of, require
from regard.ops.precision import statistics_dtype

Layout = Literal["half", "interleaved"]


def rotary(
    x: Float[Tensor, "batch heads length head_dim"],
    positions: Int[Tensor, ...],
    *,
    axes: int = 1,
    rotary_dim: int | None = None,
    base: float = 10000.0,
    layout: Layout = "half",
) -> Float[Tensor, "batch heads length head_dim"]:
    """Rotate pairs of features by angles proportional to position, so that ``q_i · k_j`` depends on i − j only.

    Pair p of the features of one axis turns by ``position · base^(−2p / features)``. From "RoFormer: Enhanced
    Transformer with Rotary Position Embedding", 2021, arXiv 2104.09864.

    Args:
        x: queries or keys.
        positions: (N,) or (B, N) for one axis; (N, axes) or (B, N, axes) for several, each of which turns its own equal
            share of the features (see `grid_positions`).
        axes: number of axes, 1 to 3.
        rotary_dim: how many leading features turn; the rest passes unchanged. All by default.
        base: the wavelengths run from 2π to ``2π · base``.
        layout: ``"half"`` pairs feature p with p + half (GPT-NeoX, Llama), ``"interleaved"`` 2p with 2p + 1 (RoFormer).

    Angles are computed in at least float32. Raises ValueError for a `rotary_dim` that is not an even number of features
    per axis, or positions of another shape.
    """
    one_of("rotary", "layout", layout, ("half", "interleaved"))
    require(axes in (1, 2, 3), "rotary", f"axes {axes}", "give 1, 2 or 3")
    batch, _, length, head_dim = x.shape
    turned = head_dim if rotary_dim is None else rotary_dim
    require(
        0 < turned <= head_dim and turned % (2 * axes) == 0,
        "rotary",
        f"rotary_dim {turned} of head_dim {head_dim} for {axes} axes",
        f"give a multiple of {2 * axes} no larger than head_dim",
    )
    shape = (length,) if axes == 1 else (length, axes)
    require(
        tuple(positions.shape) in (shape, (batch, *shape)),
        "rotary",
        f"positions of shape {tuple(positions.shape)}",
        f"give {shape} or {(batch, *shape)}",
    )
    dtype = statistics_dtype(x.dtype)
    places = positions[..., None] if axes == 1 else positions
    angles = places.to(dtype)[..., None] * _frequencies(turned // axes, base, dtype, x.device)
    angles = angles.unsqueeze(1) if angles.ndim == 4 else angles  # the head axis, when there is a batch axis
    parts = [
        _turn(part.to(dtype), angles[..., axis, :].cos(), angles[..., axis, :].sin(), layout)
        for axis, part in enumerate(x[..., :turned].chunk(axes, dim=-1))
    ]
    return torch.cat([*(part.to(x.dtype) for part in parts), x[..., turned:]], dim=-1)


def lrpe(
    x: Float[Tensor, "batch heads length head_dim"],
    positions: Int[Tensor, ...],
    angles: Float[Tensor, "heads head_dim"],
) -> Float[Tensor, "batch heads length doubled"]:
    """Every feature of queries and keys as a vector of two, turned by its own learnable angle: ``q_s · k_t`` becomes
    ``Σ_d q_sd k_td cos(angles_d (s − t))``.

    The linearised relative positional encoding of "Scaling TransNormer to 175 Billion Parameters", 2023, arXiv
    2307.14995. As a map of queries and of keys alone it goes before `linear_attention`, whose ``log_decay`` adds the
    decay of LRPE-d (`layer_decay`). The result is twice as wide as `x`, in its type; angles are computed in at least
    float32. `positions` are (N,) or (B, N). `lrpe_angles` gives the angles training starts from.
    """
    batch, heads, length, head_dim = x.shape
    require(
        tuple(angles.shape) == (heads, head_dim),
        "lrpe",
        lambda: f"angles of shape {tuple(angles.shape)} for x of shape {tuple(x.shape)}",
        lambda: f"give {(heads, head_dim)}",
    )
    require(
        tuple(positions.shape) in ((length,), (batch, length)),
        "lrpe",
        lambda: f"positions of shape {tuple(positions.shape)}",
        lambda: f"give {(length,)} or {(batch, length)}",
    )
    dtype = statistics_dtype(x.dtype)
    places = positions.to(dtype)[..., None] if positions.ndim == 1 else positions.to(dtype)[:, None, :, None]
    turns = places * angles.to(dtype)[:, None, :]
    return torch.cat([x.to(dtype) * turns.cos(), x.to(dtype) * turns.sin()], dim=-1).to(x.dtype)


def lrpe_angles(
    heads: int, head_dim: int, *, base: float = 10000.0, device: torch.device | str | None = None
) -> Float[Tensor, "heads head_dim"]:
    """``base^(−2 i / (heads · head_dim))`` for the i-th feature of all heads, the fastest in the first head."""
    features = heads * head_dim
    exponents = torch.arange(features, dtype=torch.float64, device=device) * (-2 / features)
    return (base**exponents).view(heads, head_dim).to(torch.float32)


def layer_decay(
    heads: int, layer: int = 0, layers: int = 1, *, device: torch.device | str | None = None
) -> Float[Tensor, " heads"]:
    """Log-decays of LRPE-d, ``−(8 h / heads) (1 − layer / layers)`` for h = 1 … heads: later layers see further.

    The paper does not say where h and `layer` begin; its authors' code, whose slopes are others, counts them so.
    """
    require(heads > 0, "layer_decay", f"heads {heads}", "give a positive number")
    require(0 <= layer < layers, "layer_decay", f"layer {layer} of {layers}", "count from 0 to layers − 1")
    head = torch.arange(1, heads + 1, dtype=torch.float32, device=device)
    return head * (-8 / heads * (1 - layer / layers))


def sinusoidal(positions: Int[Tensor, "*shape"], dim: int, *, base: float = 10000.0) -> Float[Tensor, "*shape dim"]:
    """``sin`` and ``cos`` of ``position · base^(−2p / dim)`` in turn.

    From "Attention Is All You Need", 2017, arXiv 1706.03762. Float32, to be added to embeddings. Raises ValueError for
    an odd `dim`.
    """
    require(dim > 0 and dim % 2 == 0, "sinusoidal", f"dim {dim}", "give a positive even number")
    angles = positions.to(torch.float32)[..., None] * _frequencies(dim, base, torch.float32, positions.device)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def grid_positions(*grid: int, device: torch.device | None = None) -> Int[Tensor, "length axes"]:
    """Coordinates of a grid flattened in row-major order, as `rotary` wants them for several axes."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in grid)).view(-1, len(grid))


def _frequencies(dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return base ** (-torch.arange(0, dim, 2, dtype=dtype, device=device) / dim)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
    if layout == "half":
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
