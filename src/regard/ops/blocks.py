"""Blocks of keys chosen by what they hold: a mask made from scores of (queries, blocks of keys).

    map = BlockMap.top_k(scores, 8, query_block=1, key_block=128)      # or threshold, or cumulative
    attention(query, key, value, mask=map & Causal())

Every engine takes it, as any mask. ``tiled`` does work in proportion to what is visited: blocks of at least 64 queries
walk their chosen keys together, and smaller ones, single queries above all, are gathered per block of keys. Choosing is
not differentiable; a gate that learns weighs what it chose, or has a loss of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from regard.ops.checks import one_of, require
from regard.ops.masks.base import And, Mask, Tiles, classify

Across = Literal["query", "key", "head"]


@dataclass(frozen=True, eq=False, repr=False)
class BlockMap(Mask):
    """Keys of the blocks that a block of queries visits, for each sample and query head.

    ``visits[b, h, r, c]`` says that queries from ``r · query_block`` on look at keys from ``c · key_block`` on; the
    last block of either may be short, and the axes of samples and heads may be 1. `offset` is where the first query
    stands among the keys, ``keys − queries``, as an integer tensor; None says that there are as many queries as keys.
    """

    visits: Bool[Tensor, "batch_or_1 heads_or_1 query_blocks key_blocks"]
    query_block: int
    key_block: int
    offset: Int[Tensor, ""] | None = None

    def __post_init__(self) -> None:
        require(
            self.visits.ndim == 4 and self.visits.dtype == torch.bool,
            "BlockMap",
            f"visits of shape {tuple(self.visits.shape)} and dtype {self.visits.dtype}",
            "give booleans of shape (batch or 1, heads or 1, query_blocks, key_blocks)",
        )
        for name in ("query_block", "key_block"):
            size = getattr(self, name)
            require(size > 0, "BlockMap", f"{name} {size} is not positive", "give a number of positions")

    @classmethod
    def top_k(
        cls,
        scores: Float[Tensor, "batch_or_1 heads_or_1 query_blocks key_blocks"],
        count: int,
        *,
        query_block: int,
        key_block: int,
        across: Across = "query",
        offset: int = 0,
    ) -> Self:
        """The highest scores, `count` blocks of keys for each block of queries.

        Across ``"key"`` it is `count` blocks of queries for each of keys (expert choice), and across ``"head"`` `count`
        times as many pairs as there are blocks of queries, wherever they are. +∞ comes before every other score and
        counts; −∞ is never chosen.
        """
        one_of("BlockMap.top_k", "across", across, ("query", "key", "head"))
        require(count > 0, "BlockMap.top_k", f"count {count} is not positive", "choose at least one")
        lines = _lines(scores, across)
        many = min(count * scores.shape[-2] if across == "head" else count, lines.shape[-1])
        chosen = _highest(lines, many)
        if chosen is None:
            best = lines.topk(many, dim=-1, sorted=False)
            return cls._of(scores, across, best.indices, best.values > -torch.inf, query_block, key_block, offset)
        by_key = chosen if across == "key" else chosen.view(scores.shape).mT
        # By key block, as below.
        return cls(by_key.contiguous().mT, query_block, key_block, _offset(offset, scores))

    @classmethod
    def threshold(
        cls,
        scores: Float[Tensor, "batch_or_1 heads_or_1 query_blocks key_blocks"],
        least: float,
        *,
        query_block: int,
        key_block: int,
        offset: int = 0,
    ) -> Self:
        """Every block whose score is at least `least`, and none of −∞."""
        visits = (scores >= least) & (scores > -torch.inf)
        return cls(visits, query_block, key_block, _offset(offset, scores))

    @classmethod
    def cumulative(
        cls,
        weights: Float[Tensor, "batch_or_1 heads_or_1 query_blocks key_blocks"],
        share: float,
        *,
        query_block: int,
        key_block: int,
        across: Across = "query",
        offset: int = 0,
    ) -> Self:
        """The fewest blocks whose weights, none negative, reach `share` of their sum.

        Of the sum of a block of queries, across ``"key"`` of a block of keys, across ``"head"`` of all. The weight that
        reaches it is in; weights of zero are not.
        """
        one_of("BlockMap.cumulative", "across", across, ("query", "key", "head"))
        require(0.0 < share <= 1.0, "BlockMap.cumulative", f"share {share}", "give a share of the sum in (0, 1]")
        ordered, order = _lines(weights, across).sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = (before < share * ordered.sum(-1, keepdim=True)) & (ordered > 0)
        return cls._of(weights, across, order, kept, query_block, key_block, offset)

    @classmethod
    def _of(
        cls,
        scores: Tensor,
        across: Across,
        chosen: Tensor,
        kept: Tensor,
        query_block: int,
        key_block: int,
        offset: int,
    ) -> Self:
        # Laid out by key block: that is how single queries are gathered.
        queries, keys = scores.shape[-2:]
        by_key = scores.new_zeros(*scores.shape[:-2], keys, queries, dtype=torch.bool)
        if across == "head":
            by_key.flatten(-2).scatter_(-1, chosen % keys * queries + chosen // keys, kept)
        else:
            (by_key.mT if across == "query" else by_key).scatter_(-1, chosen, kept)
        return cls(by_key.mT, query_block, key_block, _offset(offset, scores))

    @property
    def density(self) -> float:
        """Share of all pairs of blocks that are visited."""
        return float(self.visits.float().mean())

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        shape = tuple(self.visits.shape)
        wanted = -(-queries // self.query_block), -(-keys // self.key_block)
        require(
            shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == wanted,
            "BlockMap",
            lambda: f"visits of shape {shape} for batch {batch}, heads {heads}, {queries} queries and {keys} keys",
            lambda: f"give ({batch} or 1, {heads} or 1, {wanted[0]}, {wanted[1]})",
        )
        require(
            self.offset is not None or queries == keys,
            "BlockMap",
            lambda: f"no offset for {queries} queries and {keys} keys",
            lambda: f"give offset {keys - queries}, where the first query stands among the keys",
        )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = query if self.offset is None else query - self.offset
        visits, index = self.visits, [row // self.query_block, key // self.key_block]
        # An axis of size 1 is taken away, so that the result does not grow along it.
        index = [of for of, size in ((batch, visits.shape[0]), (head, visits.shape[1])) if size > 1] + index
        return visits.squeeze((0, 1))[tuple(index)]

    def aligned(self, tiles: Tiles) -> bool:
        return self.query_block % tiles.query_tile == self.key_block % tiles.key_tile == 0

    def tile_states(self, tiles: Tiles) -> Tensor:
        """By sums over rectangles of blocks."""
        sums = F.pad(self.visits.cpu().cumsum(-1, dtype=torch.int32).cumsum(-2, dtype=torch.int32), (1, 0, 1, 0))
        top = (tiles.query_low - tiles.offset) // self.query_block
        bottom = (tiles.query_high - tiles.offset) // self.query_block + 1
        left, right = tiles.key_low // self.key_block, tiles.key_high // self.key_block + 1
        visited = sums[..., bottom, right] - sums[..., top, right] - sums[..., bottom, left] + sums[..., top, left]
        return classify(visited, (bottom - top) * (right - left))


def block_means(x: Float[Tensor, "*batch length width"], size: int) -> Float[Tensor, "*batch blocks width"]:
    """The mean of each `size` consecutive tokens; of those that are left, in the last."""
    length = x.shape[-2]
    sums = F.pad(x, (0, 0, 0, -length % size)).unflatten(-2, (-1, size)).sum(-2)
    starts = torch.arange(0, length, size, device=x.device)
    return sums / (length - starts).clamp(max=size).to(x.dtype).unsqueeze(-1)


def split_map(mask: Mask | None) -> tuple[BlockMap | None, Mask | None]:
    """The map with the smallest blocks of queries among masks joined by ``&``, and the others."""
    if mask is None:
        return None, None
    parts = _conjuncts(mask)
    maps = [part for part in parts if isinstance(part, BlockMap)]
    if not maps:
        return None, mask
    finest = min(maps, key=lambda part: part.query_block)
    others = [part for part in parts if part is not finest]
    return finest, reduce(And, others) if others else None


def _conjuncts(mask: Mask) -> list[Mask]:
    return _conjuncts(mask.left) + _conjuncts(mask.right) if isinstance(mask, And) else [mask]


def _lines(scores: Tensor, across: Across) -> Tensor:
    """What is chosen from, along the last axis."""
    return {"query": scores, "key": scores.mT, "head": scores.flatten(-2)}[across]


def _highest(lines: Tensor, count: int) -> Tensor | None:
    """Whether each is among the `count` highest of its line and not −∞; None where ties or NaN leave that open.

    By numpy's partition of float32, which is about twice as fast as `topk` on a CPU.
    """
    fit = lines.dtype == torch.float32 and lines.device.type == "cpu" and lines.is_contiguous() and lines.numel() > 0
    if not fit or torch.compiler.is_compiling():
        return None
    lines, place = lines.detach(), lines.shape[-1] - count
    least = torch.from_numpy(np.partition(lines.numpy(), place, axis=-1)[..., place : place + 1])
    chosen, few = lines >= least, least == -torch.inf
    if bool(few.any()):
        chosen &= lines > -torch.inf
    return chosen if bool(((chosen.sum(-1, keepdim=True) == count) | few).all()) else None


def _offset(offset: int, like: Tensor) -> Tensor | None:
    return None if isinstance(offset, int) and offset == 0 else torch.full((), offset, device=like.device)
