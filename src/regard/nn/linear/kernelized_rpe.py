"""Kernelized attention with relative positions. "Stable, Fast and Accurate: Kernelized Attention with Relative
Positional Encoding", Luo et al., 2021, arXiv 2106.12566.

    y_i = φ(q_i) Σ_j e^{b_{j−i}} φ(k_j)ᵀ v_j / φ(q_i) Σ_j e^{b_{j−i}} φ(k_j)ᵀ     over all j, or j ≤ i; then W^O
    φ(x) = [e^{w_1·x̂}, …, e^{w_m·x̂}],   x̂ = x / ‖x‖,   w ∼ N(0, I)

Positive random features of queries and keys of length one, without a scale: φ(q)·φ(k) / m has the mean e^{q̂·k̂} up to a
factor that cancels, and a variance that the lengths of q and k cannot blow up. With m, y approaches softmax attention
over q̂·k̂ + b. e^{b_{j−i}} is a Toeplitz matrix, and both sums are its products with every φ(k)_f v and φ(k)_f, by FFT.

Cost: time O(n log n m d), memory O(n (d + h m)). Decoding keeps φ(k) and v, and takes O(n (h m + d)) a token. Up to 512
keys, where it is some twenty times faster, the matrix is written out.

Differences: b has an entry per offset up to `max_distance` and one for all beyond on either side, where the paper has
one for every offset of a fixed length; ``buckets`` gives it T5's logarithmic ones. It starts at zero. Features are
drawn once, and again by `redraw`; ``orthogonal`` draws the Performer's. A transform leaves the roundoff of its largest
sums in all of them: weights that far below the largest e^b of their head are lost.
The paper's body was not at hand: its number of features, whether it draws them anew, and how b starts and is stored
could not be compared.
"""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from regard.catalogue import Contract, OptionSet, register
from regard.nn.attention import Attention
from regard.ops.biases import RelativeBias
from regard.ops.cache import KeyValueCache
from regard.ops.checks import require
from regard.ops.long_convolution import toeplitz_product
from regard.ops.masks import Padding
from regard.ops.precision import statistics_dtype, without_autocast

AT_ONCE = 8
"""Features whose products with the values are in memory at a time, in the forward and in the backward pass."""

FEW_KEYS = 512
"""Keys up to which the matrix of weights is smaller than what the transforms take, and several times faster."""

FEWER = 16
"""How many times the first values of a causal product may have fewer terms than the last of their transform."""


