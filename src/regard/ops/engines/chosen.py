"""The tiled loop where every head has keys of its own: their tiles are gathered, so that all heads share one product.

For maps of blocks (`regard.ops.blocks`) that fall on tiles. Rows are query heads; at each tile of queries those that
visit equally many tiles are taken together, full tiles before those where the mask must be asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from regard.ops.biases import Bias
from regard.ops.blocks import BlockMap
from regard.ops.dropout import keep_tile
from regard.ops.engines.tile_kinds import SoftmaxLoop, hiding
from regard.ops.engines.tile_loop import NARROW_TILE, WIDE_TILE, Step
from regard.ops.indices import Span
from regard.ops.masks import Mask, Tiles, plan
from regard.ops.masks.base import FULL, PARTIAL
from regard.ops.masks.plan import kept

LONGEST_SPAN = 2048
"""Most keys of a row walked at once; fewer rows are then."""
MOST_KEYS = 2**14
"""Rows × keys per query in flight. More than for keys that are views: the rows then share few large products."""


def tile_of(blocks: BlockMap) -> int | None:
    """The tile edge that divides the map's blocks, if there is one."""
    return next((t for t in (WIDE_TILE, NARROW_TILE) if blocks.query_block % t == blocks.key_block % t == 0), None)


@dataclass(frozen=True)
class Chosen:
    """Tiles of keys of some rows, walked at once."""

    tiles: Tensor
    """Which, among all tiles of all key heads: (rows, tiles)."""
    size: int
    partial: int
    """How many of them, the last, must ask the mask."""
    place: int | None
    """Which key tile that is, if it is one and the same in all rows."""

    @property
    def width(self) -> int:
        return self.tiles.shape[1] * self.size

    @property
    def looked_at(self) -> int:
        """Keys where the mask is asked."""
        return self.partial * self.size


