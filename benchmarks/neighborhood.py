"""Neighborhood attention against natten's own CPU path and against windows gathered or unfolded for every query."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version

import natten
import torch
from natten.backends import choose_backend
from torch import Tensor

from harness import Row, gemm_limit, report, threads_argument, times
from regard.ops import _neighborhood_tiles as tiles
from regard.ops.neighborhood import attends, neighborhood_attention

HEADS, DIM = 4, 32
Grid = tuple[int, ...]
Options = dict[str, tuple[int, ...]]


def options(grid: Grid, kernel_size: int | Grid, dilation: int = 1, stride: int = 1) -> Options:
    sizes = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,) * len(grid)
    return {"kernel_size": sizes, "dilation": (dilation,) * len(grid), "stride": (stride,) * len(grid)}


def draw(grid: Grid) -> list[Tensor]:
    return [torch.randn(1, HEADS, *grid, DIM, requires_grad=True) for _ in range(3)]


def window_index(length: int, kernel_size: int, dilation: int, stride: int) -> Tensor:
    """(length, kernel_size): the keys every query of an axis sees."""
    index = torch.arange(length)
    seen = attends(index[:, None], index, length, kernel_size, dilation, stride, False)
    return seen.nonzero()[:, 1].view(length, kernel_size)


def grid_index(grid: Grid, chosen: Options) -> Tensor:
    """(queries, keys seen) as indices of the flattened grid."""
    index = torch.zeros(1, 1, dtype=torch.long)
    for length, *axis in zip(grid, *chosen.values(), strict=True):
        index = (index[:, None, :, None] * length + window_index(length, *axis)[:, None]).flatten(2).flatten(0, 1)
    return index


def gathered(query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> Tensor:
    """Copies the window of every query, then two products and a softmax per query."""
    windows = (x.flatten(2, -2)[:, :, index] for x in (key, value))
    keys, values = windows
    weights = torch.einsum("bhnd,bhnkd->bhnk", query.flatten(2, -2) * DIM**-0.5, keys).softmax(-1)
    return torch.einsum("bhnk,bhnkd->bhnd", weights, values).view_as(query)


def unfolded(query: Tensor, key: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """The same on a square with `Tensor.unfold`, whose windows are then shifted at the border."""
    start = (torch.arange(query.shape[2]) - kernel_size // 2).clamp(0, query.shape[2] - kernel_size)
    views = (x.unfold(2, kernel_size, 1).unfold(3, kernel_size, 1) for x in (key, value))
    keys, values = (view[:, :, start][:, :, :, start].flatten(-2) for view in views)
    weights = torch.einsum("bhijd,bhijdk->bhijk", query * DIM**-0.5, keys).softmax(-1)
    return torch.einsum("bhijk,bhijdk->bhijd", weights, values)


def of_natten(query: Tensor, key: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Inputs in natten's layout: (batch, *grid, heads, dim)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = natten.na2d(query, key, value, kernel_size=kernel_size)
    assert isinstance(out, Tensor)
    return out


def forward(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor]:
    with torch.no_grad():
        return (function(*inputs),)


def both(function: Callable[..., Tensor], inputs: list[Tensor], direction: Tensor) -> tuple[Tensor, ...]:
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, direction)


def verify(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        error = float((one - other).detach().norm() / other.detach().norm())
        if error > 1e-5:
            raise SystemExit(f"ours and the peer differ: relative error {error:.1e}; nothing to report")


def compare(
    ours: Callable[[], object], peers: Mapping[str, Callable[[], object]], repeats: int
) -> tuple[float, float, str]:
    """Our seconds, and those and the name of the fastest peer.

    A peer streams hundreds of megabytes to gigabytes, so our first call after it starts with every cache cold; a sample
    of ours is therefore ten calls.
    """

    def ten() -> None:
        for _ in range(10):
            ours()

    seconds, *theirs = times(ten, *peers.values(), repeats=repeats)
    return seconds / 10, *min(zip(theirs, peers, strict=True))


def shares(grid: Grid, chosen: Options, seconds: float, backward: bool, limit: float) -> dict[str, float | str]:
    """Shares of the GEMM limit: of the scores the definition needs, and of those computed with the tiles' waste."""
    axes = tuple(map(tiles.Axis, grid, *chosen.values(), (False,) * len(grid)))
    tile = tiles.tile_shape(axes, HEADS, 2 * DIM)
    computed = 0
    for region in tiles.regions(axes, tile, torch.float32, torch.device("cpu")):
        computed += region.mask.numel() * math.prod(run.groups * run.tiles for run in region.runs)
    needed = math.prod(grid) * math.prod(chosen["kernel_size"])
    per_score = HEADS * 2 * DIM * (7 if backward else 2) / seconds / limit
    return {"share needed": needed * per_score, "share computed": computed * per_score, "tile": str(tile)}


