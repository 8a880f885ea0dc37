"""Multi-token attention (MTA). "Multi-Token Attention", Golovneva et al., 2025, arXiv 2504.00927.

    Â = Q Kᵀ / √d_h
    before the softmax    A = softmax(Mask_−∞(mix(Conv(Mask_0(Â)))))
    after it              A' = mix(Mask_0(Conv(A)))
    y   = gate(norm(A' V)) W_o

    Conv(S)_ij = Σ_{a < c_q} Σ_{|b| ≤ c_k/2} θ_ab S_{i−a, j−b}      per head: earlier queries, keys to both sides
    mix(S)_h   = Σ_{h' in its group of c_h} W_hh' S_h'              the head convolution

so that a weight may depend on several queries, keys and heads at once: "where are these two words together". Both
masks are needed: what a query may not see is zero before a convolution could carry it on, and excluded after. Nothing
is normalised again. θ and W start as the identity. norm is an RMS norm per head; what follows is a gate per head and
token, as the release is configured, or the depth scaling ``1 − λ``, ``λ = 0.8 − 0.6 exp(−0.3 depth)``.

Cost: time O(n m (d + h (c_q c_k + c_h))), memory O(h n m): the convolutions mix neighbouring rows of scores, behind the
softmax too, where a row must be whole; tiles would need each other's statistics. Decoding keeps 2 (c_q − 1) queries.

Differences: the paper applies it to every fourth layer or so of a causal model; here it may be noncausal too, with the
same kernel. Neighbours see more than a mask allows, so that only padding and packing are taken, within which it stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, ROTARY, Attention, Position
from regard.ops.cache import KeyValueCache
from regard.ops.checks import one_of, require
from regard.ops.masks import Mask, Segments
from regard.ops.normalizers import Softmax
from regard.ops.precision import statistics_dtype

Stage = Literal["before", "after", "both"]


@dataclass(frozen=True)
class MultiTokenState:
    """Keys and values of all tokens, and the queries of the last ones."""

    cache: KeyValueCache
    queries: Float[Tensor, "batch heads kept head_dim"]


class ScoreConvolution(nn.Module):
    """Key–query convolution and head convolution of one stage, either of which may be missing."""

    def __init__(self, heads: int, kernel: tuple[int, int] | None, group: int | None, factory: dict[str, Any]) -> None:
        super().__init__()
        self.kernel = self.mixing = None
        if kernel is not None:
            self.kernel = nn.Parameter(torch.zeros(heads, 1, *kernel, **factory))
        if group is not None:
            self.mixing = nn.Parameter(torch.zeros(heads // group, group, group, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity."""
        with torch.no_grad():
            if self.kernel is not None:
                self.kernel.zero_()[..., -1, self.kernel.shape[-1] // 2] = 1.0
            if self.mixing is not None:
                self.mixing.zero_().diagonal(dim1=-2, dim2=-1).fill_(1.0)

    def convolve(
        self, scores: Float[Tensor, "batch heads queries keys"], places: Int[Tensor, "*batch queries"] | None
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Conv; `places` of the queries in their packed sequence, before which there is none."""
        if self.kernel is None:
            return scores
        kernel, heads = self.kernel.to(scores.dtype), scores.shape[1]
        rows, columns = kernel.shape[-2:]
        scores = F.pad(scores, (columns // 2, columns // 2, rows - 1, 0))
        if places is not None:
            # Every earlier row as a channel of its own, to be emptied where another sequence begins.
            missing = places[..., None] < torch.arange(rows - 1, -1, -1, device=places.device)
            missing = (missing if missing.ndim == 3 else missing[None])[:, None, :, None]
            shifted = scores.unfold(2, rows, 1).masked_fill(missing, 0.0)
            scores = rearrange(shifted, "batch heads queries keys row -> batch (heads row) queries keys")
            kernel = kernel.transpose(1, 2)
        return F.conv2d(scores, kernel, groups=heads)

    def mix(self, scores: Float[Tensor, "batch heads queries keys"]) -> Float[Tensor, "batch heads queries keys"]:
        """mix, within groups of heads."""
        if self.mixing is None:
            return scores
        grouped = scores.unflatten(1, self.mixing.shape[:2])
        return torch.einsum("bgcnm,gdc->bgdnm", grouped, self.mixing.to(scores.dtype)).flatten(1, 2)


@register(
    "multi_token",
    paper="multi_token",
    contract=replace(
        ATTENTION,
        time="n*m*(d + h*query_kernel*key_kernel + h*h)",
        memory="h*n*m",
        any_mask=False,
        exact=False,
        permutation=None,
        options=(
            replace(ROTARY, arguments={**ROTARY.arguments, "norm": 3, "head_kernel": 2}),
            OptionSet({"convolve": "before", "mix_heads": "after", "query_kernel": 2, "key_kernel": 9, "norm": None}),
            OptionSet({"convolve": "after", "mix_heads": None, "query_kernel": 1, "key_kernel": 3, "norm": "plain"}),
            OptionSet({"convolve": None, "mix_heads": "before"}),
        ),
    ),
)
class MultiTokenAttention(Attention):
    """Attention weights made of several queries, keys and heads by convolution.

    Args:
        position: None or ``"rotary"``.
        query_kernel, key_kernel: c_q, and c_k, which is odd.
        head_kernel: c_h, a divisor of `heads`; all heads by default.
        convolve: where the key–query convolution stands: ``"before"`` the softmax, ``"after"`` it, ``"both"`` or None.
        mix_heads: where the head convolution stands, likewise.
        norm: what follows a head's output: ``"gate"``, a norm and a sigmoid gate; a number, a norm and depth scaling
            for the layer of that number, counted from 0; ``"plain"``, a norm; None, nothing.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        causal: bool = False,
        position: Position | None = None,
        query_kernel: int = 6,
        key_kernel: int = 11,
        head_kernel: int | None = None,
        convolve: Stage | None = "both",
        mix_heads: Stage | None = "both",
        norm: Literal["gate", "plain"] | int | None = "gate",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if position is not None:
            one_of(self._name, "position", position, ("rotary",))
        super().__init__(dim, heads=heads, causal=causal, position=position, device=device, dtype=dtype)
        require(query_kernel > 0, self._name, f"query_kernel {query_kernel}", "give a positive number of queries")
        require(
            key_kernel > 0 and key_kernel % 2 == 1,
            self._name,
            f"key_kernel {key_kernel}",
            "give an odd number of keys: as many to both sides",
        )
        group = heads if head_kernel is None else head_kernel
        require(
            group > 0 and heads % group == 0,
            self._name,
            f"head_kernel {group} does not divide heads {heads}",
            "give a divisor",
        )
        for name, stage in (("convolve", convolve), ("mix_heads", mix_heads)):
            if stage is not None:
                one_of(self._name, name, stage, ("before", "after", "both"))
        factory = {"device": device, "dtype": dtype}
        self.kept_queries = 2 * (query_kernel - 1)
        self.before, self.after = (
            ScoreConvolution(
                heads,
                (query_kernel, key_kernel) if convolve in (stage, "both") else None,
                group if mix_heads in (stage, "both") else None,
                factory,
            )
            for stage in ("before", "after")
        )
        if isinstance(norm, str):
            one_of(self._name, "norm", norm, ("gate", "plain"))
        require(not isinstance(norm, int) or norm >= 0, self._name, f"norm {norm}", "count layers from 0")
        self.norm = None if norm is None else nn.RMSNorm(self.head_dim, eps=1e-5, **factory)
        self.gate = nn.Linear(self.head_dim, 1, **factory) if norm == "gate" else None
        self.depth_scale = 1.0 - (0.8 - 0.6 * math.exp(-0.3 * norm)) if isinstance(norm, int) else 1.0

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself, or to `context`; `mask` may be a ``Padding`` or ``Segments``."""
        weights, value = self.attention_map(x, context, mask=mask, positions=positions)
        return self.combine(weights @ value)

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        query, key, value = self.project(x, context, mask, positions)
        places = None
        if isinstance(mask, Segments):
            mask.validate(x.shape[0], self.heads, x.shape[1], key.shape[2])
            own = mask if mask.query_ids is None else Segments(mask.query_ids)
            places = own.places()[..., own.ids.shape[-1] - x.shape[1] :].to(x.device)
        return self.weights(query, key, self.full_mask(mask), places).to(value.dtype), value

    def combine(self, mixed: Float[Tensor, "batch heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        """Normalise and gate each head, concatenate and project."""
        if self.norm is not None:
            mixed = self.norm(mixed) * self.depth_scale
        return super().combine(mixed if self.gate is None else mixed * self.gate(mixed).sigmoid())

    def init_state(self, batch: int) -> MultiTokenState:
        none = self.query.weight.new_empty(batch, self.heads, 0, self.head_dim)
        return MultiTokenState(super().init_state(batch), none)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: MultiTokenState
    ) -> tuple[Float[Tensor, "batch new dim"], MultiTokenState]:
        query, key, value = self.project_step(x, state.cache.length, state.queries.shape[0])
        cache = state.cache.append(key, value)
        # A row behind the softmax needs the c_q − 1 rows before it, and each of those as many before the softmax.
        queries = torch.cat([state.queries, query], dim=2)
        weights = self.weights(queries, cache.key, self.full_mask(None), None)[:, :, -x.shape[1] :]
        kept = queries[:, :, max(queries.shape[2] - self.kept_queries, 0) :].clone()
        return self.combine(weights.to(x.dtype) @ cache.value), MultiTokenState(cache, kept)

    def weights(
        self, query: Tensor, key: Tensor, mask: Mask | None, places: Tensor | None
    ) -> Float[Tensor, "batch heads queries keys"]:
        """A', in at least float32."""
        precise = statistics_dtype(query.dtype)
        scores = (query.to(precise) * self.head_dim**-0.5) @ key.to(precise).mT
        forbidden: Bool[Tensor, ...] | None = None
        if mask is not None:
            batch, heads, queries, keys = scores.shape
            mask.validate(batch, heads, queries, keys)
            forbidden = ~mask.to(scores.device).dense(queries, keys, batch=batch, heads=heads, device=scores.device)
        scores = self.before.mix(self.before.convolve(masked(scores, forbidden, 0.0), places))
        scores = masked(scores, forbidden, -torch.inf)
        weights = Softmax().weights(scores, torch.empty(0))
        return self.after.mix(masked(self.after.convolve(weights, places), forbidden, 0.0))


def masked(scores: Tensor, forbidden: Tensor | None, value: float) -> Tensor:
    """`value` where a query may not look."""
    return scores if forbidden is None else scores.masked_fill(forbidden, value)
