"""A permutation-invariant network. "Set Transformer: A Framework for Attention-based Permutation-Invariant Neural
Networks", Lee et al., 2018, arXiv 1810.00825.

    Z      = ISAB(… ISAB(X W))               or SAB, for sets that are small
    output = rFF(SAB(… SAB(PMA_k(Z))))       the last rFF is linear

Whatever the order and number of the elements, the k outputs are the same function of the set. The SABs after pooling
let the outputs know of each other, as those of a clustering must.

Differences: the paper's layers keep their width; X W brings the elements to it, which in the authors' release the first
block does. The paper's decoder has one SAB, the release two.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.nn.sets.set_transformer import AttentionPooling, InducedSetAttention, SetAttention
from regard.ops.checks import require
from regard.ops.masks import Padding


class SetTransformer(nn.Module):
    """Sets of vectors in, `outputs` vectors for each set out.

    Args:
        features: width of an element.
        outputs: number k of vectors that a set becomes.
        output_dim: width of each.
        dim, heads: width and number of heads inside.
        inducing: number of inducing points of each encoder layer; None for SAB, which compares all pairs.
        encoder_layers, decoder_layers: number of layers before and after pooling.
        norm: whether layers have LayerNorm.
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        output_dim: int,
        *,
        dim: int = 128,
        heads: int = 4,
        inducing: int | None = 32,
        encoder_layers: int = 2,
        decoder_layers: int = 1,
        norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("features", features), ("output_dim", output_dim)):
            require(value > 0, "SetTransformer", f"{name} {value}", "give a positive width")
        for name, value in (("encoder_layers", encoder_layers), ("decoder_layers", decoder_layers)):
            require(value >= 0, "SetTransformer", f"{name} {value}", "give 0 or more")
        factory = {"device": device, "dtype": dtype}

        def among_themselves() -> SetAttention:
            return SetAttention(dim, heads=heads, norm=norm, **factory)

        def encoder_layer() -> nn.Module:
            if inducing is None:
                return among_themselves()
            return InducedSetAttention(dim, heads=heads, inducing=inducing, norm=norm, **factory)

        self.embedding = nn.Linear(features, dim, **factory)
        self.encoder = nn.ModuleList(encoder_layer() for _ in range(encoder_layers))
        self.pool = AttentionPooling(dim, heads=heads, seeds=outputs, norm=norm, **factory)
        self.decoder = nn.ModuleList(among_themselves() for _ in range(decoder_layers))
        self.head = nn.Linear(dim, output_dim, **factory)

    def forward(
        self, x: Float[Tensor, "batch elements features"], *, mask: Padding | None = None
    ) -> Float[Tensor, "batch outputs output_dim"]:
        """The outputs of each set; a ``Padding`` says how many elements each has."""
        features = self.embedding.in_features
        require(
            x.ndim == 3 and x.shape[-1] == features,
            "SetTransformer",
            lambda: f"x of shape {tuple(x.shape)}",
            f"give (batch, elements, {features})",
        )
        z = self.embedding(x)
        for layer in self.encoder:
            z = layer(z, mask=mask)
        pooled = self.pool(z, mask=mask)
        for layer in self.decoder:
            pooled = layer(pooled)
        return self.head(pooled)