def row(
    case: str, grid: Grid, chosen: Options, peers: dict[str, Callable[..., Tensor]], target: float | None, limit: float,
    *, backward: bool,
) -> Row:  # fmt: skip
    """Ours against the fastest of the peers, forward or with the backward."""
    inputs, direction = draw(grid), torch.randn(1, HEADS, *grid, DIM)
    run = partial(both, inputs=inputs, direction=direction) if backward else partial(forward, inputs=inputs)
    ours = partial(run, partial(neighborhood_attention, **chosen))
    calls = {name: partial(run, peer) for name, peer in peers.items()}
    for call in calls.values():
        verify(ours(), call())
    seconds, fastest, peer = compare(ours, calls, repeats=5 if target else 3)
    ratio, detail = fastest / seconds, shares(grid, chosen, seconds, backward, limit)
    wanted = "" if target is None else f">= {target:g}"
    return Row(case, peer, ratio, wanted, target is None or ratio >= target, seconds, fastest, detail)


def against_natten(limit: float) -> Row:
    grid, chosen = (64, 64), options((64, 64), 7)
    inputs = [x.detach() for x in draw(grid)]
    theirs = [x.movedim(1, -2).contiguous() for x in inputs]
    backend = choose_backend(*theirs, torch_compile=False)
    ours = partial(forward, partial(neighborhood_attention, **chosen), inputs)
    peer = partial(forward, partial(of_natten, kernel_size=7), theirs)
    verify(ours(), (peer()[0].movedim(-2, 1),))
    name = f"natten {version('natten')} ({backend}, its default)"
    seconds, slower, _ = compare(ours, {name: peer}, repeats=5)
    ratio, detail = slower / seconds, shares(grid, chosen, seconds, False, limit)
    return Row("2D 64×64, kernel 7, forward", name, ratio, ">= 200", ratio >= 200, seconds, slower, detail)


def against_windows(limit: float) -> list[Row]:
    grid = (64, 64)
    chosen = options(grid, 7)
    gather = partial(gathered, index=grid_index(grid, chosen))
    peers = {"gathered windows": gather, "unfolded windows": partial(unfolded, kernel_size=7)}
    rows = [
        row("2D 64×64, kernel 7, forward", grid, chosen, peers, 12, limit, backward=False),
        row("2D 64×64, kernel 7, forward+backward", grid, chosen, peers, 8, limit, backward=True),
    ]
    others: list[tuple[str, Grid, Options]] = [
        ("2D 64×64, kernel 7, dilation 4", (64, 64), options((64, 64), 7, dilation=4)),
        ("2D 64×64, kernel 7, stride 4", (64, 64), options((64, 64), 7, stride=4)),
        ("3D 8×24×24, kernel 3×7×7", (8, 24, 24), options((8, 24, 24), (3, 7, 7))),
        ("1D 8192, kernel 33", (8192,), options((8192,), 33)),
    ]
    for case, size, given in others:
        peer = {"gathered windows": partial(gathered, index=grid_index(size, given))}
        for backward in (False, True):
            name = f"{case}, forward{'+backward' * backward}"
            rows.append(row(name, size, given, peer, None, limit, backward=backward))
    return rows


if __name__ == "__main__":
    threads_argument()
    torch.manual_seed(0)
    limit = max(gemm_limit() for _ in range(3))
    report("neighborhood", [against_natten(limit), *against_windows(limit)])
