"""The masked language model as a second task of an encoder: some tokens are hidden, and it says which they were.

"BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", Devlin et al., 2018, arXiv
1810.04805.

    logits = E · LayerNorm(GELU(W x + b)) + c,      E the embedding of the tokens
    loss   = mean of −log softmax(logits)[what it was] over the tokens that were drawn
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.ops.checks import require

IGNORED = -100
"""The label of a token that is not asked for."""

_HIDDEN, _OTHER = 0.8, 0.1


def mask_tokens(
    tokens: Int[Tensor, "*shape"],
    *,
    mask_token: int,
    vocabulary: int,
    special: Sequence[int] = (),
    share: float = 0.15,
    random: torch.Generator | None = None,
) -> tuple[Int[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Tokens with some of them hidden, and their labels: what stood there if it was drawn, else `IGNORED`.

    Every token but the `special` ones is drawn with probability `share`. Of the drawn, eight in ten become
    `mask_token`, one in ten any of the `vocabulary`, and one in ten stays.
    """
    for name, value in (("mask_token", mask_token), *(("special", token) for token in special)):
        require(
            0 <= value < vocabulary, "mask_tokens", f"{name} {value} is not one of {vocabulary} tokens", "count from 0"
        )
    require(0 <= share <= 1, "mask_tokens", f"share {share} is not a probability", "give a number from 0 to 1")

    def chance() -> Tensor:
        return torch.rand(tokens.shape, generator=random, device=tokens.device)

    known = torch.tensor(special, dtype=tokens.dtype, device=tokens.device)
    drawn = (chance() < share) & ~torch.isin(tokens, known)
    fate = chance()
    any_token = torch.randint(vocabulary, tokens.shape, generator=random, dtype=tokens.dtype, device=tokens.device)
    changed = torch.where(fate < _HIDDEN, mask_token, torch.where(fate < _HIDDEN + _OTHER, any_token, tokens))
    return torch.where(drawn, changed, tokens), tokens.masked_fill(~drawn, IGNORED)


class MaskedLanguageHead(nn.Module):
    """Logits of tokens out of an encoder's vectors, by the transposed embedding, which the encoder keeps."""

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.transform = nn.Linear(dim, dim, **factory)
        self.norm = nn.LayerNorm(dim, eps=1e-12, **factory)
        self.bias = nn.Parameter(torch.zeros(vocabulary, **factory))

    def forward(
        self, x: Float[Tensor, "*shape dim"], embedding: Float[Tensor, "vocabulary dim"]
    ) -> Float[Tensor, "*shape vocabulary"]:
        return F.linear(self.norm(F.gelu(self.transform(x))), embedding, self.bias)

    def loss(
        self,
        x: Float[Tensor, "*shape dim"],
        labels: Int[Tensor, "*shape"],
        embedding: Float[Tensor, "vocabulary dim"],
    ) -> Float[Tensor, ""]:
        """The mean over the labels that are not `IGNORED`, 0 if all are; only they are multiplied by the embedding."""
        asked = labels != IGNORED
        logits = self(x[asked], embedding).to(torch.promote_types(x.dtype, torch.float32))
        return F.cross_entropy(logits, labels[asked], reduction="sum") / asked.sum().clamp(min=1)
