"""Random calls of `attention` for hypothesis: odd shapes, any mask expression, every bias and normalizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from regard.ops.biases import Alibi, Bias, RelativeBias
from regard.ops.blocks import BlockMap
from regard.ops.masks import (
    Blocks,
    CandidateIsolation,
    Causal,
    CausalCross,
    CompositeModality,
    Dense,
    Dilated,
    Keys,
    LocalBlocks,
    Mask,
    MixedBidirectionalVision,
    ModalityMutual,
    Ordered,
    Padding,
    Prefix,
    Segments,
    Sharded,
    Sinks,
    Window,
)

# Lengths around the edges of a tile of 128, and far from any.
LENGTHS = st.one_of(st.integers(1, 40), st.sampled_from([1, 63, 127, 128, 129, 200, 257, 300]))


@dataclass(frozen=True)
class Sizes:
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int

    def tensors(self, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()

        return (
            draw(self.batch, self.heads, self.queries, self.head_dim),
            draw(self.batch, self.key_heads, self.keys, self.head_dim),
            draw(self.batch, self.key_heads, self.keys, self.value_dim),
        )


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    key_heads = draw(st.integers(1, 3))
    return Sizes(
        batch=draw(st.integers(1, 3)),
        heads=key_heads * draw(st.integers(1, 3)),
        key_heads=key_heads,
        queries=draw(LENGTHS),
        keys=draw(LENGTHS),
        head_dim=draw(st.integers(1, 9)),
        value_dim=draw(st.integers(1, 9)),
    )


@st.composite
def base_masks(draw: st.DrawFn, size: Sizes) -> Mask:
    n, small = max(size.queries, size.keys), st.integers(0, 40)
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def flags(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random) < draw(st.sampled_from([0.0, 0.05, 0.5, 1.0]))

    def ids(*shape: int) -> Tensor:
        return torch.randint(0, 4, shape, generator=random).sort(-1).values

    def over_keys() -> tuple[int, ...]:
        return draw(st.sampled_from([(size.keys,), (size.batch, size.keys)]))

    def sharded(places: Tensor | None = None) -> Mask:
        numbers = [draw(st.integers(1, most)) for most in (70, 4, 5)]
        group = draw(st.sampled_from([1, size.heads // size.key_heads]))
        return Sharded(*numbers, draw(st.integers(0, 2)), draw(st.integers(0, 3)), group, places)

    def frames() -> int | Tensor:
        most = -(-size.keys // 7)
        return draw(st.sampled_from([most, torch.randint(0, most + 1, (size.batch,), generator=random)]))

    def block_map(query_blocks: list[int]) -> Mask:
        rows, columns = draw(st.sampled_from(query_blocks)), draw(st.sampled_from([1, 7, 64, 100, 128]))
        samples, heads = draw(st.sampled_from([1, size.batch])), draw(st.sampled_from([1, size.heads]))
        visits = flags(samples, heads, -(-size.queries // rows), -(-size.keys // columns))
        return BlockMap(visits, rows, columns, torch.tensor(size.keys - size.queries))

    kinds = {
        "blocks of queries": lambda: block_map([64, 100, 128]),
        "blocks of single queries": lambda: block_map([1, 3]),
        "causal": lambda: Causal(),
        "window": lambda: Window(draw(small), draw(small)),
        "sinks": lambda: Sinks(draw(small)),
        "prefix": lambda: Prefix(draw(small)),
        "prefixes": lambda: Prefix(torch.randint(0, size.keys + 1, (size.batch,), generator=random)),
        "blocks": lambda: Blocks(draw(st.integers(1, n))),
        "dilated": lambda: Dilated(draw(small), draw(st.integers(1, 5))),
        "padding": lambda: Padding(torch.randint(0, size.keys + 1, (size.batch,), generator=random)),
        "keys": lambda: Keys(flags(size.keys)),
        "keys of each": lambda: Keys(flags(size.batch, size.keys)),
        "segments": lambda: Segments(ids(size.batch, size.keys), ids(size.batch, size.queries)),
        "in order": lambda: Ordered(ids(size.batch, size.queries), ids(size.batch, size.keys)),
        "dense": lambda: Dense(flags(size.queries, size.keys)),
        "dense by head": lambda: Dense(flags(1, size.heads, size.queries, size.keys)),
        "dense by sample and head": lambda: Dense(flags(size.batch, size.heads, size.queries, size.keys)),
        "local blocks": lambda: LocalBlocks(draw(st.integers(1, n)), draw(st.integers(1, 4))),
        "sharded": sharded,
        "causal cross": lambda: CausalCross(size.queries, frames(), 7, size.keys),
    }
    if size.queries <= size.keys:
        kinds |= {
            "sharded packed": lambda: sharded(Segments(ids(*over_keys())).places()),
            "modality mutual": lambda: ModalityMutual(flags(*over_keys()), flags(*over_keys())),
            "composite": lambda: CompositeModality(flags(*over_keys()), draw(st.booleans())),
            "bidirectional vision": lambda: MixedBidirectionalVision.from_visual(flags(*over_keys())),
            "candidates": lambda: CandidateIsolation(
                ids(*over_keys()), draw(st.sampled_from(["arrow", "one_way", "diagonal"]))
            ),
        }
    return kinds[draw(st.sampled_from(sorted(kinds)))]()


@st.composite
def masks(draw: st.DrawFn, size: Sizes) -> Mask | None:
    if draw(st.booleans()) and draw(st.booleans()):
        return None
    mask = draw(base_masks(size))
    for _ in range(draw(st.integers(0, 2))):
        other = draw(base_masks(size))
        mask = {"and": mask & other, "or": mask | other, "not": ~mask}[draw(st.sampled_from(["and", "or", "not"]))]
    return mask


@st.composite
def biases(draw: st.DrawFn, size: Sizes, dtype: torch.dtype) -> Bias | None:
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def table(entries: int) -> Tensor:
        values = torch.randn(size.heads, entries, generator=random, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    kinds = {
        "none": lambda: None,
        "alibi": lambda: Alibi(table(1).detach()[:, 0].abs().requires_grad_()),
        "clipped": lambda: RelativeBias(table(2 * 7 + 1), 7),
        "one-sided buckets": lambda: RelativeBias(table(16), 64, None, False),
        "two-sided buckets": lambda: RelativeBias(table(16), 64, None, True),
    }
    return kinds[draw(st.sampled_from(sorted(kinds)))]()
