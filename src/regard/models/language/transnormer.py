"""TransNormerLLM (TNL): a language model of linear attention, decoded with a state of constant size.

"Scaling TransNormer to 175 Billion Parameters" (TransNormerLLM), Qin et al., 2023, arXiv 2307.14995, and "Various
Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention" (TNL), Qin et al., 2024, arXiv
2405.17381.

    X = embedding(tokens)
    per layer:  X = X + GLA(Norm(X));  X = X + SGLU(Norm(X))
    logits = Norm(X) embeddingᵀ

    SGLU(X) = (X W_v ⊙ X W_u) W_o,  without an activation;   Norm(x) = x / (‖x‖ / √d),  without parameters

GLA is the mechanism `transnormer`: LRPE-d in the first layer, decay alone in the others. Its chunks are those of
lightning attention, so that training takes the same time for a token at any length.

Embedding and head share their weights, which gives the papers' sizes, and all weights start normal with a standard
deviation of 0.02, as in the authors' code. That also multiplies embeddings by √d in some sizes (see `SIZES`).

Differences: no training framework, that is none of the papers' parallelism over devices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.models.language.decoder import LanguageModel, require_tokens
from regard.models.mixers import build_mixers
from regard.ops.checks import require

SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "385M": {"dim": 1024, "heads": 8, "layers": 24, "glu_dim": 2816, "scale_embedding": True},
        "1B": {"dim": 2048, "heads": 16, "layers": 16, "glu_dim": 5632, "scale_embedding": True},
        "7B": {"dim": 4096, "heads": 32, "layers": 30, "glu_dim": 11008, "scale_embedding": False},
    }
)
"""Arguments of the models the paper trains, as released: ``TransNormerLM(64000, **SIZES["7B"])``.

Released weights have vocabularies of 64 000 tokens, the ablations of the paper one of 50 272, and the mechanism's
``options={"decay": "alibi"}``.
"""


class SimpleGLU(nn.Module):
    """A gated linear unit whose gate has no activation."""

    def __init__(
        self, dim: int, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.value = nn.Linear(dim, width, bias=False, **factory)
        self.gate = nn.Linear(dim, width, bias=False, **factory)
        self.output = nn.Linear(width, dim, bias=False, **factory)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.output(self.value(x) * self.gate(x))


class TransNormerBlock(nn.Module):
    """Pre-norm residual layers: mechanism, SGLU. Its state is the mechanism's."""

    def __init__(
        self,
        mixer: Any,
        dim: int,
        glu_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = simple_norm(dim)
        self.mixer = mixer
        self.glu = SimpleGLU(dim, glu_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self._add_glu(x + self.mixer(self.norm(x)))

    def init_state(self, batch: int) -> Any:
        return self.mixer.init_state(batch)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.step(self.norm(x), state)
        return self._add_glu(x + mixed), state

    def _add_glu(self, x: Tensor) -> Tensor:
        return x + self.glu(self.norm(x))


class TransNormerLM(LanguageModel):
    """Tokens in, logits of the next token out.

    Args:
        vocabulary: number of different tokens.
        mechanism: key of a mechanism with the pattern "causal self": ``"transnormer"``, or ``"lightning"``, which is
            the same with the authors' decay and without LRPE.
        dim, heads: width of the tokens and number of heads.
        layers: number of blocks.
        glu_dim: width inside the SGLU; 11/4 of `dim` by default.
        scale_embedding: whether embeddings are multiplied by √dim.
        options: further arguments of the mechanism.
    """

    def __init__(
        self,
        vocabulary: int,
        mechanism: str = "transnormer",
        *,
        dim: int = 64,
        heads: int = 2,
        layers: int = 2,
        glu_dim: int | None = None,
        scale_embedding: bool = True,
        options: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = 11 * dim // 4 if glu_dim is None else glu_dim
        for name, value in (("vocabulary", vocabulary), ("layers", layers), ("glu_dim", width)):
            require(value > 0, "TransNormerLM", f"{name} {value}", "give a positive number")
        require_tokens("TransNormerLM", mechanism)
        self.mechanism = mechanism
        self.embedding_scale = math.sqrt(dim) if scale_embedding else 1.0
        factory = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(vocabulary, dim, **factory)
        mixers = build_mixers(
            mechanism, dim, heads=heads, layers=layers, pattern="causal self", options=options, **factory
        )
        self.blocks = nn.ModuleList(TransNormerBlock(mixer, dim, width, **factory) for mixer in mixers)
        self.norm = simple_norm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False, **factory)
        self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first block sees."""
        return self.embedding(tokens) * self.embedding_scale


def simple_norm(dim: int) -> nn.RMSNorm:
    """The paper's SimpleRMSNorm, with the 1e-6 of the authors' code."""
    return nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)
