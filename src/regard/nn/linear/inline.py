"""InLine attention. "Bridging the Divide: Reconsidering Softmax and Linear Attention", Han et al., 2024, arXiv
2412.06590.

    w_ij = s (φ(q_i)·φ(k_j) − mean_l φ(q_i)·φ(k_l)) / n + 1 / n         s = 1 / √d_h
    y_i  = (Σ_j w_ij v_j + Σ_{l ∈ N(i)} r_l v_l) W^O,                   r = MLP(mean_l x_l)

Linear attention divides by the sum of a row, which gives q and any multiple of it the same weights. Taking the mean off
instead keeps the rows summing to one, and no two queries get the same weights as long as the centred keys span all
widths of a head: w is injective. Weights may be negative. In linear time this is φ(Q) (φ(K) − mean)ᵀ V s / n + mean V.

The local residual is a 3-wide kernel on every axis, one per sample and channel, that a small network of one group per
head predicts from the mean token, class token included. The class token itself has none and is in nobody's.

Cost: time O(n d² / h), memory O(n d).

Differences: none for grids (`inline_2d`). Over plain tokens (`inline`), which the paper does not have, the residual
runs along their one axis, and padding is in no mean and no residual. s / n, which the paper leaves out as a factor that
φ can absorb, is that of the authors' code. φ is the identity as in their models; their code has the others too, and
exp(x / 5) is held at e³⁰ here.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.laid_out import LaidOut, OverImage, OverTokens
from regard.nn.mechanism import head_width
from regard.ops.checks import one_of, require
from regard.ops.linear import linear_attention
from regard.ops.masks import Padding
from regard.ops.precision import statistics_dtype

FEATURE_MAPS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "exp": lambda x: (x / 5).clamp(max=30).exp(),
}
FeatureMap = Literal["identity", "relu", "leaky_relu", "exp"]


class InLineMechanism(LaidOut):
    """Subtraction-normalised linear attention and a local residual over a grid of `axes` axes."""

    axes: ClassVar[int]

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        feature_map: FeatureMap = "identity",
        class_token: bool = False,
        local: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        one_of(self._name, "feature_map", feature_map, FEATURE_MAPS)
        self.dim, self.heads, self.head_dim = dim, heads, head_width(self._name, dim, heads, None)
        self.feature_map, self.class_token = feature_map, class_token
        factory = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias, **factory)
        self.output = nn.Linear(dim, dim, **factory)
        self.kernel = None
        if local:
            self.kernel = nn.Sequential(
                nn.Conv1d(dim, dim, 1, groups=heads, **factory),
                nn.GELU(),
                nn.Conv1d(dim, dim * 3**self.axes, 1, groups=heads, **factory),
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation: truncated normal of standard deviation 0.02, zero biases."""
        for projection in (self.qkv, self.output):
            nn.init.trunc_normal_(projection.weight, std=0.02)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def combine(self, mixed: Float[Tensor, "batch heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        """Concatenate the heads and project."""
        return self.output(rearrange(mixed, "batch heads length width -> batch length (heads width)"))

    def attend(self, x: Tensor, grid: tuple[int, ...], mask: Padding | None) -> Tensor:
        """Attention of the flattened grid, with the class token before it if there is one, to itself."""
        query, key, value, share = self._prepare(x, mask)
        mean = (value * share).sum(-2, keepdim=True)
        mixed = linear_attention(query, key, value, causal=False) + mean
        mixed = mixed.to(x.dtype)
        if self.kernel is not None:
            kernel = self.kernel((x * share[:, 0].to(x.dtype)).sum(1)[..., None])
            mixed = mixed + self._residual(value.to(x.dtype), kernel, grid)
        return self.combine(mixed)

    def _prepare(self, x: Tensor, mask: Padding | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """φ(Q), centred φ(K) s / n, values without padding, and the share 1 / n of each position in a mean."""
        batch, length = x.shape[:2]
        real = torch.ones(1, length, dtype=torch.bool, device=x.device)
        if mask is not None:
            mask.validate(batch, self.heads, length, length)
            real = mask.real(length).to(x.device)
        precise = statistics_dtype(x.dtype)
        share = (real.to(precise) / real.sum(-1, keepdim=True).clamp(min=1))[:, None, :, None]
        heads = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.to(precise).unbind(0)
        query, key = (FEATURE_MAPS[self.feature_map](part) for part in (query, key))
        outside = ~real[:, None, :, None]
        key, value = key.masked_fill(outside, 0.0), value.masked_fill(outside, 0.0)
        key = (key - (key * share).sum(-2, keepdim=True)) * share * self.head_dim**-0.5
        return query, key, value, share

    def _residual(self, value: Tensor, kernel: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Values convolved with the kernel of their sample and channel, in heads; zero at the class token."""
        field = value[:, :, self.class_token :].mT.flatten(1, 2).unflatten(2, grid)
        # Beside a class token there may be nothing else, which a convolution refuses.
        if field.numel():
            convolve = (F.conv1d, F.conv2d)[self.axes - 1]
            channels = field.shape[0] * self.dim
            kernel = kernel.reshape(channels, 1, *(3,) * self.axes)
            field = convolve(field.reshape(1, channels, *grid), kernel, padding=1, groups=channels).view_as(field)
        heads = field.flatten(2).unflatten(1, (self.heads, self.head_dim)).mT
        return F.pad(heads, (0, 0, int(self.class_token), 0))


@register(
    "inline",
    paper="inline",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self",),
        time="n*d*d/h + n*d*d",
        memory="n*d + d*d/h",
        padding=True,
        options=(
            OptionSet({"class_token": True, "bias": False, "feature_map": "leaky_relu"}),
            OptionSet({"local": False}, {"attention_map": True, "permutation": "equivariant"}),
            OptionSet({"local": False, "feature_map": "relu"}, {"attention_map": True, "permutation": "equivariant"}),
            OptionSet({"local": False, "feature_map": "exp"}, {"attention_map": True, "permutation": "equivariant"}),
        ),
    ),
)
class InLineAttention(InLineMechanism, OverTokens):
    """Linear attention that takes the mean off its weights instead of dividing by their sum, and a local residual.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        feature_map: φ: ``"identity"``, ``"relu"``, ``"leaky_relu"`` or ``"exp"``.
        class_token: whether the first token is a class token.
        local: whether the local residual is added.
        bias: whether queries, keys and values have biases.
    """

    axes: ClassVar[int] = 1

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch heads length length"], Float[Tensor, "batch heads length head_dim"]]:
        """The weights w and the values: ``combine(weights @ value)`` is the output.

        This one is n × n. Raises ValueError with ``local=True``, which adds what no map mixes.
        """
        self.check_tokens(x, context, mask, positions, takes_positions=False)
        self.check_width(x, self.dim)
        require(
            self.kernel is None,
            self._name,
            "attention_map with local=True, which adds to what the map mixes",
            "build with local=False",
        )
        query, key, value, share = self._prepare(x, mask)
        return (query @ key.mT + share.mT).to(x.dtype), value.to(x.dtype)


@register(
    "inline_2d",
    paper="inline",
    contract=Contract(
        input="grid",
        patterns=("noncausal self",),
        time="n*d*d/h + n*d*d",
        memory="n*d + d*d/h",
        grid_dims=(2,),
        options=(
            OptionSet({"feature_map": "relu", "bias": False}),
            OptionSet({"local": False}, {"permutation": "equivariant"}),
        ),
    ),
)
class InLineAttention2d(InLineMechanism, OverImage):
    """InLine attention over an image: the local residual is 3 × 3.

    Args are those of `InLineAttention`.
    """

    axes: ClassVar[int] = 2
