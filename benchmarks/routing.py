"""Attention that chooses: 1/8 and 1/16 of the scores of dense attention, choosing included, against SDPA.

Heads are given on both sides and projected on neither. The ideal is as many times faster as there are fewer scores.
Seconds are the least of seven runs on either side, in rounds of all cases and both dense peers: runs of seconds on a
shared machine scatter by a quarter, and drift by more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import Row, keep_freed_memory, report, threads_argument, times
from regard.nn import (
    MixtureOfBlockAttention,
    MixtureOfSparseAttention,
    RoutingAttention,
    SeerAttention,
    VideoMixtureOfBlock,
)
from regard.nn.sparse.seer import Heads
from regard.ops import attention
from regard.ops.blocks import BlockMap, block_means
from regard.ops.masks import Causal

HEADS, WIDTH, LENGTH, BLOCK = 8, 64, 16384, 128
DIM, FEWER = HEADS * WIDTH, (8, 16)
BLOCKS, TOKENS = 0.6, 0.45
"""Shares of the ideal to reach: 0.6, but 0.45 where single queries choose blocks of keys."""
DOUBLED = 2.3

least = partial(times, repeats=7, of=min)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Choose = Callable[[Tensor, Tensor, Tensor], BlockMap]


@cache
def inputs(length: int) -> list[Tensor]:
    """Query, key, value and the gradient of what comes of them: the same for all cases."""
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, length, WIDTH, requires_grad=at < 3) for at in range(4)]


def forward_backward(attend: Attend, length: int = LENGTH) -> Callable[[], object]:
    *tensors, seed = inputs(length)
    return lambda: torch.autograd.grad(attend(*tensors), tensors, seed, allow_unused=True)


def moba(top_k: int) -> Choose:
    layer = MixtureOfBlockAttention(DIM, heads=HEADS, block_size=BLOCK, top_k=top_k)
    return lambda query, key, value: layer.route(query, block_means(key.detach(), BLOCK), key.shape[2])


def seer(top_k: int) -> Choose:
    """The gate of a prompt, whose blocks of queries choose together."""
    layer = SeerAttention(DIM, heads=HEADS, block_size=BLOCK, top_k=top_k, position=None, causal=True)

    def choose(query: Tensor, key: Tensor, value: Tensor) -> BlockMap:
        length = query.shape[2]
        return layer.chosen(
            Heads(query, key, value, torch.arange(length), torch.ones(1, length, dtype=torch.bool)), BLOCK
        )

    return choose


def chosen(choose: Choose) -> Attend:
    return lambda query, key, value: attention(query, key, value, mask=choose(query, key, value) & Causal())


def vmoba(top_k: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Over a video, of which a block is 2 frames of 8 × 8 patches."""
    grid = (query.shape[2] // 1024, 32, 32)
    layer = VideoMixtureOfBlock(DIM, heads=HEADS, layer=2, video_block=(2, 8, 8), top_k=top_k)
    return layer.attend(query, key, value, grid)


def mosa(fewer: int) -> Attend:
    """The heads are projected from all tokens here; the layer projects its chosen ones alone."""
    sparsity = round(fewer**0.5)
    layer = MixtureOfSparseAttention(DIM, heads=HEADS, sparsity=sparsity, dense_heads=0, masked=True)
    x = torch.randn(1, LENGTH, DIM)

    def attend(*heads: Tensor) -> Tensor:
        routed = layer.choose(x)
        places = routed.index[..., None].expand(-1, -1, -1, WIDTH)
        mixed = attention(*(each.gather(2, places) for each in heads), mask=layer.own_mask(routed))
        return torch.zeros_like(heads[0]).scatter_add(2, places, mixed * routed.scores[..., None])

    return attend


def routing(fewer: int) -> Attend:
    layer = RoutingAttention(DIM, heads=HEADS, local_heads=0, clusters=fewer, masked=True, shared=True).eval()
    return lambda query, key, value: layer.attend(query, query, value)


def share(map_of: BlockMap) -> float:
    """Scores under the causal mask, as a share of all that the causal mask has."""
    rows, columns = map_of.visits.shape[-2:]
    row, column = torch.arange(rows)[:, None] * map_of.query_block, torch.arange(columns) * BLOCK
    past = (column + BLOCK <= row) * float(map_of.query_block * BLOCK)
    first = row - column + 1
    own = (column <= row) & (row < column + BLOCK)
    inside = own * (map_of.query_block * first + map_of.query_block * (map_of.query_block - 1) / 2)
    return float((map_of.visits * (past + inside)).sum((-2, -1)).mean() / (LENGTH * (LENGTH + 1) / 2))


def enough(make: Callable[[int], Choose], fewer: int) -> int:
    """The top-k that visits 1/fewer of the causal scores, or a little more."""
    tensors = [tensor.detach() for tensor in inputs(LENGTH)[:3]]
    return next(k for k in range(1, LENGTH // BLOCK) if share(make(k)(*tensors)) >= 1 / fewer)


@dataclass(frozen=True)
class Case:
    """What chooses, how many of the dense scores it computes, and the share of the ideal that it is to reach."""

    name: str
    attend: Attend
    causal: bool
    density: float
    goal: float

    def row(self, ours: float, dense: float) -> Row:
        ratio, target = dense / ours, self.goal / self.density
        peer = f"SDPA{' is_causal' if self.causal else ''}"
        detail: dict[str, float | str] = {
            "scores of dense": self.density,
            "share of the ideal": ratio * self.density,
        }
        return Row(self.name, peer, ratio, f"≥ {target:.2f}", ratio >= target, ours, dense, detail)


def cases(fewer: int) -> Iterator[Case]:
    """All that chooses 1/fewer of the scores."""
    for name, make, goal in (("seer, blocks of queries", seer, BLOCKS), ("moba, single queries", moba, TOKENS)):
        top_k = enough(make, fewer)
        density = share(make(top_k)(*[tensor.detach() for tensor in inputs(LENGTH)[:3]]))
        yield Case(f"{name}, top_k {top_k} of {LENGTH // BLOCK}", chosen(make(top_k)), True, density, goal)
    count = LENGTH // BLOCK // fewer
    video = f"vmoba, single queries of a video, {count} of {LENGTH // BLOCK} on average"
    yield Case(video, partial(vmoba, count), False, 1 / fewer, BLOCKS)
    every = round(fewer**0.5)
    yield Case(f"mosa, one token of {every} a head", mosa(fewer), True, 1 / every**2, BLOCKS)
    clusters = f"routing_transformer, {fewer} clusters, later tokens hidden"
    yield Case(clusters, routing(fewer), True, 1 / fewer, BLOCKS)


def doubled(case: str, attend: Attend) -> Row:
    half, whole = least(forward_backward(attend, LENGTH // 2), forward_backward(attend))
    name = f"{case}, {LENGTH} tokens"
    return Row(name, f"{LENGTH // 2} tokens", whole / half, f"≤ {DOUBLED}", whole / half <= DOUBLED, whole, half)


def main() -> list[Row]:
    exact = [forward_backward(partial(F.scaled_dot_product_attention, is_causal=causal)) for causal in (False, True)]
    every = [case for fewer in FEWER for case in cases(fewer)]
    full, causal, *ours = least(*exact, *(forward_backward(case.attend) for case in every))
    rows = [case.row(seconds, causal if case.causal else full) for case, seconds in zip(every, ours, strict=True)]
    rows.append(doubled("seer, top_k 8", chosen(seer(8))))
    rows.append(doubled("moba, top_k 8", chosen(moba(8))))
    rows.append(doubled("vmoba, top_k 8", partial(vmoba, 8)))
    return rows


if __name__ == "__main__":
    threads_argument()
    keep_freed_memory()
    report("routing", main())
