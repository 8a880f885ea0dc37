"""How neighborhood attention cuts a grid into tiles of queries, each with one box of keys.

Along an axis, consecutive queries of a dilation group form a tile; their windows fill one interval of keys,
its box. A `Run` is a stretch of tiles whose windows look alike (border, interior, border), a `Region` a product
of runs, one per axis. All tiles of a region share one small mask and are reached at once through strided views:
nothing is gathered by index, and what is held beside inputs and outputs does not grow with the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, product
from operator import itemgetter

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.ops.indices import hiding

# Fitted to timings on a processor, in multiply-adds: the softmax of one score, copying one number of a box,
# starting the product of one tile with its box, starting the operations of one region.
_SCORE_COST, _COPY_COST, _TILE_COST, _REGION_COST = 24, 16, 80_000, 2_000_000
# Scores held at once: by each thread of a processor, so that they stay in its core's cache, or by another device, where
# few large launches matter more.
_SCORES_PER_THREAD, _SCORES_ON_DEVICE = 2**17, 2**24


def window(
    position: Int[Tensor, "*positions"],
    length: Int[Tensor, "*#positions"],
    kernel_size: int,
    stride: int,
    is_causal: bool,
) -> tuple[Int[Tensor, "*positions"], Int[Tensor, "*positions"]]:
    """First and last position seen from `position` in a dilation group of `length` positions.

    `stride` queries share the window of their leader, the one right of their center or, if causal, the last.
    """
    leader = position // stride * stride + (stride - 1 if is_causal else stride // 2)
    leader = torch.minimum(leader, length - 1)
    if is_causal:
        return (leader - kernel_size + 1).clamp(min=0), position
    first = torch.minimum((leader - kernel_size // 2).clamp(min=0), length - kernel_size)
    return first, first + kernel_size - 1


@dataclass(frozen=True)
class Axis:
    """One axis of the grid and the neighborhood along it."""

    length: int
    kernel_size: int
    dilation: int
    stride: int
    is_causal: bool

    def groups(self) -> list[tuple[int, int, int]]:
        """(first group, how many, their length): positions equal modulo the dilation form a group."""
        length, longer = divmod(self.length, self.dilation)
        groups = [(0, longer, length + 1), (longer, self.dilation - longer, length)]
        return [entry for entry in groups if entry[1] > 0]

    def tile_sizes(self) -> list[int]:
        """Sizes worth considering. Multiples of the stride, so that tiles look alike."""
        longest = math.ceil(self.length / self.dilation)
        sizes = [self.stride]
        while sizes[-1] < longest:
            sizes.append(2 * sizes[-1])
        return sizes

    def estimate(self, size: int) -> tuple[float, int, int, int]:
        """(tiles, queries of a tile, keys of a box, runs), roughly, if cut into tiles of `size`."""
        longest = math.ceil(self.length / self.dilation)
        size = min(size, longest)
        borders = 1 if self.is_causal else 2
        runs = min(math.ceil(longest / size), 1 + borders * math.ceil(self.kernel_size // 2 / size))
        box = min(size + self.kernel_size - self.stride, longest)
        return self.length / size, size, box, runs * len(self.groups())


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive tiles of one axis whose windows look alike, in every dilation group of one length."""

    origin: int
    """Grid index of the first query of the first tile."""
    groups: int
    tiles: int
    dilation: int
    size: int
    """Queries of a tile."""
    first: int
    """First key of a box, counted in dilation steps from the first query of its tile."""
    width: int
    """Keys of a box."""
    visible: Bool[Tensor, "size width"]

    def bias_rows(self, kernel_size: int) -> Int[Tensor, "size width"]:
        """Where the relative bias has (key − query) in dilation steps; anywhere in it if not visible."""
        query = torch.arange(self.size, device=self.visible.device)
        key = torch.arange(self.first, self.first + self.width, device=self.visible.device)
        return (key - query[:, None] + kernel_size - 1).clamp(0, 2 * kernel_size - 2)


