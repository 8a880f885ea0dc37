"""Who looks at which block of keys, ordered so that blocks of several heads share a product."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from regard.ops.blocks import BlockMap
from regard.ops.engines.tile_loop import WIDE_TILE
from regard.ops.masks import Mask, Tiles, plan
from regard.ops.masks.base import EMPTY, PARTIAL
from regard.ops.masks.plan import kept

MOST_SCORES = 2**19
"""Scores in flight: queries times keys of all blocks of a visit."""
MOST_ROWS = 8
"""Rows whose blocks may be visited together."""
ALIKE = 0.9
"""Blocks are visited together if each has this share of the queries of the largest: the rest is filling."""


@dataclass(frozen=True)
class Visit:
    """Blocks of keys of different rows (a sample's key head), and who looks at each."""

    blocks: Tensor
    """Indices into the blocks of all rows."""
    short: list[int]
    """Which of these, by their place here, are the last of their row and filled up."""
    queries: Tensor
    """For each block equally many, after each other: indices into (rows, query heads of a row, queries), and the one
    behind the last where there are fewer."""
    asks: bool
    """Whether the mask must be asked."""


_Blocks = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Indices of blocks, and from where on how many queries look at each."""


@dataclass(frozen=True)
class Visits:
    """All visits of a call."""

    tiles: Tiles
    """The sizes of the call."""
    group: int
    """Query heads of a key head."""
    blocks: BlockMap
    rest: Mask | None
    """What else a query may not look at."""
    device: torch.device

    @property
    def size(self) -> int:
        """Keys of a block."""
        return min(self.blocks.key_block, self.tiles.keys)

    @property
    def filling(self) -> int:
        """By how many keys the last block of a row is filled up."""
        return -self.tiles.keys % self.size

    @property
    def per_row(self) -> int:
        """Blocks of a row."""
        return self.blocks.visits.shape[-1]

    @property
    def length(self) -> int:
        """Queries of a row."""
        return self.group * self.tiles.queries

    @property
    def rows(self) -> int:
        return self.tiles.batch * self.tiles.heads // self.group

    def __iter__(self) -> Iterator[Visit]:
        """Every block that is looked at, cut so that the scores of a visit stay in cache; kept for backward."""
        mask = self.blocks if self.rest is None else self.blocks & self.rest
        yield from kept(mask, ("visits", self.tiles, self.group, self.device), lambda: list(self._made()))

    def _made(self) -> Iterator[Visit]:
        for first in range(0, self.rows, MOST_ROWS):
            yield from self._of(range(first, min(first + MOST_ROWS, self.rows)))

    def _of(self, rows: range) -> Iterator[Visit]:
        looks, asks = self._by_key(self._visits, rows, self.blocks.query_block), None
        if self._states is not None:
            states = self._by_key(self._states, rows, WIDE_TILE)
            looks, asks = looks & (states != EMPTY), states == PARTIAL
        found = looks.expand(len(rows), -1, -1).flatten().nonzero()[:, 0]
        if asks is None:
            yield from self._grouped(found.numpy(), rows, False)
            return
        asking = asks.flatten()[found % asks.numel()]
        for ask in (True, False):
            yield from self._grouped(found[asking == ask].numpy(), rows, ask)

    def _grouped(self, found: np.ndarray, rows: range, asks: bool) -> Iterator[Visit]:
        """Visits of what is `found` in (rows, blocks, queries)."""
        edges = np.searchsorted(found, np.arange(len(rows) * self.per_row + 1) * self.length)
        starts, counts = (each.reshape(len(rows), self.per_row) for each in (edges[:-1], np.diff(edges)))
        queries = (found // (self.per_row * self.length) + rows.start) * self.length + found % self.length
        seen, together, members = np.zeros(self.rows * self.length, bool), [], []
        # The largest block of each row, then the second, … : few queries are in two of them.
        for blocks in np.argsort(-counts, axis=1, kind="stable").T:
            for group in _alike(counts[np.arange(len(rows)), blocks]):
                place = group, blocks[group]
                more = (group + rows.start) * self.per_row + blocks[group], starts[place], counts[place]
                who = np.concatenate([queries[start : start + count] for start, count in zip(*more[1:], strict=True)])
                if together and (not self._join(together, more) or seen[who].any()):
                    yield from self._cut(together, queries, asks)
                    seen[np.concatenate(members)] = False
                    together, members = [], []
                seen[who] = True
                together.append(more)
                members.append(who)
        if together:
            yield from self._cut(together, queries, asks)

    def _join(self, together: list[_Blocks], more: _Blocks) -> bool:
        """Whether `more` blocks are alike and their scores still fit."""
        most = together[0][2][0]
        many = sum(len(blocks) for blocks, _, _ in together) + len(more[0])
        return more[2][-1] >= ALIKE * most and many * most * self.size <= MOST_SCORES

    def _cut(self, together: list[_Blocks], queries: np.ndarray, asks: bool) -> Iterator[Visit]:
        blocks, starts, counts = (np.concatenate(parts) for parts in zip(*together, strict=True))
        most = int(counts.max())
        short = np.flatnonzero(blocks % self.per_row == self.per_row - 1).tolist() if self.filling else []
        pieces = -(-most * len(blocks) * self.size // MOST_SCORES)
        for places in np.array_split(np.arange(most), min(pieces, most)):
            index = np.minimum(starts[:, None] + places, len(queries) - 1)
            who = np.where(places < counts[:, None], queries[index], self.rows * self.length)
            yield Visit(
                torch.from_numpy(blocks).to(self.device), short, torch.from_numpy(who.ravel()).to(self.device), asks
            )

    @cached_property
    def _visits(self) -> Tensor:
        return self.blocks.visits.cpu()

    @cached_property
    def _states(self) -> Tensor | None:
        if self.rest is None:
            return None
        sizes = self.tiles.batch, self.tiles.heads, self.tiles.queries, self.tiles.keys
        return plan(self.rest, Tiles(*sizes, WIDE_TILE, self.size)).states

    def _by_key(self, table: Tensor, rows: range, size: int) -> Tensor:
        """A table over (samples, heads, blocks of `size` queries, blocks of keys) as (rows or 1, blocks, queries)."""
        if table.shape[0] == table.shape[1] == 1:
            rows = rows[:1]
        per_sample = self.tiles.heads // self.group
        found = []
        for sample, head in (divmod(row, per_sample) for row in rows):
            of_sample = table[sample if table.shape[0] > 1 else 0]
            heads = slice(head * self.group, (head + 1) * self.group)
            of_heads = of_sample[heads] if table.shape[1] > 1 else of_sample.expand(self.group, -1, -1)
            by_key = of_heads.permute(2, 0, 1)
            if size > 1:
                by_key = by_key.contiguous().repeat_interleave(size, dim=-1)[..., : self.tiles.queries]
            found.append(by_key.flatten(1))
        return torch.stack(found)


def _alike(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Places of similar counts, the largest of each first; those of none are left out.

    By halving, as equal shares for the threads want numbers that are even.
    """
    order = np.argsort(-counts, kind="stable")
    left = [order[counts[order] > 0]]
    while left:
        places = left.pop()
        if not len(places):
            continue
        if counts[places[-1]] >= ALIKE * counts[places[0]]:
            yield places
        else:
            left += [places[len(places) // 2 :], places[: len(places) // 2]]
