"""A causal language model around any mechanism.

    x = embedding(tokens)
    per layer:  x += convolution(norm(x));  x += mechanism(norm(x));  x += mlp(norm(x))
    logits = head(norm(x))

The short causal convolution lets a token know its predecessor, whatever the mechanism, so that models differ in what
the mechanism remembers and not in whether it can shift ("Simple linear attention language models balance the
recall-throughput tradeoff", Arora et al., 2024, arXiv 2402.18668, puts one beside every mixer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import card
from regard.models.mixers import build_mixers
from regard.ops.checks import require


class ShortConvolution(nn.Module):
    """Each channel convolved with its last `width` values; causal.

    Its state is the last ``width − 1`` inputs.
    """

    def __init__(
        self, dim: int, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(dim, 1, width, device=device, dtype=dtype))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch length dim"]:
        return self.step(x, self.init_state(x.shape[0]))[0]

    def init_state(self, batch: int) -> Float[Tensor, "batch kept dim"]:
        return self.weight.new_zeros(batch, self.width - 1, self.weight.shape[0])

    def step(self, x: Float[Tensor, "batch new dim"], state: Tensor) -> tuple[Float[Tensor, "batch new dim"], Tensor]:
        seen = torch.cat([state, x], dim=1)
        out = F.conv1d(seen.mT, self.weight, groups=self.weight.shape[0]).mT
        return out, seen[:, seen.shape[1] - (self.width - 1) :]


class BlockState(NamedTuple):
    """What a block keeps while decoding."""

    convolution: Tensor
    mixer: Any


class DecoderBlock(nn.Module):
    """Pre-norm residual layers: short convolution, mechanism, MLP."""

    def __init__(
        self,
        mixer: Any,
        dim: int,
        convolution: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.convolution = ShortConvolution(dim, convolution, **factory)
        self.mixer = mixer
        self.norms = nn.ModuleList(nn.RMSNorm(dim, **factory) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim, **factory), nn.GELU(), nn.Linear(4 * dim, dim, **factory))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.convolution(self.norms[0](x))
        x = x + self.mixer(self.norms[1](x))
        return x + self.mlp(self.norms[2](x))

    def init_state(self, batch: int) -> BlockState:
        return BlockState(self.convolution.init_state(batch), self.mixer.init_state(batch))

    def step(self, x: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        shifted, convolution = self.convolution.step(self.norms[0](x), state.convolution)
        x = x + shifted
        mixed, mixer = self.mixer.step(self.norms[1](x), state.mixer)
        x = x + mixed
        return x + self.mlp(self.norms[2](x)), BlockState(convolution, mixer)


class LanguageModel(nn.Module):
    """Embedding, blocks, norm and head, all at once or token by token.

    A derived class builds them; a block has ``forward(x)``, ``init_state(batch)`` and ``step(x, state)``.
    """

    embedding: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    def embed(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length dim"]:
        """What the first block sees."""
        return self.embedding(tokens)

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocabulary"]:
        """Logits of the token after each."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def init_state(self, batch: int) -> list[Any]:
        """The state before the first token, one entry per block."""
        return [block.init_state(batch) for block in self.blocks]  # pyright: ignore[reportCallIssue] a block

    def step(
        self, tokens: Int[Tensor, "batch new"], state: Sequence[Any]
    ) -> tuple[Float[Tensor, "batch new vocabulary"], list[Any]]:
        """Logits after one or more further tokens, and the state after them."""
        x, after = self.embed(tokens), []
        for block, before in zip(self.blocks, state, strict=True):
            x, new = block.step(x, before)  # pyright: ignore[reportCallIssue] a block
            after.append(new)
        return self.head(self.norm(x)), after


class Decoder(LanguageModel):
    """Tokens in, logits of the next token out.

    Args:
        vocabulary: number of different tokens.
        mechanism: key of a mechanism with the pattern "causal self".
        dim, heads: width of the tokens and number of heads.
        layers: number of blocks.
        convolution: tokens that the short convolution of a block sees, the own one included.
        options: further arguments of the mechanism.
    """

    def __init__(
        self,
        vocabulary: int,
        mechanism: str,
        *,
        dim: int = 64,
        heads: int = 2,
        layers: int = 2,
        convolution: int = 4,
        options: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("layers", layers), ("convolution", convolution)):
            require(value > 0, "Decoder", f"{name} {value}", "give a positive number")
        require_tokens("Decoder", mechanism)
        self.mechanism = mechanism
        factory = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocabulary, dim, **factory)
        nn.init.normal_(self.embedding.weight, std=0.02)
        mixers = build_mixers(
            mechanism, dim, heads=heads, layers=layers, pattern="causal self", options=options, **factory
        )
        self.blocks = nn.ModuleList(DecoderBlock(mixer, dim, convolution, **factory) for mixer in mixers)
        self.norm = nn.RMSNorm(dim, **factory)
        self.head = nn.Linear(dim, vocabulary, bias=False, **factory)


def require_tokens(owner: str, mechanism: str) -> None:
    """Raise ValueError for a mechanism over grids."""
    require(
        card(mechanism).contract.input != "grid",
        owner,
        f"mechanism {mechanism!r} takes a grid",
        "choose one of mechanisms(pattern='causal self', input='tokens')",
    )
