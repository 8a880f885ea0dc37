"""Which tiles a mask lets an engine skip, as contiguous key ranges to walk. Never builds the N×N mask."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.ops.indices import Span, full_tile, hiding, index_grid
from regard.ops.masks.base import EMPTY, FULL, PARTIAL, Mask, Tiles

KEY_SPAN = 512
"""Most keys walked at once, so that their scores stay in cache."""
_MOST_KEPT = 128
_MOST_IN_TILES = 2**18
"""Numbers in the tiles that a plan keeps; where one serves a diagonal, it keeps all."""

Made = TypeVar("Made")


class KeyRange(NamedTuple):
    """Keys of one row of tiles that are walked at once, and the parts of them where the mask must be looked at."""

    spans: tuple[Span, ...]
    partial: tuple[tuple[int, Span], ...]
    """Where a part begins in the range, and which keys it is."""

    @property
    def width(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    @property
    def looked_at(self) -> int:
        """Keys in partial parts."""
        return sum(stop - start for _, (start, stop) in self.partial)


class Unit(NamedTuple):
    """Samples and key heads that share one tiling, and per row of tiles the key ranges to visit."""

    batch: Span
    heads: Span
    rows: list[list[KeyRange]]


@dataclass(frozen=True)
class Plan:
    """The tiling of one mask for one call's sizes; see `plan`. It does not hold the mask: it outlives its tensors."""

    tiles: Tiles
    states: Int[Tensor, "batch_or_1 heads_or_1 query_tiles key_tiles"]
    _units: dict[int, list[Unit]] = field(default_factory=dict)
    _tiles: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Share of the tiles that are not empty: what an engine computes, against the full matrix."""
        return float((self.states != EMPTY).float().mean())

    @property
    def ragged(self) -> bool:
        """Whether most tiles to visit are partial, so that smaller ones would waste less."""
        return bool((self.states == PARTIAL).sum() > (self.states == FULL).sum())

    def units(self, key_heads: int) -> list[Unit]:
        """Runs of samples and key heads with the same tile states (query heads of a key head taken together)."""
        if key_heads not in self._units:
            self._units[key_heads] = list(self._build_units(key_heads))
        return self._units[key_heads]

    def _build_units(self, key_heads: int) -> Iterator[Unit]:
        grouped = self.states
        if grouped.shape[1] > 1:
            by_key_head = grouped.unflatten(1, (key_heads, -1))
            low, high = by_key_head.amin(2), by_key_head.amax(2)
            grouped = torch.where(low == high, low, torch.full_like(low, PARTIAL))
        table = grouped.numpy()
        samples, heads = table.shape[:2]
        for sample in range(samples):
            if heads == 1 and sample and (table[sample] == table[sample - 1]).all():
                continue
            stop = sample + 1
            while heads == 1 and stop < samples and (table[stop] == table[sample]).all():
                stop += 1
            batch = (sample, stop) if samples > 1 else (0, self.tiles.batch)
            if heads == 1:
                yield Unit(batch, (0, key_heads), self._rows(table[sample, 0]))
                continue
            for _, run in groupby(range(heads), key=lambda head, at=sample: table[at, head].tobytes()):
                indices = list(run)
                rows = self._rows(table[sample, indices[0]])
                # Only a unit with every head may span samples: (sample, head) rows must be contiguous in memory.
                pieces = range(*batch) if len(indices) < key_heads else [None]
                for piece in pieces:
                    one = batch if piece is None else (piece, piece + 1)
                    yield Unit(one, (indices[0], indices[-1] + 1), rows)

    def _rows(self, table: np.ndarray) -> list[list[KeyRange]]:
        return [list(self._ranges(row)) for row in table]

    def _ranges(self, row: np.ndarray) -> Iterator[KeyRange]:
        """As many tiles at once as may be: a run of them, or several runs that lie apart."""
        visited, most = np.flatnonzero(row != EMPTY), max(1, KEY_SPAN // self.tiles.key_tile)
        for first in range(0, len(visited), most):
            chosen = visited[first : first + most]
            places = np.flatnonzero(row[chosen] != FULL)
            partial = tuple((int(places[at]) * self.tiles.key_tile, span) for at, span in self._spans(chosen[places]))
            yield KeyRange(tuple(span for _, span in self._spans(chosen)), partial)

    def _spans(self, tiles: np.ndarray) -> Iterator[tuple[int, Span]]:
        """Runs of neighbouring tiles as keys, and at which of `tiles` each begins."""
        if not len(tiles):
            return
        bounds = [0, *(np.flatnonzero(np.diff(tiles) > 1) + 1).tolist(), len(tiles)]
        size = self.tiles.key_tile
        for start, stop in pairwise(bounds):
            yield start, (int(tiles[start]) * size, min((int(tiles[stop - 1]) + 1) * size, self.tiles.keys))

    def additive(
        self,
        mask: Mask,
        like: Tensor,
        batch: Span,
        heads: Span,
        queries: Span,
        keys: Span,
    ) -> Float[Tensor, "batch_or_1 heads_or_1 queries keys"]:
        """The mask of one tile as 0 where allowed and −inf elsewhere; one along diagonals where it may be.

        Kept for backward and the next layer, up to a limit.
        """
        span = (queries[0] + self.tiles.offset, queries[1] + self.tiles.offset)
        shape = (span[1] - span[0], keys[1] - keys[0])
        place = span[0] - keys[0] if mask.shift_invariant else (batch, heads, span[0], keys[0])
        name = (place, shape, like.dtype, like.device)
        if name in self._tiles:
            return self._tiles[name]
        grid = index_grid(batch, heads, span, keys, like.device)
        tile = hiding(full_tile(mask.allows(*grid), span, keys), like.dtype)
        if mask.shift_invariant or sum(tile.numel() for tile in self._tiles.values()) < _MOST_IN_TILES:
            self._tiles[name] = tile
        return tile


def plan(mask: Mask | None, tiles: Tiles) -> Plan:
    """The plan of `mask` for `tiles`; kept while the mask's tensors are alive and unchanged."""
    if mask is None:
        shape = (1, 1, len(tiles.query_low), tiles.key_low.shape[1])
        return Plan(tiles, torch.full(shape, FULL, dtype=torch.int8))
    return kept(mask, ("plan", tiles), lambda: Plan(tiles, mask.tile_states(tiles).cpu()))


_kept: OrderedDict[tuple[Hashable, ...], tuple[list[weakref.ref[Tensor]], list[int], Any]] = OrderedDict()


def kept(mask: Mask, purpose: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` makes of `mask`, kept while the mask's tensors are alive and unchanged; it must not hold them."""
    text, tensors = mask.flatten()
    # By the very tensors: the layers of a model have masks alike, and each needs its own again in backward.
    name = text, purpose, *map(id, tensors)
    if any(tensor.is_inference() for tensor in tensors):  # those carry no version to notice a change by
        return make()
    versions = [tensor._version for tensor in tensors]
    if name in _kept and _kept[name][1] == versions:
        _kept.move_to_end(name)
        return _kept[name][2]
    marks = [weakref.ref(tensor, lambda _: _kept.pop(name, None)) for tensor in tensors]
    _kept[name] = marks, versions, make()
    if len(_kept) > _MOST_KEPT:
        _kept.popitem(last=False)
    return _kept[name][2]
