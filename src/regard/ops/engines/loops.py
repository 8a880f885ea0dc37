"""Which loop of the tiled engine a call takes."""

from __future__ import annotations

from torch import Tensor

from regard.ops.blocks import split_map
from regard.ops.engines.chosen import ChosenLoop, tile_of
from regard.ops.engines.routed import RoutedLoop
from regard.ops.engines.tile_kinds import PointwiseLoop, SoftmaxLoop, SoftplusLoop
from regard.ops.engines.tile_loop import NARROW_TILE, TileLoop
from regard.ops.masks import Mask
from regard.ops.normalizers import Normalizer, Pointwise, Softmax, SoftplusL1


def loop_for(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_tensors: list[Tensor],
    bias_tensors: list[Tensor],
    seed: Tensor | None,
    mask: str,
    bias: str,
    normalizer: str,
    scale: float,
    dropout: float,
) -> TileLoop:
    """The loop for a call as it travels through the operator."""
    chosen = Normalizer.unflatten(normalizer, [])
    own_mask = Mask.unflatten(mask, mask_tensors) if mask else None
    arguments = query, key, value, (bias, bias_tensors), own_mask, seed, scale, dropout
    if isinstance(chosen, Pointwise):
        loop = PointwiseLoop(*arguments)
        loop.normalizer = chosen
        return loop
    if isinstance(chosen, SoftplusL1):
        loop = SoftplusLoop(*arguments)
        loop.normalizer = chosen
        return loop
    blocks, rest = split_map(own_mask)
    if blocks is not None and isinstance(chosen, Softmax):
        tile, own_choices = tile_of(blocks), blocks.visits.shape[0] * blocks.visits.shape[1] > 1
        if blocks.query_block < NARROW_TILE:
            loop = RoutedLoop(*arguments)
            loop.gather_for(blocks, rest)
            return loop
        if tile is not None and own_choices:
            loop = ChosenLoop(*arguments)
            loop.gather_by(tile)
            return loop
    return SoftmaxLoop(*arguments)
