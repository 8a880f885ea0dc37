"""A ranker of responses: a context and all its candidates in one pass of an encoder around any mechanism.

"Uni-Encoder: A Fast and Accurate Response Selection Paradigm for Generation-Based Dialogue Systems", Song et al., 2021,
arXiv 2106.01263.

    row      = [context, candidate 1, …, candidate R]
    x        = token + position + type embeddings; every candidate has the position ids that follow the context
    x        = encoder(x) under `CandidateIsolation`
    score_r  = w · mean of candidate r's tokens
    loss     = cross-entropy over the scores + masked language model, of one pass over tokens of which 15 % were drawn

The cost of the context is paid once, not once for each candidate. A batch's right responses make good candidates for
all of its contexts.

In the paper's ``"arrow"`` attention the context looks at the candidates, so that from the second layer on a score
depends a little on which others stand beside it; with ``"one_way"`` every score is exactly that of the candidate alone
with its context, and the context can be encoded beforehand. ``"diagonal"`` compares context and candidate in nothing.

As in the release, context and candidates are both masked, the two losses have the same weight, and the head of the
masked language model is BERT's (`MaskedLanguageHead`). A step of training:

    context, words = mask_tokens(context, mask_token=103, vocabulary=30522, special=(0, 101, 102))
    candidates, more_words = mask_tokens(candidates, mask_token=103, vocabulary=30522, special=(0, 101, 102))
    sum(model.losses(context, candidates, right, words, more_words)).backward()

Differences: the paper goes on from BERT's weights, which are not loaded here: pre-norm blocks around any mechanism
stand for BERT's, and are trained from nothing. The score has no bias: it would be the same for all candidates.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import card
from regard.models.language.masked import IGNORED, MaskedLanguageHead
from regard.models.mixers import build_mixers
from regard.models.vision.encoder import EncoderBlock
from regard.ops.checks import require
from regard.ops.masks import CandidateIsolation, Keys, Mask
from regard.ops.masks.candidates import Arrow


class RankerBlock(EncoderBlock):
    """Pre-norm residual layers under a mask: mechanism, MLP."""

    def forward(self, x: Tensor, mask: Mask | None = None) -> Tensor:
        x = x + self.mixer(self.norms[0](x), mask=mask)
        return x + self.mlp(self.norms[1](x))


class ResponseRanker(nn.Module):
    """Tokens of a context and of its candidates in, one score for each candidate out.

    Args:
        vocabulary: number of different tokens.
        mechanism: key of a mechanism with the pattern "noncausal self" that takes any mask.
        dim, heads: width of the tokens and number of heads.
        layers: number of blocks.
        length: most positions, of the context and one candidate together.
        pattern: who looks at whom, see `CandidateIsolation`.
        options: further arguments of the mechanism.
    """

    def __init__(
        self,
        vocabulary: int,
        mechanism: str = "multi_head",
        *,
        dim: int = 64,
        heads: int = 2,
        layers: int = 2,
        length: int = 512,
        pattern: Arrow = "arrow",
        options: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("layers", layers), ("length", length)):
            require(value > 0, "ResponseRanker", f"{name} {value}", "give a positive number")
        require(
            card(mechanism).contract.any_mask,
            "ResponseRanker",
            f"mechanism {mechanism!r} does not take any mask",
            "candidates are kept apart by a mask: choose one whose contract has any_mask",
        )
        factory = {"device": device, "dtype": dtype}
        self.pattern: Arrow = pattern
        self.token, self.position, self.kind = (
            nn.Embedding(count, dim, **factory) for count in (vocabulary, length, 2)
        )
        for embedding in (self.token, self.position, self.kind):
            nn.init.normal_(embedding.weight, std=0.02)
        mixers = build_mixers(
            mechanism, dim, heads=heads, layers=layers, pattern="noncausal self", options=options, **factory
        )
        self.blocks = nn.ModuleList(RankerBlock(mixer, dim, **factory) for mixer in mixers)
        self.norm = nn.RMSNorm(dim, **factory)
        self.head = nn.Linear(dim, 1, bias=False, **factory)
        self.words = MaskedLanguageHead(vocabulary, dim, **factory)

    def forward(
        self,
        context: Int[Tensor, "batch context_length"],
        candidates: Int[Tensor, "batch count candidate_length"],
        *,
        context_lengths: Int[Tensor, " batch"] | None = None,
        candidate_lengths: Int[Tensor, "batch count"] | None = None,
    ) -> Float[Tensor, "batch count"]:
        """The score of each candidate; what stands beyond the lengths is padding."""
        x, real = self._encode(context, candidates, context_lengths, candidate_lengths)
        return self._scores(x, real, candidates)

    def losses(
        self,
        context: Int[Tensor, "batch context_length"],
        candidates: Int[Tensor, "batch count candidate_length"],
        right: Int[Tensor, " batch"],
        context_words: Int[Tensor, "batch context_length"],
        candidate_words: Int[Tensor, "batch count candidate_length"],
        *,
        context_lengths: Int[Tensor, " batch"] | None = None,
        candidate_lengths: Int[Tensor, "batch count"] | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Cross-entropy of the `right` candidates, and that of the words that `mask_tokens` hid. Train on their sum."""
        require(
            context_words.shape == context.shape and candidate_words.shape == candidates.shape,
            "ResponseRanker",
            lambda: f"words of shapes {tuple(context_words.shape)} and {tuple(candidate_words.shape)}",
            "give the labels that mask_tokens returns for context and candidates",
        )
        x, real = self._encode(context, candidates, context_lengths, candidate_lengths)
        labels = torch.cat([context_words, candidate_words.flatten(1)], dim=1).masked_fill(~real, IGNORED)
        ranking = F.cross_entropy(self._scores(x, real, candidates), right)
        return ranking, self.words.loss(x, labels, self.token.weight)

    def _encode(
        self, context: Tensor, candidates: Tensor, context_lengths: Tensor | None, candidate_lengths: Tensor | None
    ) -> tuple[Float[Tensor, "batch row dim"], Bool[Tensor, "batch row"]]:
        """Vectors of the context and then of all candidates, and which of them are not padding."""
        require(
            context.ndim == 2 and candidates.ndim == 3 and len(context) == len(candidates),
            "ResponseRanker",
            f"context of shape {tuple(context.shape)}, candidates of shape {tuple(candidates.shape)}",
            "give (batch, length) and (batch, count, length)",
        )
        batch, begin = context.shape
        count, width = candidates.shape[1:]
        if context_lengths is None:
            context_lengths = torch.full((batch,), begin, device=context.device)
        if candidate_lengths is None:
            candidate_lengths = torch.full((batch, count), width, device=context.device)
        most = self.position.num_embeddings
        require(
            begin + width <= most,
            "ResponseRanker",
            lambda: f"context of {begin} and candidates of {width} tokens for {most} positions",
            "build with a greater length, or cut them",
        )
        places = [torch.arange(size, device=context.device) for size in (begin, width)]
        real = [places[0] < context_lengths[:, None], (places[1] < candidate_lengths[..., None]).flatten(1)]
        real = torch.cat(real, dim=1)
        after = (context_lengths[:, None] + places[1])[:, None].expand(-1, count, -1)
        positions = torch.cat([places[0].expand(batch, -1), after.flatten(1)], dim=1)
        ids = torch.arange(1, count + 1, device=context.device).repeat_interleave(width)
        ids = torch.cat([ids.new_zeros(begin), ids])
        mask = CandidateIsolation(ids, self.pattern) & Keys(real)

        tokens = torch.cat([context, candidates.flatten(1)], dim=1)
        x = self.token(tokens) + self.position(positions) + self.kind((ids > 0).long())
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x), real

    def _scores(self, x: Tensor, real: Tensor, candidates: Tensor) -> Float[Tensor, "batch count"]:
        count, width = candidates.shape[1:]
        begin = x.shape[1] - count * width
        x, real = (row[:, begin:].unflatten(1, (count, width)) for row in (x, real))
        share = real / real.sum(-1, keepdim=True).clamp(min=1)
        return self.head((x * share[..., None].to(x.dtype)).sum(2))[..., 0]
