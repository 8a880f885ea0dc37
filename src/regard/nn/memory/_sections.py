"""Plumbing of landmark attention: tokens laid out by sections, and rows of queries that read blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from regard.ops.masks import Mask, Padding, segments_of
from regard.ops.normalizers import Softmax

ROWS = 64
"""Queries computed at once."""


@dataclass(frozen=True)
class Sections:
    """Where tokens stand: in which section, at which place of it, and which section their sequence begins with."""

    section: Int[Tensor, "batch_or_1 length"]
    place: Int[Tensor, "batch_or_1 length"]
    first: Int[Tensor, "batch_or_1 length"]
    real: Bool[Tensor, "batch_or_1 length"]
    count: int
    width: int
    before: int
    """How many closed sections went before."""
    regular: bool

    @classmethod
    def of(cls, length: int, width: int, mask: Mask | None, device: torch.device, *, before: int = 0) -> Sections:
        """Sections of `width` tokens from the start, or from the start of each packed sequence."""
        index = torch.arange(length, device=device)[None]
        real = mask.real(length).to(device) if isinstance(mask, Padding) else torch.ones_like(index, dtype=torch.bool)
        segments = segments_of(mask)
        if segments is None:
            count = -(-length // width)
            return cls(index // width, index % width, torch.zeros_like(index), real, count, width, before, True)
        places = segments.places().to(device).view(-1, length)
        section = (places % width == 0).cumsum(-1) - 1
        first = (section * (places == 0)).cummax(-1).values
        return cls(section, places % width, first, real, int(section.max()) + 1, width, before, False)

    def grid(self, tokens: Tensor) -> Tensor:
        """(batch, heads, length, width) as (batch, heads, sections, places, width); zeros where there is no token."""
        tokens = tokens.where(self.real[:, None, :, None], torch.zeros_like(tokens))
        slots = self.count * self.width
        if self.regular:
            laid = F.pad(tokens, (0, 0, 0, slots - tokens.shape[2]))
        else:
            slot = self._slots()[:, None, :, None].expand(tokens.shape)
            laid = tokens.new_zeros(*tokens.shape[:2], slots, tokens.shape[3]).scatter(2, slot, tokens)
        return laid.unflatten(2, (self.count, self.width))

    def filled(self) -> Bool[Tensor, "batch_or_1 sections places"]:
        """Where the grid has tokens."""
        batch = max(self.real.shape[0], self.section.shape[0])
        return self.grid(self.real.expand(batch, -1)[:, None, :, None])[:, 0, :, :, 0]

    def tokens(self, grid: Float[Tensor, "batch heads rows sections places"]) -> Float[Tensor, "batch heads rows keys"]:
        """What a map over the grid says of each token."""
        grid = F.pad(grid, (0, self.width - grid.shape[-1])).flatten(-2)
        return grid.take_along_dim(self._slots()[:, None, None], -1)

    def reach(self, stop: int) -> int:
        """How many sections, those before included, the tokens up to `stop` may look back at."""
        return self.before + (stop - 1) // self.width if self.regular else self.count

    def _slots(self) -> Tensor:
        return self.section * self.width + self.place


@dataclass(frozen=True)
class Reading:
    """Queries that stand in sections of their own and look back at closed ones, all of them or the best `chosen`.

    `query` is scaled. It, `own_key` and, where all are read, `key` are turned by position already; fetched keys are
    turned by `turn`. Landmarks are scored near as ``near_query · near`` and, with `chosen`, further than `chosen`
    sections away as ``query · far``; `landmark` is what both were turned from.
    """

    query: Float[Tensor, "batch heads rows head_dim"]
    section: Int[Tensor, "batch_or_1 rows"]
    place: Int[Tensor, "batch_or_1 rows"]
    first: Int[Tensor, "batch_or_1 rows"]
    own_key: Float[Tensor, "batch heads own_sections block head_dim"]
    own_value: Float[Tensor, "batch heads own_sections block head_dim"]
    own_filled: Bool[Tensor, "batch_or_1 own_sections block"]
    offset: int
    """How many sections stand before those of `own_key`."""
    key: Float[Tensor, "batch heads sections block head_dim"]
    value: Float[Tensor, "batch heads sections block head_dim"]
    closed: Bool[Tensor, "batch_or_1 sections"]
    near_query: Float[Tensor, "batch heads rows head_dim"]
    near: Float[Tensor, "batch heads sections head_dim"]
    far: Float[Tensor, "batch heads sections head_dim"] | None = None
    landmark: Float[Tensor, "batch heads sections head_dim"] | None = None
    chosen: int | None = None
    turn: Callable[[Tensor, Tensor], Tensor] | None = None

    def read(self, own: Sections, dropout: float) -> Float[Tensor, "batch heads rows head_dim"]:
        """What the queries, which are the last tokens of `own`, read: a tile of rows at a time."""
        length = self.query.shape[2]
        earlier = own.real.shape[1] - length
        starts = range(0, length, ROWS)
        mixed = []
        for start in starts:
            rows = slice(start, min(start + ROWS, length))
            if torch.is_grad_enabled() and len(starts) > 1:
                tile = checkpoint(
                    self._mixed,
                    rows,
                    own.reach(earlier + rows.stop),
                    dropout,
                    use_reentrant=False,
                    preserve_rng_state=dropout > 0,
                )
            else:
                tile = self._mixed(rows, own.reach(earlier + rows.stop), dropout)
            mixed.append(tile)
        return torch.cat(mixed, dim=2)

    def weights(self) -> Float[Tensor, "batch heads rows sections block"]:
        """The weight of every place of every section, the own one included."""
        sections = self.key.shape[2]
        past, own, chosen, _ = self._weights(slice(0, self.query.shape[2]), sections)
        made = past.new_zeros(*past.shape[:3], sections, past.shape[4])
        where = torch.arange(sections, device=past.device) if chosen is None else chosen.clamp(min=0)
        made = made.scatter_add(3, where[..., None].expand(past.shape), past)
        where = self.section[:, None, :, None, None].expand(*own.shape[:3], 1, own.shape[3])
        return made.scatter_add(3, where, own[..., None, :])

    def _mixed(self, rows: slice, before: int, dropout: float) -> Tensor:
        past, own, chosen, value = self._weights(rows, before)
        past, own = F.dropout(past, dropout), F.dropout(own, dropout)
        own_value = self._own(self.own_value, rows)
        mixed = (own.unsqueeze(-2) @ own_value).squeeze(-2)
        if chosen is None:
            return mixed + past.flatten(-2) @ value.flatten(2, 3)
        return mixed + (past.flatten(-2).unsqueeze(-2) @ value.flatten(3, 4)).squeeze(-2)

    def _weights(self, rows: slice, before: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Weights of blocks (rows, blocks, block) and of the own section (rows, block); which blocks; their values."""
        query, place = self.query[:, :, rows], self.place[:, rows]
        own_key = self._own(self.own_key, rows)
        inside = torch.arange(own_key.shape[3], device=query.device)
        filled = self.own_filled.take_along_dim(self.section[:, rows, None] - self.offset, 1)
        own = _product(query, own_key).masked_fill(~(filled & (inside <= place[..., None]))[:, None], -torch.inf)
        marks, chosen = self._marks(rows, before), None
        if self.chosen is None:
            key, value = (blocks[:, :, :before].to(query) for blocks in (self.key, self.value))
            scores = (query @ key.flatten(2, 3).mT).unflatten(-1, key.shape[2:4])
        else:
            # Those beyond reach come first and have no weight.
            best = marks.topk(min(self.chosen, before))
            chosen = best.indices.where(best.values > -torch.inf, -1).sort(-1).values
            key, value = self._fetch(chosen, rows)
            scores = _product(query, key.flatten(3, 4)).unflatten(-1, key.shape[3:5])
            # A chosen block's landmark counts from where it now stands.
            marks, scores = scores[..., -1].masked_fill(chosen < 0, -torch.inf), scores[..., :-1]
        logs = torch.log_softmax(scores, -1) + marks[..., None]
        both = torch.cat([logs.flatten(-2), own], dim=-1)
        weights = Softmax().weights(both, (both > -torch.inf).sum(-1, keepdim=True))
        past, own = weights.split([both.shape[-1] - own.shape[-1], own.shape[-1]], dim=-1)
        return past.unflatten(-1, scores.shape[-2:]), own, chosen, value

    def _own(self, grid: Tensor, rows: slice) -> Float[Tensor, "batch heads rows block head_dim"]:
        """The own section of every query."""
        return grid.take_along_dim((self.section[:, rows] - self.offset)[:, None, :, None, None], 2)

    def _marks(self, rows: slice, before: int) -> Float[Tensor, "batch heads rows sections"]:
        """Scores of the landmarks; −inf for sections that are open, do not come before or are of another sequence."""
        index = torch.arange(before, device=self.query.device)
        section, first = self.section[:, rows, None], self.first[:, rows, None]
        reach = (index < section) & (index >= first) & self.closed[:, None, :before]
        marks = self.near_query[:, :, rows] @ self.near[:, :, :before].mT
        if self.far is not None and self.chosen is not None:
            far = self.query[:, :, rows] @ self.far[:, :, :before].mT
            marks = marks.where((section - index <= self.chosen)[:, None], far)
        return marks.masked_fill(~reach[:, None], -torch.inf)

    def _fetch(self, chosen: Int[Tensor, "batch heads rows blocks"], rows: slice) -> tuple[Tensor, Tensor]:
        """Keys of chosen blocks with those of their landmarks behind, turned to their place in the segment before the
        own section; and values."""
        assert self.chosen is not None
        assert self.turn is not None
        assert self.landmark is not None
        index = chosen.clamp(min=0).flatten(2)[..., None, None]
        landmark = self.landmark[:, :, :, None].take_along_dim(index, 2)
        # Only what was chosen leaves the place where blocks are kept.
        index = index.to(self.key.device)
        key, value = (blocks.take_along_dim(index, 2).to(self.query) for blocks in (self.key, self.value))
        slot = torch.arange(self.chosen - chosen.shape[3], self.chosen, device=chosen.device)
        near = self.section[:, None, rows, None] - chosen <= self.chosen
        key = torch.cat([key, landmark], dim=3).unflatten(2, chosen.shape[2:])
        return self.turn(key, slot + near), value.unflatten(2, chosen.shape[2:])


def _product(
    query: Float[Tensor, "batch heads rows width"], keys: Float[Tensor, "batch heads rows keys width"]
) -> Tensor:
    """Scores of each row's own keys."""
    return (keys @ query.unsqueeze(-1)).squeeze(-1)
