"""Masks of models that read images, video and text together. They say which tokens are visual by tensors of flags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from regard.ops.checks import require
from regard.ops.masks.base import Mask, Tiles, states
from regard.ops.masks.patterns import edges
from regard.ops.masks.tensors import of_sample, tile_range


@dataclass(frozen=True, eq=False, repr=False)
class ModalityMutual(Mask):
    """Keys up to the query's own position, and for `visual` queries all `text` keys, later ones too.

    `visual` and `text` are booleans (N,) or (B, N). `text` flags the question: an image that looks at the answer shows
    it to everything after the image. From "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual
    Attention for Multimodal LLMs", 2025, arXiv 2503.02597.
    """

    visual: Bool[Tensor, "*batch keys"]
    text: Bool[Tensor, "*batch keys"]

    def __post_init__(self) -> None:
        _require_flags("ModalityMutual", "visual", self.visual)
        _require_flags("ModalityMutual", "text", self.text)

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        _require_fit("ModalityMutual", "visual", self.visual, batch, queries, keys)
        _require_fit("ModalityMutual", "text", self.text, batch, queries, keys)

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        mutual = of_sample(self.visual, batch, query) & of_sample(self.text, batch, key)
        return (key <= query) | mutual

    def tile_states(self, tiles: Tiles) -> Tensor:
        query_low, query_high, key_low, key_high = edges(tiles)
        visual, text = _Counts(self.visual), _Counts(self.text)
        later = key_low > query_high
        empty = later & ((visual.count(query_low, query_high) == 0) | (text.count(key_low, key_high) == 0))
        # Of the tile's corner above the diagonal.
        full = visual.all(query_low, torch.minimum(query_high, key_high - 1))
        full = full & text.all(torch.maximum(key_low, query_low + 1), key_high)
        return states(empty, full)


@dataclass(frozen=True, eq=False, repr=False)
class CompositeModality(Mask):
    """Keys up to the query's own position for text; for `visual` queries nothing but themselves.

    Attention to oneself alone is the value and output projection of the token, so a visual token passes through a layer
    by the layer's own weights and no score between visual tokens is computed. With ``itself=False`` visual queries get
    zeros. `visual` is a boolean tensor (N,) or (B, N). From "EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal
    Large Language Model", 2024, arXiv 2408.11795, whose code is not public. Its abstract says that visual tokens do not
    attend each other and that each layer's weights align them; that these are the value and output projections, and
    that an image does not look at the text before it, is our reading.
    """

    visual: Bool[Tensor, "*batch keys"]
    itself: bool = True

    def __post_init__(self) -> None:
        _require_flags("CompositeModality", "visual", self.visual)

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        _require_fit("CompositeModality", "visual", self.visual, batch, queries, keys)

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & ~of_sample(self.visual, batch, query)
        return seen | (key == query) if self.itself else seen

    def tile_states(self, tiles: Tiles) -> Tensor:
        query_low, query_high, key_low, key_high = edges(tiles)
        visual = self.visual.cpu()[..., tiles.offset :]
        place = torch.arange(tiles.offset, tiles.keys)
        # Query i looks at the keys first … last.
        first, last = place * visual, place.where(~visual | self.itself, -1)
        latest_first, latest_text = (
            tile_range(values, tiles.query_tile)[1][..., None] for values in (first, place.where(~visual, -1))
        )
        earliest_last = tile_range(last, tiles.query_tile)[0][..., None]
        diagonal = (key_low <= query_high) & (key_high >= query_low) & self.itself
        return states((key_low > latest_text) & ~diagonal, (latest_first <= key_low) & (key_high <= earliest_last))


@dataclass(frozen=True, eq=False, repr=False)
class MixedBidirectionalVision(Mask):
    """Keys up to the query's own position for text, up to the end of its image for a visual query.

    `until` is an integer tensor (N,) or (B, N): the last key that each position may look at; see `from_visual`. From
    "Croc: Pretraining Large Multimodal Models with Cross-Modal Comprehension", 2024, arXiv 2410.14332. (The released
    code lets all of the prompt look at all of it, text included: that is ``Causal() | Prefix(n)``.)
    """

    until: Int[Tensor, "*batch keys"]

    def __post_init__(self) -> None:
        require(
            self.until.ndim in (1, 2) and not self.until.is_floating_point() and self.until.dtype != torch.bool,
            "MixedBidirectionalVision",
            f"until of shape {tuple(self.until.shape)} and dtype {self.until.dtype}",
            "give integers of shape (N,) or (B, N), or use MixedBidirectionalVision.from_visual(flags)",
        )

    @classmethod
    def from_visual(cls, visual: Bool[Tensor, "*batch keys"]) -> Self:
        """The mask for flags of the visual tokens: a run of them is one image."""
        _require_flags("MixedBidirectionalVision", "visual", visual)
        index = torch.arange(visual.shape[-1], device=visual.device).expand_as(visual)
        goes_on = visual & F.pad(visual[..., 1:], (0, 1))
        ends = index.masked_fill(goes_on, visual.shape[-1])
        return cls(ends.flip(-1).cummin(-1).values.flip(-1))

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        _require_fit("MixedBidirectionalVision", "until", self.until, batch, queries, keys)

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= of_sample(self.until, batch, query)

    def tile_states(self, tiles: Tiles) -> Tensor:
        until = self.until.cpu()[..., tiles.offset :]
        earliest, latest = (edge[..., None] for edge in tile_range(until, tiles.query_tile))
        return states(tiles.key_low > latest, tiles.key_high <= earliest)


@dataclass(frozen=True, eq=False, repr=False)
class CausalCross(Mask):
    """Cross-attention from `queries` that share out the time of a video, each to what was shown before its time ends.

    Query i of N looks at frame f of T where ``f / T < (i + 1) / N``: the first group of queries at the first frame, the
    last at all, the same share of the video however many frames were taken from it. A frame is `frame_tokens`
    consecutive keys. `frames` is a number, or an integer tensor (B,) for videos of several lengths padded to `keys`
    keys; what stands behind the last frame is not looked at. From "Video-CCAM: Enhancing Video-Language Understanding
    with Causal Cross-Attention Masks for Short and Long Videos", 2024, arXiv 2408.14023. The rounding where T does not
    divide N is ours: the authors' repository does not hold the code of the mask, which comes with their checkpoints.
    """

    queries: int
    frames: int | Int[Tensor, " batch"]
    frame_tokens: int
    keys: int = None  # pyright: ignore[reportAssignmentType] filled in below

    def __post_init__(self) -> None:
        for name in ("queries", "frame_tokens"):
            value = getattr(self, name)
            require(value > 0, "CausalCross", f"{name} {value} is not positive", "count from 1")
        if isinstance(self.frames, Tensor):
            require(
                self.frames.ndim == 1 and not self.frames.is_floating_point() and self.frames.dtype != torch.bool,
                "CausalCross",
                f"frames of shape {tuple(self.frames.shape)} and dtype {self.frames.dtype}",
                "give an integer tensor with one number per sample",
            )
            require(
                self.keys is not None, "CausalCross", "frames of each sample without keys", "give the padded length"
            )
        else:
            require(self.frames > 0, "CausalCross", f"frames {self.frames} is not positive", "count from 1")
            if self.keys is None:
                object.__setattr__(self, "keys", self.frames * self.frame_tokens)

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        require(
            (queries, keys) == (self.queries, self.keys),
            "CausalCross",
            lambda: f"{queries} queries and {keys} keys, made for {self.queries} and {self.keys}",
            "make the mask for the sizes of the call",
        )
        if isinstance(self.frames, Tensor):
            count = self.frames.shape[0]
            require(
                count == batch,
                "CausalCross",
                lambda: f"frames has {count} entries for a batch of {batch}",
                "give one number per sample",
            )

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        frames = self.frames[batch] if isinstance(self.frames, Tensor) else self.frames
        return self._begins_before(key, query, frames)

    def tile_states(self, tiles: Tiles) -> Tensor:
        frames = self.frames.cpu().view(-1, 1, 1, 1) if isinstance(self.frames, Tensor) else self.frames
        query_low, query_high, key_low, key_high = edges(tiles)
        return states(
            ~self._begins_before(key_low, query_high, frames), self._begins_before(key_high, query_low, frames)
        )

    def _begins_before(self, key: Tensor, query: Tensor, frames: Tensor | int) -> Tensor:
        index = query - (self.keys - self.queries)
        return key // self.frame_tokens * self.queries < (index + 1) * frames


class _Counts:
    """How many flags of a range are set, both ends included, for ranges given by tensors."""

    def __init__(self, flags: Tensor) -> None:
        before = F.pad(flags.cpu().cumsum(-1), (1, 0))
        self.before = before if flags.ndim == 1 else before[:, None]

    def count(self, low: Tensor, high: Tensor) -> Tensor:
        return self.before[..., (high + 1).clamp(min=0)] - self.before[..., low.clamp(max=self.before.shape[-1] - 1)]

    def all(self, low: Tensor, high: Tensor) -> Tensor:
        return (high < low) | (self.count(low, high) == high - low + 1)


def _require_flags(owner: str, name: str, flags: Tensor) -> None:
    require(
        flags.ndim in (1, 2) and flags.dtype == torch.bool,
        owner,
        f"{name} of shape {tuple(flags.shape)} and dtype {flags.dtype}",
        "give booleans of shape (N,) or (B, N)",
    )


def _require_fit(owner: str, name: str, values: Tensor, batch: int, queries: int, keys: int) -> None:
    require(
        tuple(values.shape) in ((keys,), (batch, keys)),
        owner,
        lambda: f"{name} of shape {tuple(values.shape)} for batch {batch} and {keys} keys",
        lambda: f"give one entry per key: ({keys},) or ({batch}, {keys})",
    )
    require(
        queries <= keys, owner, lambda: f"{queries} queries for {keys} keys", "queries are the last keys: give no more"
    )