@dataclass(frozen=True, eq=False)
class Region:
    """The tiles of one run per axis.

    Views have axes (batch, heads, (groups, tiles) per grid axis, extent per grid axis, features).
    """

    runs: tuple[Run, ...]
    mask: Float[Tensor, "queries keys"]
    """What is added to the scores: −inf outside the neighborhood."""

    def query_tiles(self, x: Float[Tensor, "batch heads *grid features"]) -> Tensor:
        return self._lattice(x, [0] * len(self.runs), [run.size for run in self.runs])

    def key_boxes(self, x: Float[Tensor, "batch heads *grid features"]) -> Tensor:
        return self._lattice(x, [run.first for run in self.runs], [run.width for run in self.runs])

    def box_pieces(self, x: Float[Tensor, "batch heads *grid features"]) -> list[tuple[Tensor, tuple]]:
        """Views that together cover the boxes, each with the part of the box it is.

        Boxes of neighboring tiles overlap. A piece is no wider than a tile, so no number appears twice in one
        view, and adding to it in place is safe and gives the same sum every time.
        """
        pieces = []
        for part in product(*(_cut(run.width, run.size) for run in self.runs)):
            firsts = [run.first + piece.start for run, piece in zip(self.runs, part, strict=True)]
            view = self._lattice(x, firsts, [piece.stop - piece.start for piece in part])
            pieces.append((view, (..., *part, slice(None))))
        return pieces

    def chunks(self, batch: int, heads: int) -> Iterator[tuple[slice, ...]]:
        """Indices into the views, each choosing the tiles whose scores are held at once."""
        on_processor = self.mask.device.type == "cpu"
        at_once = _SCORES_PER_THREAD * torch.get_num_threads() if on_processor else _SCORES_ON_DEVICE
        room = at_once // (heads * self.mask.numel())
        cuts: list[list[slice]] = []
        for extent in reversed([batch, *(extent for run in self.runs for extent in (run.groups, run.tiles))]):
            step = max(1, min(room, extent))
            cuts.append(_cut(extent, step))
            room = room // step if step == extent else 1
        for of_batch, *of_tiles in product(*reversed(cuts)):
            yield (of_batch, slice(None), *of_tiles)

    def bias_index(self, kernel_size: list[int]) -> Int[Tensor, "queries keys"]:
        """Where each query and key of a tile meet in the flattened relative bias."""
        index = self.runs[0].bias_rows(kernel_size[0])
        for run, size in zip(self.runs[1:], kernel_size[1:], strict=True):
            index = _outer(index * (2 * size - 1), run.bias_rows(size), torch.add)
        return index

    def _lattice(self, x: Tensor, firsts: list[int], extents: list[int]) -> Tensor:
        of_batch, of_heads, *of_axes, of_features = x.stride()
        size, stride, inner, offset = [*x.shape[:2]], [of_batch, of_heads], [], x.storage_offset()
        for run, step, first in zip(self.runs, of_axes, firsts, strict=True):
            size += [run.groups, run.tiles]
            stride += [step, step * run.dilation * run.size]
            inner.append(step * run.dilation)
            offset += step * (run.origin + run.dilation * first)
        return x.as_strided([*size, *extents, x.shape[-1]], [*stride, *inner, of_features], offset)


@lru_cache(maxsize=64)
def tile_shape(axes: tuple[Axis, ...], samples: int, features: int) -> tuple[int, ...]:
    """The tile expected to be fastest.

    `samples` is batch times heads, `features` the numbers of a key and a value together.
    """

    def cost(tile: tuple[int, ...]) -> tuple[bool, float]:
        estimates = [axis.estimate(size) for axis, size in zip(axes, tile, strict=True)]
        tiles, queries, keys, regions = (math.prod(numbers) for numbers in zip(*estimates, strict=True))
        scores = queries * keys
        of_tile = scores * (features + _SCORE_COST) + keys * features * _COPY_COST + _TILE_COST
        return scores > _SCORES_PER_THREAD, samples * tiles * of_tile + regions * _REGION_COST

    return min(product(*(axis.tile_sizes() for axis in axes)), key=cost)


@lru_cache(maxsize=16)
def regions(
    axes: tuple[Axis, ...], tile: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Region, ...]:
    """The grid, cut into tiles of at most `tile` queries."""
    runs_per_axis = [_runs(axis, size, device) for axis, size in zip(axes, tile, strict=True)]
    return tuple(_region(runs, dtype) for runs in product(*runs_per_axis))


def _runs(axis: Axis, size: int, device: torch.device) -> list[Run]:
    runs = []
    for group, groups, length in axis.groups():
        position = torch.arange(length)
        bounds = window(position, torch.tensor(length), axis.kernel_size, axis.stride, axis.is_causal)
        relative = torch.stack(bounds, -1) - (position // size * size)[:, None]
        tiles = [(start, relative[start : start + size].tolist()) for start in range(0, length, size)]
        for windows, members in groupby(tiles, key=itemgetter(1)):
            starts = [start for start, _ in members]
            low, high = min(first for first, _ in windows), max(last for _, last in windows)
            keys = torch.arange(low, high + 1)
            visible = torch.stack([(first <= keys) & (keys <= last) for first, last in windows]).to(device)
            origin = group + axis.dilation * starts[0]
            run = Run(origin, groups, len(starts), axis.dilation, len(windows), low, len(keys), visible)
            runs.append(run)
    return runs


def _region(runs: tuple[Run, ...], dtype: torch.dtype) -> Region:
    visible = runs[0].visible
    for run in runs[1:]:
        visible = _outer(visible, run.visible, torch.logical_and)
    return Region(runs, hiding(visible, dtype))


def _outer(a: Tensor, b: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine every entry of one matrix with every entry of the other, laid out as a Kronecker product."""
    return combine(a[:, None, :, None], b[None, :, None, :]).reshape(a.shape[0] * b.shape[0], -1)


def _cut(extent: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, extent)) for start in range(0, extent, step)]
