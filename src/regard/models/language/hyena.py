"""HyenaDNA: a language model of long convolutions over single nucleotides.

"HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide Resolution", Nguyen et al., 2023, arXiv 2306.15794.

    x = embedding(tokens)
    per layer:  x += Hyena(norm(x));  x += mlp(norm(x))
    logits = norm(x) embeddingᵀ

Unlike in `Decoder` there is no short convolution beside the mechanism, which has its own, the norms are LayerNorms, and
embedding and head share their weights. Weights start as GPT-2's, those that end a layer smaller by √(2 layers).

Differences: no tokenizer (a token is a letter), and nothing of how the authors train: longer sequences in stages, soft
prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.models.language.decoder import LanguageModel
from regard.models.mixers import build_mixers
from regard.ops.checks import require

HYENADNA_SIZES: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "tiny": {"dim": 128, "layers": 2},
        "tiny-d256": {"dim": 256, "layers": 2},
        "small": {"dim": 256, "layers": 4},
        "medium": {"dim": 256, "layers": 8},
    }
)
"""Sizes of the released models, for up to 16 thousand, 1, 32 and 450 thousand tokens; that for a million is medium too.

Their vocabularies have 16 tokens, 12 in use, and their mechanism ``options={"filter_length": tokens + 2}``.
"""


class HyenaBlock(nn.Module):
    """Pre-norm residual layers: mechanism, MLP. Its state is the mechanism's."""

    def __init__(
        self, mixer: Any, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.mixer = mixer
        self.norms = nn.ModuleList(nn.LayerNorm(dim, **factory) for _ in range(2))
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim, **factory), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim, **factory)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._add_mlp(x + self.mixer(self.norms[0](x)))

    def init_state(self, batch: int) -> Any:
        return self.mixer.init_state(batch)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.step(self.norms[0](x), state)
        return self._add_mlp(x + mixed), state

    def _add_mlp(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norms[1](x))


class HyenaDNA(LanguageModel):
    """Tokens in, logits of the next token out.

    Args:
        vocabulary: number of different tokens.
        dim: width of the tokens.
        layers: number of blocks.
        dropout: probability of dropping an entry of an embedding in training.
        options: arguments of the mechanism ``"hyena"``.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        dim: int = 128,
        layers: int = 2,
        dropout: float = 0.1,
        options: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("layers", layers)):
            require(value > 0, "HyenaDNA", f"{name} {value}", "give a positive number")
        require(0.0 <= dropout < 1.0, "HyenaDNA", f"dropout {dropout}", "give a probability in [0, 1)")
        self.dropout, factory = dropout, {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocabulary, dim, **factory)
        mixers = build_mixers("hyena", dim, heads=1, layers=layers, pattern="causal self", options=options, **factory)
        self.blocks = nn.ModuleList(HyenaBlock(mixer, dim, **factory) for mixer in mixers)
        self.norm = nn.LayerNorm(dim, **factory)
        self.head = nn.Linear(dim, vocabulary, bias=False, **factory)
        self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights and zero biases, those of the filters' networks included; convolutions as they are."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                ends_layer = name.endswith(("mixer.output", "mlp.2"))
                nn.init.normal_(module.weight, std=0.02 / (math.sqrt(2 * len(self.blocks)) if ends_layer else 1.0))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first block sees."""
        return F.dropout(self.embedding(tokens), self.dropout, self.training)
