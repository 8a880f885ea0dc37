"""The masks that kernels are measured with, and how many pairs each of them allows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from regard.ops.blocks import BlockMap
from regard.ops.masks import CandidateIsolation, Causal, Dilated, Mask, Prefix, Segments, Tiles, Window, plan
from regard.ops.masks.base import FULL, PARTIAL

SHORTEST = 64
"""Tokens from which on no two patterns are the same."""
TILE = 128


def _window(length: int, heads: int) -> Mask:
    return Window(min(256, length // 4) - 1, 0)


def _dilated(length: int, heads: int) -> Mask:
    return Dilated(min(64, length // 32), 8)


def _documents(length: int, heads: int) -> Mask:
    """Six documents as uneven as the Fibonacci numbers: every length there is, and few of them multiples of a tile."""
    ends = [length * part // 32 for part in (0, 1, 3, 6, 11, 19, 32)]
    return Segments.from_lengths([end - start for start, end in pairwise(ends)]) & Causal()


def _prefix(length: int, heads: int) -> Mask:
    return Causal() | Prefix(length // 4)


def _shared_question(length: int, heads: int) -> Mask:
    question, answers = length // 4, 6
    ends = [question + (length - question) * answer // answers for answer in range(answers + 1)]
    lengths = [end - start for start, end in pairwise(ends)]
    return CandidateIsolation.from_lengths(question, lengths, "one_way") & Causal()


def _blocks(part: int) -> Callable[[int, int], Mask]:
    """One of so many blocks for each block of queries, its own among them; every head has chosen for itself."""

    def make(length: int, heads: int) -> Mask:
        size = max(1, min(128, length // 16))
        count = -(-length // size)
        scores = torch.rand(1, heads, count, count, generator=torch.Generator().manual_seed(part))
        scores.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        return BlockMap.top_k(scores, max(1, count // part), query_block=size, key_block=size)

    return make


PATTERNS: dict[str, Callable[[int, int], Mask | None]] = {
    "full": lambda length, heads: None,
    "causal": lambda length, heads: Causal(),
    "window": _window,
    "dilated": _dilated,
    "documents": _documents,
    "prefix": _prefix,
    "shared_question": _shared_question,
    "blocks_1/2": _blocks(2),
    "blocks_1/8": _blocks(8),
    "blocks_1/16": _blocks(16),
}
"""By name, the mask for a length and a number of heads."""


def count_pairs(mask: Mask | None, heads: int, length: int) -> int:
    """How many (head, query, key) the mask of one sample allows: full tiles of its plan, and partial ones looked at.

    Never builds the N×N mask: a row of tiles at a time.
    """
    if mask is None:
        return heads * length**2
    mask = mask.to(torch.device("cpu"))
    tiles = Tiles(1, heads, length, length, TILE, TILE)
    states = plan(mask, tiles).states[0]
    each = heads // states.shape[0]
    sizes = (tiles.query_high - tiles.query_low + 1) * (tiles.key_high - tiles.key_low + 1)
    total = each * int((sizes * (states == FULL)).sum())
    for row in range(states.shape[1]):
        queries = torch.arange(int(tiles.query_low[row]), int(tiles.query_high[row]) + 1)
        total += _pairs_in_partial(mask, states[:, row] == PARTIAL, queries, heads, length)
    return total


def _pairs_in_partial(mask: Mask, partial: Tensor, queries: Tensor, heads: int, length: int) -> int:
    """Of one row of tiles, given for each head or for all which of them are partial."""
    keys = torch.arange(length)
    keys = keys[partial.any(0)[keys // TILE]]
    if not len(keys):
        return 0
    head = torch.arange(heads).view(-1, 1, 1)
    allowed = mask.allows(torch.zeros(1, 1, 1, 1, dtype=torch.int64), head, queries[:, None], keys)
    allowed = allowed & partial[:, None, keys // TILE]
    allowed = allowed.expand(*allowed.shape[:-2], len(queries), len(keys))
    seen = allowed.shape[-3]
    return heads // seen * int(allowed.sum())