class ChosenLoop(SoftmaxLoop):
    """The softmax loop over gathered tiles."""

    tile: int

    def gather_by(self, tile: int) -> None:
        """Fold the tensors as this loop needs them: every query head a row, keys in whole tiles."""
        self.tile, self.shared, self.group = tile, self.group, 1
        self._seen: dict[tuple[int, int], Tensor] = {}
        self.query = self.query.reshape(self.batch * self.heads, 1, *self.query.shape[2:])
        fill = (0, 0, 0, -self.keys % tile)
        self.key, self.value = (F.pad(t, fill) if fill[3] else t.contiguous() for t in (self.key, self.value))

    def results(self, grads: list[Tensor], bias_grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        query, *others = grads
        return super().results([query, *(grad[:, : self.keys] for grad in others)], bias_grads, dtype)

    def steps(self) -> Iterator[Step]:
        """Tiles of queries, and rows that visit equally many tiles of keys; kept for backward."""
        assert self.mask is not None
        yield from kept(self.mask, ("steps", self._tiles, self.shared, self.device), lambda: list(self._made()))

    def _made(self) -> Iterator[Step]:
        states = plan(self.mask, self._tiles).states.numpy()
        states = np.broadcast_to(states, (self.batch, self.heads, *states.shape[2:])).reshape(-1, *states.shape[2:])
        if self.keys % self.tile:
            states = states.copy()
            states[..., -1] = np.minimum(states[..., -1], PARTIAL)
        tiles = states.shape[-1]
        order = np.argsort(-states, axis=-1, kind="stable")
        partial = (states == PARTIAL).sum(-1)
        kinds = (states == FULL).sum(-1) * (tiles + 1) + partial
        first = (np.arange(len(states)) // self.shared * tiles)[:, None]
        for index in range(states.shape[1]):
            of_row = kinds[:, index]
            for kind in [of_row[0]] if (of_row == of_row[0]).all() else np.unique(of_row):
                rows = np.flatnonzero(of_row == kind)
                asking = int(partial[rows[0], index])
                count = int(kind) // (tiles + 1) + asking
                if count:
                    queries = index * self.tile, min((index + 1) * self.tile, self.queries)
                    yield from self._pieces(rows, queries, order[rows, index, :count], first[rows], asking)

    def _pieces(
        self, rows: np.ndarray, queries: Span, tiles: np.ndarray, first: np.ndarray, asking: int
    ) -> Iterator[Step]:
        """As many rows and tiles at once as keep their scores in cache, in even pieces."""
        many = min(tiles.shape[1], LONGEST_SPAN // self.tile)
        pieces = -(-len(rows) // max(1, MOST_KEYS // (many * self.tile)))
        for piece in np.array_split(np.arange(len(rows)), pieces):
            ranges = []
            for start in range(0, tiles.shape[1], many):
                chosen = tiles[piece, start : start + many]
                ask = min(chosen.shape[1], max(0, asking - (tiles.shape[1] - start - chosen.shape[1])))
                last = chosen[:, -1]
                place = int(last[0]) if ask == 1 and (last == last[0]).all() else None
                index = torch.from_numpy(chosen + first[piece]).to(self.device)
                ranges.append(Chosen(index, self.tile, ask, place))
            whole = len(piece) == self.query.shape[0]
            which = slice(None) if whole else torch.from_numpy(rows[piece]).to(self.device)
            yield Step((0, 0), (0, 0), which, queries, ranges)  # pyright: ignore[reportArgumentType]

    @cached_property
    def _tiles(self) -> Tiles:
        return Tiles(self.batch, self.heads, self.queries, self.keys, self.tile, self.tile)

    def keys_of(self, tensor: Tensor, step: Step, keys: Any) -> Tensor:
        chosen = tensor.view(-1, self.tile, tensor.shape[-1]).index_select(0, keys.tiles.flatten())
        return chosen.view(keys.tiles.shape[0], keys.width, -1).to(self.dtype)

    def add_to(self, total: Tensor, tile: Tensor, step: Step, keys: Any) -> None:
        width = total.shape[-1]
        total.view(-1, self.tile * width).index_add_(0, keys.tiles.flatten(), tile.view(-1, self.tile * width))

    def scores(self, query: Tensor, key: Tensor, step: Step, keys: Any, start: Tensor | None = None) -> Tensor:
        scores = self.product("scores", query, key, start)
        if self.bias is not None:
            self.per_head(scores, step).add_(self._bias_tile(self.bias, step, keys), alpha=self.unit)
        if keys.partial:
            scores[..., -keys.looked_at :].add_(self._hiding(step, keys))
        return scores

    def _hiding(self, step: Step, keys: Any) -> Tensor:
        """0 where the mask allows in the partial tiles, −∞ elsewhere: (rows or 1, queries, keys)."""
        name = None
        if keys.place is not None and keys.place != self.keys // self.tile and self.within.shift_invariant:
            name = keys.place * self.tile - self._positions(step)[0], step.height
        if name is None or name not in self._seen:
            sample, head, query, key = self._grid(step, keys.tiles[:, -keys.partial :])
            allowed = self.within.allows(sample, head, query, key.clamp(max=self.keys - 1)) & (key < self.keys)
            allowed = allowed.expand(torch.broadcast_shapes(allowed.shape, (1, 1, step.height, key.shape[-1])))[:, 0]
            hidden = hiding(allowed, self.dtype)
            if name is None:
                return hidden
            self._seen[name] = hidden[:1]
        return self._seen[name]

    @cached_property
    def within(self) -> Mask:
        assert self.mask is not None
        return self.mask.within(self._tiles)

    def per_head(self, tile: Tensor, step: Step) -> Tensor:
        """View (rows, queries, keys) as (rows, 1, queries, keys)."""
        return tile.unsqueeze(1)

    def kept(self, step: Step, keys: Any) -> Tensor | None:
        if self.seed is None:
            return None
        return keep_tile(self.seed, self.dropout, *self._grid(step, keys.tiles)).to(self.dtype)[:, 0]

    def _bias_tile(self, bias: Bias, step: Step, keys: Any) -> Tensor:
        sample, head, query, key = self._grid(step, keys.tiles)
        bias_tile = bias.score(sample, head, query, key.clamp(max=self.keys - 1))
        return bias_tile.expand(torch.broadcast_shapes(bias_tile.shape, (1, 1, step.height, keys.width)))

    def _grid(self, step: Step, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample, head, position and key of every score, as they broadcast to (rows, 1, queries, keys)."""
        rows = torch.arange(self.query.shape[0], device=self.device)[step.rows].view(-1, 1, 1, 1)
        per_head = self.key.shape[1] // self.tile
        keys = (tiles % per_head * self.tile).unsqueeze(-1) + torch.arange(self.tile, device=self.device)
        queries = torch.arange(*self._positions(step), device=self.device).unsqueeze(-1)
        return rows // self.heads, rows % self.heads, queries, keys.flatten(1)[:, None, None]
