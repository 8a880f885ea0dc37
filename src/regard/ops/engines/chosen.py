"""The tiled loop over gathered tiles of keys: tiles of queries of any head that visit equally many share one product.

For maps of blocks (`regard.ops.blocks`) that fall on tiles, where every head has keys of its own. Rows are tiles of
queries; those that visit equally many tiles of keys are taken together, full tiles before those where the mask must be
asked.
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
from regard.ops.engines.tile_kinds import SoftmaxLoop
from regard.ops.engines.tile_loop import MOST_KEYS, NARROW_TILE, WIDE_TILE, Step
from regard.ops.indices import hiding
from regard.ops.masks import Mask, Tiles, plan
from regard.ops.masks.base import FULL, PARTIAL
from regard.ops.masks.plan import kept

LONGEST_SPAN = 2048
"""Most keys of a row walked at once; fewer rows are then."""


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
    distances: tuple[int, ...] | None
    """How far each of these begins from the row's first query, if that is the same for all rows."""

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
        """Fold the tensors as this loop needs them: every tile of queries a row, keys in whole tiles."""
        self.tile, self.shared, self.group = tile, self.group, 1
        self._seen: dict[tuple[int, ...], Tensor] = {}
        self.query = self.folded(self.query.reshape(self.batch, self.heads, self.queries, -1))
        fill = (0, 0, 0, -self.keys % tile)
        self.key, self.value = (F.pad(t, fill) if fill[3] else t.contiguous() for t in (self.key, self.value))

    def folded(self, tensor: Tensor, fill: float = 0.0) -> Tensor:
        filling = -self.queries % self.tile
        if filling:
            sides = (0, 0) * (tensor.ndim - 3)
            tensor = F.pad(tensor, (*sides, 0, filling), value=fill)
        return tensor.reshape(-1, 1, self.tile, *tensor.shape[3:])

    def unfolded(self, tensor: Tensor) -> Tensor:
        rows = tensor.view(self.batch, self.heads, -1, *tensor.shape[3:])
        return rows[:, :, : self.queries].contiguous()

    def results(self, grads: list[Tensor], bias_grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        query, *others = grads
        return super().results([self.unfolded(query), *(grad[:, : self.keys] for grad in others)], bias_grads, dtype)

    def steps(self) -> Iterator[Step]:
        """Rows that visit equally many tiles of keys; kept for backward."""
        assert self.mask is not None
        yield from kept(self.mask, ("steps", self._tiles, self.shared, self.device), lambda: list(self._made()))

    def _made(self) -> Iterator[Step]:
        states = plan(self.mask, self._tiles).states.numpy()
        states = np.broadcast_to(states, (self.batch, self.heads, *states.shape[2:])).reshape(-1, states.shape[3])
        tiles = states.shape[1]
        if self.keys % self.tile:
            states = states.copy()
            states[:, -1] = np.minimum(states[:, -1], PARTIAL)
        order = np.argsort(-states, axis=-1, kind="stable")
        full, partial = ((states == state).sum(-1) for state in (FULL, PARTIAL))
        kinds = full * (tiles + 1) + partial
        for kind in np.unique(kinds[kinds > 0]):
            rows = np.flatnonzero(kinds == kind)
            asking = int(partial[rows[0]])
            yield from self._pieces(rows, order[rows, : int(full[rows[0]]) + asking], tiles, asking)

    def _pieces(self, rows: np.ndarray, chosen: np.ndarray, tiles: int, asking: int) -> Iterator[Step]:
        """As many rows and tiles at once as keep their scores in cache."""
        visited, many = chosen.shape[1], min(chosen.shape[1], LONGEST_SPAN // self.tile)
        per_head = -(-self.queries // self.tile)
        first = rows // (per_head * self.shared) * tiles
        at = rows % per_head * self.tile + self._tiles.offset
        # Threads share the rows of a product.
        threads = torch.get_num_threads()
        most = max(1, MOST_KEYS // (many * self.tile * threads)) * threads
        for piece in np.split(np.arange(len(rows)), range(most, len(rows), most)):
            ranges = []
            for start in range(0, visited, many):
                some = chosen[piece, start : start + many]
                ask = min(some.shape[1], max(0, asking - (visited - start - some.shape[1])))
                asked = some[:, some.shape[1] - ask :]
                distances = asked * self.tile - at[piece, None]
                alike = (distances == distances[0]).all() and not (asked == self.keys // self.tile).any()
                index = torch.from_numpy(some + first[piece, None]).to(self.device)
                ranges.append(Chosen(index, self.tile, ask, tuple(distances[0].tolist()) if alike else None))
            yield Step((0, 0), (0, 0), self._places(rows[piece]), (0, self.tile), ranges)

    def _places(self, rows: np.ndarray) -> Any:
        """Rows as a slice where they are neighbours."""
        if rows[-1] - rows[0] == len(rows) - 1:
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return torch.from_numpy(rows).to(self.device)

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
        if keys.distances is None or not self.within.shift_invariant:
            sample, head, query, key = self._grid(step, keys.tiles[:, -keys.partial :])
            allowed = self.within.allows(sample, head, query, key.clamp(max=self.keys - 1)) & (key < self.keys)
            return hiding(allowed.expand(-1, -1, self.tile, keys.looked_at)[:, 0], self.dtype)
        if keys.distances not in self._seen:
            zero, within = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=self.device), self._within_tile
            key = (torch.tensor(keys.distances, device=self.device)[:, None] + within).flatten()
            allowed = self.within.allows(zero, zero, within[:, None], key)
            self._seen[keys.distances] = hiding(allowed.expand(1, 1, self.tile, keys.looked_at)[:, 0], self.dtype)
        return self._seen[keys.distances]

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
        return bias_tile.expand(torch.broadcast_shapes(bias_tile.shape, (1, 1, self.tile, keys.width)))

    @cached_property
    def _within_tile(self) -> Tensor:
        return torch.arange(self.tile, device=self.device)

    def _grid(self, step: Step, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample, head, position and key of every score, as they broadcast to (rows, 1, queries, keys).

        Queries that fill the last tile are given the place of the last one.
        """
        rows = torch.arange(self.query.shape[0], device=self.device)[step.rows].view(-1, 1, 1, 1)
        queries, heads = -(-self.queries // self.tile), self.key.shape[1] // self.tile
        head, row = rows // queries, rows % queries
        query = row * self.tile + self._tiles.offset + self._within_tile[:, None]
        key = (tiles % heads * self.tile).unsqueeze(-1) + self._within_tile
        return head // self.heads, head % self.heads, query.clamp(max=self.keys - 1), key.flatten(1)[:, None, None]
