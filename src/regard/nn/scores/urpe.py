"""Universal relative-position attention. "Your Transformer May Not be as Powerful as You Expect", Luo et al., 2022,
arXiv 2205.13401.

    A = softmax(Q Kᵀ / √d_h + B) ∘ C,    y = A V W^O        B_ij = b_{j−i},  C_ij = c_{j−i}, per head

B is any relative bias (`position`); C is a learned Toeplitz matrix (``factor``), ones at first. Rows of a softmax sum
to one, so that with B alone identical tokens come out identical wherever they stand, in a network of any depth. C
stands behind the softmax and nothing is normalised again: rows of A may sum to anything, of either sign, which lets the
network say where it is.

C passes through the door without an n × m tensor. With a constant μ per head that makes c + μ > 0,

    A V = exp(ℓ' − ℓ) o' − μ o,    o, ℓ = attention and log-sum-exp with B,    o', ℓ' = the same with B + log(c + μ)

which holds for any μ, so that μ takes part in no gradient; it is 0 while all of c is well above 0. Dropping a weight of
A makes its c zero in the second call.

Cost: time O(n m d), twice that of softmax attention; memory O((n + m) d).

Differences: c and b have an entry per offset up to `max_distance` and share one beyond; the paper's c and the release's
``--rel-pos-unique`` have one for every offset of a fixed length. ``buckets`` gives c T5's logarithmic ones, which the
release has too. In the release all layers share c and b. B is T5's by default. The paper has self-attention only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.catalogue import OptionSet, register
from regard.nn.attention import ALIBI, ATTENTION, ROTARY, Attention, Position
from regard.ops.attention import attention_weights, attention_with_lse
from regard.ops.biases import Bias, RelativeBias
from regard.ops.cache import KeyValueCache
from regard.ops.checks import require
from regard.ops.dropout import draw_seed, keep_tile
from regard.ops.masks import Mask
from regard.ops.precision import statistics_dtype


@dataclass(frozen=True, eq=False, repr=False)
class LogFactor(Bias):
    """``inner + log(factor + shift[h])``, where dropout makes some entries of `factor` zero."""

    inner: Bias | None
    factor: Bias
    shift: Float[Tensor, " heads"]
    seed: Int[Tensor, ""] | None = None
    dropout: float = 0.0

    @property
    def shift_invariant(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] a constant per object
        return self.seed is None and (self.inner is None or self.inner.shift_invariant)

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        if self.inner is not None:
            self.inner.validate(batch, heads, queries, keys)

    def score(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        factor = self.factor.score(batch, head, query, key)
        if self.seed is not None:
            factor = factor * keep_tile(self.seed, self.dropout, batch, head, query, key)
        score = torch.log(factor + self.shift[head])
        return score if self.inner is None else score + self.inner.score(batch, head, query, key)


@register(
    "urpe",
    paper="urpe",
    contract=replace(
        ATTENTION,
        exact=False,
        permutation=None,
        options=(
            replace(ROTARY, arguments={**ROTARY.arguments, "buckets": 16, "max_distance": 40}),
            ALIBI,
            # A key's bias adds the same to every score of a row, which softmax takes off again.
            OptionSet({"position": None, "max_distance": 3, "bias": True}, {"frozen": ("key.bias",)}),
            OptionSet({"kv_heads": 2, "head_dim": 6, "dropout": 0.1}),
        ),
    ),
)
class URPEAttention(Attention):
    """Softmax attention times a learned Toeplitz matrix behind the softmax.

    Args:
        position: what stands inside the softmax, as in `Attention`: T5's relative biases by default.
        max_distance: offsets up to which c has entries of its own.
        buckets: number of T5's logarithmic buckets that offsets up to `max_distance` fall into; None for one each.

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        position: Position | None = "relative",
        max_distance: int = 128,
        buckets: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        require(max_distance > 0, self._name, f"max_distance {max_distance}", "give a positive number of positions")
        self.max_distance, self.buckets = max_distance, buckets
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            causal=causal,
            position=position,
            bias=bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        entries = 2 * max_distance + 1 if buckets is None else buckets
        self.factor = nn.Parameter(torch.ones(heads, entries, device=device, dtype=dtype))
        self.toeplitz()

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        query, key, value = self.project(x, context, mask, positions)
        return self.combine(self.mix(query, key, value, self.full_mask(mask)))

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        """A and the values: ``combine(weights @ value)`` is the output in eval mode. Rows do not sum to one."""
        query, key, value = self.project(x, context, mask, positions)
        weights = attention_weights(query, key, mask=self.full_mask(mask), bias=self.score_bias())
        batch, heads, queries, keys = weights.shape
        factor = self.toeplitz().dense(queries, keys, batch=batch, heads=heads, device=x.device)
        return (weights * factor).to(value.dtype), value.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache]:
        query, key, value = self.project_step(x, state.length, state.key.shape[0])
        state = state.append(key, value)
        return self.combine(self.mix(query, state.key, state.value, self.full_mask(None))), state

    def toeplitz(self) -> RelativeBias:
        """C, asked like a bias."""
        return RelativeBias(self.factor, self.max_distance, None, None if self.buckets is None else not self.causal)

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Tensor:
        """``A V``, in at least float32 until the difference is taken."""
        dtype, dropout = query.dtype, self.dropout if self.training else 0.0
        query, key, value = (tensor.to(statistics_dtype(dtype)) for tensor in (query, key, value))
        seed = draw_seed(query.device) if dropout > 0 else None
        bias, shift = self.score_bias(), self.shift(dropout).to(query.dtype)
        out, lse = attention_with_lse(query, key, value, mask=mask, bias=bias)
        scaled = LogFactor(bias, self.toeplitz(), shift, seed, dropout)
        out_scaled, lse_scaled = attention_with_lse(query, key, value, mask=mask, bias=scaled)
        empty = lse == -torch.inf
        ratio = (lse_scaled.masked_fill(empty, 0.0) - lse.masked_fill(empty, 0.0)).exp()
        return (ratio[..., None] * out_scaled - shift[:, None, None] * out).to(dtype)

    def shift(self, dropout: float) -> Float[Tensor, " heads"]:
        """μ: what keeps ``c + μ`` at half the largest |c| or above, dropped and scaled entries included."""
        largest, lowest = self.factor.detach().abs().amax(1), self.factor.detach().amin(1)
        if dropout > 0:
            lowest = lowest.clamp(max=0) / (1 - dropout)
        floor = (largest / 2).clamp(min=torch.finfo(torch.float32).tiny ** 0.5)
        return (floor - lowest).clamp(min=0)
