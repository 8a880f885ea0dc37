"""VMoBA. "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", Wu et al., 2025, arXiv 2506.23858.

    blocks of keys in layer l   l mod 3 = 0:  s frames, whole                          `temporal_block`
                                l mod 3 = 1:  s_h × s_w patches, of all frames         `spatial_block`
                                l mod 3 = 2:  s_t × s_h × s_w patches                  `video_block`
    S_ic = q_i · mean(keys of block c);   Ŝ = (S − min S) / (max S − min S)    over all queries and blocks of a head
    G    = every query with its own block, then the pairs (i, c) of the head with the largest Ŝ, the fewest that bring
           the sum of Ŝ over G to τ Σ Ŝ
    o_i  = softmax over the j in blocks c with (i, c) in G of (q_i · k_j / √d_h), times v_j

τ is `threshold`. With `top_k` a head has k pairs for each of its queries instead, own ones included, wherever they are.
Queries compete: one may visit many blocks and another its own alone, and a head whose similarities are concentrated
visits few. Choosing has no gradient and no parameters. ``threshold = 1`` is full attention; the attribute may be set
anew at any time, as where the first steps of diffusion are full.

Cost: time O(n c d + p n² d) for c blocks of which a share p is visited, memory O(n (d + h c)).

Differences: of the paper the partition, the choice over a head and the threshold were read in its abstract and in
reports of it, and normalisation and own blocks in the authors' code, whose normalisation also mixes the samples of a
batch and which adds one pair even where the own blocks reach τ. The code refuses spatial axes that blocks do not
divide; here the last blocks are shorter. Sizes of blocks are free in the paper: by default there are as many as in the
authors' FLOPs script, 7, 40 and 60 for 21 × 20 × 32 patches.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.conversion import converted
from regard.nn.heads.multi_head import MultiHeadAttention
from regard.nn.mechanism import Mechanism, head_width
from regard.ops.attention import attention
from regard.ops.blocks import BlockMap
from regard.ops.checks import require, require_grid
from regard.ops.masks import Keys
from regard.ops.precision import statistics_dtype, without_autocast

HALF = 15
"""Bits in half of a float32 between 0 and 1, whose first two bits are 0."""


@register(
    "vmoba",
    paper="vmoba",
    contract=Contract(
        input="grid",
        patterns=("noncausal self",),
        time="n*n*d",
        # Blocks are as many as frames, and these no more than the patches of one.
        memory="n*d+h*n*sqrt(n)/temporal_block",
        exact=True,
        grid_dims=(3,),
        options=(
            OptionSet({"temporal_block": 2, "threshold": 0.6}),
            OptionSet({"layer": 4, "spatial_block": (2, 4)}, {"memory": "n*d+h*n*n/8"}),
            OptionSet({"layer": 2, "video_block": (2, 2, 3), "top_k": 2}, {"memory": "n*d+h*n*n/12"}),
            # A key's bias adds the same to every score of a row, which softmax takes off again.
            OptionSet(
                {"temporal_block": 1, "threshold": 1.0, "bias": True}, {"frozen": ("key.bias",), "memory": "n*d"}
            ),
            OptionSet({"temporal_block": 1, "head_dim": 6}),
        ),
    ),
)
class VideoMixtureOfBlock(Mechanism):
    """Queries of a video compete for blocks of keys, which are frames, regions or both, by turns of the layers.

    Args:
        dim: width of a position.
        heads: number of heads.
        layer: which layer of a model this is, from 0; it decides how keys are cut into blocks.
        temporal_block: frames of a block in layers 0, 3, 6, ….
        spatial_block: height and width of a block, of all frames, in layers 1, 4, 7, ….
        video_block: frames, height and width of a block in layers 2, 5, 8, …. No block is larger than the grid.
        threshold: share of the similarity of a head that is visited, in (0, 1]; may be set anew.
        top_k: number of blocks visited by a query on average, its own included, in place of the threshold.
        head_dim: width of a head; ``dim / heads`` by default.
        bias: whether the projections have biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        layer: int = 0,
        temporal_block: int = 3,
        spatial_block: tuple[int, int] = (4, 4),
        video_block: tuple[int, int, int] = (7, 4, 8),
        threshold: float = 0.25,
        top_k: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, head_width(self._name, dim, heads, head_dim)
        sizes = {"temporal_block": (temporal_block,), "spatial_block": spatial_block, "video_block": video_block}
        for axes, (name, size) in enumerate(sizes.items(), start=1):
            require(len(size) == axes and min(size) > 0, self._name, f"{name} {size}", f"give {axes} positive numbers")
        require(layer >= 0, self._name, f"layer {layer}", "count layers from 0")
        require(0.0 < threshold <= 1.0, self._name, f"threshold {threshold}", "give a share in (0, 1]")
        require(top_k is None or top_k > 0, self._name, f"top_k {top_k}", "give a positive number of blocks, or None")
        # What an axis has no size for is not cut.
        self.block = [(temporal_block, None, None), (None, *spatial_block), video_block][layer % 3]
        self.threshold, self.top_k = threshold, top_k
        factory = {"device": device, "dtype": dtype}
        width = heads * self.head_dim
        self.query, self.key, self.value = (nn.Linear(dim, width, bias=bias, **factory) for _ in range(3))
        self.output = nn.Linear(width, dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform projections, zero biases."""
        for projection in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    @classmethod
    def from_multi_head(
        cls,
        layer: MultiHeadAttention,
        *,
        index: int,
        temporal_block: int = 3,
        spatial_block: tuple[int, int] = (4, 4),
        video_block: tuple[int, int, int] = (7, 4, 8),
        threshold: float = 0.25,
    ) -> VideoMixtureOfBlock:
        """The layer number `index` of a model to train on from a trained one with full attention."""
        return converted(
            cls,
            layer,
            layer=index,
            temporal_block=temporal_block,
            spatial_block=spatial_block,
            video_block=video_block,
            threshold=threshold,
        )

    def forward(self, x: Float[Tensor, "batch time height width dim"]) -> Float[Tensor, "batch time height width dim"]:
        """Attend from the video to itself."""
        self.check_shape(x, "(batch, time, height, width, dim)", 5)
        self.check_width(x, self.dim)
        grid, pattern = x.shape[1:4], "batch time height width (heads d) -> batch heads (time height width) d"
        query, key, value = (
            rearrange(part(x), pattern, heads=self.heads) for part in (self.query, self.key, self.value)
        )
        mixed = self.attend(query, key, value, (grid[0], grid[1], grid[2]))
        return self.output(rearrange(mixed, "batch heads length d -> batch length (heads d)").unflatten(1, grid))

    def attend(
        self,
        query: Float[Tensor, "batch heads length head_dim"],
        key: Float[Tensor, "batch heads length head_dim"],
        value: Float[Tensor, "batch heads length head_dim"],
        grid: tuple[int, int, int],
    ) -> Float[Tensor, "batch heads length head_dim"]:
        """Attention between projected heads over a flattened grid, turned by their positions where a model has some."""
        require_grid(self._name, grid, query.shape[2], key.shape[2])
        if self.top_k is None and self.threshold == 1.0:
            return attention(query, key, value)
        tokens, own = cut(grid, self.block, key.device)
        filled = tokens >= 0
        # Where blocks are short, places beyond the grid repeat its first token, and no one sees them.
        key, value = (part.index_select(2, tokens.clamp(min=0).flatten()) for part in (key, value))
        chosen = self.route(query, key, filled, own)
        divided = tokens.numel() == query.shape[2]
        return attention(query, key, value, mask=chosen if divided else chosen & Keys(filled.flatten()))

    @torch.no_grad()
    def route(
        self,
        query: Float[Tensor, "batch heads length head_dim"],
        key: Float[Tensor, "batch heads places head_dim"],
        filled: Bool[Tensor, "blocks size"],
        own: Int[Tensor, " length"],
    ) -> BlockMap:
        """The blocks, laid one after the other in `key`, that queries visit, given the own block of each."""
        dtype, (blocks, size) = statistics_dtype(query.dtype), filled.shape
        real = filled.to(dtype)
        with without_autocast(query.device):
            means = torch.einsum("bhcsd,cs->bhcd", key.to(dtype).unflatten(2, (blocks, size)), real)
            scores = query.to(dtype) @ (means / real.sum(-1, keepdim=True)).mT
        given = {"query_block": 1, "key_block": size, "offset": key.shape[2] - query.shape[2]}
        if self.top_k is not None:
            scores.scatter_(3, own[:, None].expand(*scores.shape[:3], 1), torch.inf)
            return BlockMap.top_k(scores, self.top_k, across="head", **given)
        is_own = own[:, None] == torch.arange(blocks, device=own.device)
        lowest, highest = scores.amin((-2, -1), keepdim=True), scores.amax((-2, -1), keepdim=True)
        weights = ((scores - lowest) / (highest - lowest).clamp(min=torch.finfo(dtype).tiny)).float().nan_to_num(0.0)
        others = weights.masked_fill(is_own, 0.0)
        wanted = self.threshold * weights.sum((-2, -1)) - (weights * is_own).sum((-2, -1))
        least = least_that_reach(others.flatten(-2), wanted[..., None])
        return BlockMap.threshold((others - least[..., None]).masked_fill(is_own, torch.inf), 0.0, **given)


def cut(
    grid: tuple[int, int, int], block: tuple[int | None, int | None, int | None], device: torch.device
) -> tuple[Int[Tensor, "blocks size"], Int[Tensor, " length"]]:
    """The tokens of each block of a flattened grid, −1 where it goes beyond the grid, and the block of each token.

    An axis without a size is not cut.
    """
    sizes = [length if size is None else min(size, length) for length, size in zip(grid, block, strict=True)]
    counts = [-(-length // size) for length, size in zip(grid, sizes, strict=True)]
    tokens = torch.arange(grid[0] * grid[1] * grid[2], device=device).view(grid)
    beyond = [count * size - length for length, size, count in zip(grid, sizes, counts, strict=True)]
    tokens = F.pad(tokens, (0, beyond[2], 0, beyond[1], 0, beyond[0]), value=-1)
    tokens = rearrange(tokens, "(t a) (h b) (w c) -> (t h w) (a b c)", t=counts[0], h=counts[1], w=counts[2])
    t, h, w = (torch.arange(length, device=device) // size for length, size in zip(grid, sizes, strict=True))
    return tokens, ((t[:, None, None] * counts[1] + h[:, None]) * counts[2] + w).flatten()


def least_that_reach(weights: Float[Tensor, "*lines pairs"], wanted: Float[Tensor, "*lines 1"]) -> Tensor:
    """Of the largest weights, the fewest that sum up to what is wanted: the least of them; ∞ where none is wanted.

    Weights are float32 in [0, 1], whose bits are in the order of their values: the upper half of the least one's is
    found from sums over all weights with the same, then the lower half. That is several times faster than sorting.
    """
    bits = weights.view(torch.int32)
    upper, above = _crossing(bits >> HALF, weights, wanted)
    lower = (bits & ((1 << HALF) - 1)).masked_fill(bits >> HALF != upper, 1 << HALF)
    least = (upper << HALF) | _crossing(lower, weights, wanted - above)[0]
    return least.view(torch.float32).masked_fill(wanted <= 0, torch.inf)


def _crossing(place: Int[Tensor, "*lines pairs"], weights: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The highest place from which on weights sum up to what is wanted, and their sum beyond it."""
    sums = weights.new_zeros(*weights.shape[:-1], (1 << HALF) + 1).scatter_add_(-1, place.long(), weights)[..., :-1]
    upwards = sums.flip(-1).cumsum(-1).flip(-1)
    at = ((upwards >= wanted).sum(-1, keepdim=True) - 1).clamp(min=0)
    return at.int(), (upwards - sums).gather(-1, at)