@register(
    "kernelized_rpe",
    paper="kernelized_rpe",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self", "causal self"),
        time="n*log2(2*n)*features*d + n*d*d",
        memory="n*(d + h*features)",
        padding=True,
        step=True,
        state="linear",
        attention_map=True,
        options=(
            OptionSet({"features": 20, "max_distance": 5, "head_dim": 6, "bias": True}),
            OptionSet({"features": 12, "max_distance": 20, "buckets": 8, "orthogonal": True}),
        ),
    ),
)
class KernelizedRPEAttention(Attention):
    """Random-feature attention with a relative bias, multiplied in by FFT.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        head_dim: width of a head; ``dim / heads`` by default.
        features: m, the number of random features of a head.
        causal: whether a token sees only itself and what came before.
        max_distance: the offset from which the bias stays the same.
        buckets: entries of T5's buckets, for both directions together; None for one per offset.
        orthogonal: whether features are drawn orthogonal in blocks of `head_dim`.
        bias: whether the projections have biases.
    """

    directions: Tensor

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        features: int = 64,
        causal: bool = False,
        max_distance: int = 128,
        buckets: int | None = None,
        orthogonal: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(dim, heads=heads, head_dim=head_dim, causal=causal, bias=bias, **factory)
        for name, value in (("features", features), ("max_distance", max_distance)):
            require(value > 0, self._name, f"{name} {value}", "give a positive number")
        self.max_distance, self.buckets, self.orthogonal = max_distance, buckets, orthogonal
        entries = 2 * max_distance + 1 if buckets is None else buckets
        self.offsets = nn.Parameter(torch.zeros(heads, entries, **factory))
        self.relative_bias()
        self.register_buffer("directions", torch.empty(features, self.head_dim, **factory))
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """Draw new features, the same for all heads."""
        gaussian = torch.randn_like(self.directions, dtype=statistics_dtype(self.directions.dtype))
        if self.orthogonal:
            lengths = gaussian.norm(dim=-1, keepdim=True)
            blocks = [torch.linalg.qr(block.mT).Q.mT for block in gaussian.split(self.head_dim)]
            gaussian = torch.cat(blocks) * lengths
        self.directions.copy_(gaussian)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Padding | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself. `mask` may be a ``Padding``."""
        query, key, value = self._features(*self.project(x, None, mask, None), mask)
        return self.combine(self._mixed(query, key, value).to(x.dtype))

    def attention_map(
        self, x: Float[Tensor, "batch length dim"], *, mask: Padding | None = None
    ) -> tuple[Float[Tensor, "batch heads length length"], Float[Tensor, "batch heads length head_dim"]]:
        """The weights and the values they mix: ``combine(weights @ value)`` is the output. This one is n × n."""
        query, key, value = self._features(*self.project(x, None, mask, None), mask)
        weights = query @ key.mT * self._toeplitz(self._factors(x.shape[1], x.shape[1]), x.shape[1])
        return divided(weights, weights.sum(-1, keepdim=True)).to(x.dtype), value.to(x.dtype)

    def init_state(self, batch: int) -> KeyValueCache:
        """The state before the first token."""
        weight, features = self.key.weight, self.directions.shape[0]
        precise = statistics_dtype(weight.dtype)
        return KeyValueCache.empty(
            batch, self.heads, features, value_dim=self.head_dim, device=weight.device, dtype=precise
        )

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache]:
        """The outputs of one or more further tokens, and the state after them: features of keys, and values."""
        projected = self.project_step(x, state.length, state.key.shape[0])
        query, key, value = self._features(*projected, None)
        state = state.append(key, value)
        return self.combine(self._mixed(query, state.key, state.value).to(x.dtype)), state

    def relative_bias(self) -> RelativeBias:
        """b as a function of the offset."""
        return RelativeBias(self.offsets, self.max_distance, None, None if self.buckets is None else not self.causal)

    def _features(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Padding | None
    ) -> tuple[Float[Tensor, "batch heads length m"], Float[Tensor, "batch heads length m"], Tensor]:
        """φ(q), φ(k) without padding, and the values, at least float32."""
        precise = statistics_dtype(query.dtype)
        with without_autocast(query.device):
            query, key = (
                (F.normalize(tensor.to(precise), dim=-1) @ self.directions.to(precise).mT).exp()
                for tensor in (query, key)
            )
        value = value.to(precise)
        if mask is not None:
            batch, _, length, _ = key.shape
            mask.validate(batch, 1, length, length)
            padding = ~mask.real(length).to(key.device)[:, None, :, None]
            key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
        return query, key, value

    def _factors(self, queries: int, keys: int) -> Float[Tensor, "heads offsets"]:
        """e^b from the first key seen by the last query to the last key seen by the first, over the largest of them."""
        offset = torch.arange(1 - keys, queries, device=self.offsets.device)
        head = torch.arange(self.heads, device=offset.device).unsqueeze(-1)
        nowhere = torch.zeros_like(offset)
        bias = self.relative_bias().score(nowhere, head, nowhere, offset)
        bias = bias.to(statistics_dtype(bias.dtype))
        if self.causal:
            bias = bias.masked_fill(offset > 0, -torch.inf)
        return (bias - bias.detach().amax(-1, keepdim=True)).exp()

    def _toeplitz(self, factors: Float[Tensor, "heads offsets"], queries: int) -> Float[Tensor, "heads queries keys"]:
        """e^b written out."""
        keys = factors.shape[-1] - queries + 1
        query = torch.arange(queries, device=factors.device).unsqueeze(-1)
        return factors[:, queries - 1 - query + torch.arange(keys, device=factors.device)]

    def _mixed(
        self,
        query: Float[Tensor, "batch heads queries m"],
        key: Float[Tensor, "batch heads keys m"],
        value: Float[Tensor, "batch heads keys head_dim"],
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """Numerator and denominator, a column more of the value, and their quotient. Queries are the last tokens."""
        factors = self._factors(query.shape[2], key.shape[2])
        value = F.pad(value, (0, 1), value=1.0)
        with without_autocast(query.device):
            if query.shape[2] == 1 or key.shape[2] <= FEW_KEYS:
                sums = (query @ key.mT * self._toeplitz(factors, query.shape[2])) @ value
            else:
                parts = zip(query.split(AT_ONCE, dim=-1), key.split(AT_ONCE, dim=-1), strict=True)
                sums = torch.zeros_like(value[:, :, -query.shape[2] :])
                from_start = self.causal and query.shape[2] == key.shape[2]
                for part in parts:
                    sums = sums + checkpoint(weighted_sums, *part, value, factors, from_start, use_reentrant=False)
        return divided(sums[..., :-1], sums[..., -1:])


def weighted_sums(
    query: Float[Tensor, "batch heads queries m"],
    key: Float[Tensor, "batch heads keys m"],
    value: Float[Tensor, "batch heads keys width"],
    factors: Float[Tensor, "heads offsets"],
    from_start: bool,
) -> Float[Tensor, "batch heads queries width"]:
    """``Σ_f φ(q_i)_f Σ_j e^{b_{j−i}} φ(k_j)_f v_j``; `from_start` says that query i sees keys up to i only."""
    products = key.mT.unsqueeze(-2) * value.mT.unsqueeze(-3)
    sums = (growing_sums if from_start else toeplitz_product)(products, factors[:, None, None])
    return einsum(query, sums, "batch heads queries m, batch heads m width queries -> batch heads queries width")


def growing_sums(x: Float[Tensor, "*batch length"], factors: Float[Tensor, "*heads offsets"]) -> Tensor:
    """A causal product whose first values, sums of a few, are spared the roundoff of the last, sums of all."""
    sums, length = toeplitz_product(x, factors), x.shape[-1]
    if length < FEWER:
        return sums
    few = length // FEWER
    first = growing_sums(x[..., :few], factors[..., length - few : length + few - 1])
    return torch.cat([first, sums[..., few:]], dim=-1)


def divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Their quotient; zero, to the gradient as well, where nothing may be looked at."""
    return numerator / denominator.masked_fill(denominator == 0, torch.inf)
