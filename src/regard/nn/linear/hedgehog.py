"""Hedgehog. "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax Mimicry", Zhang et al., 2024,
arXiv 2402.04347.

    φ(x) = [exp(W x + b), exp(−W x − b)]                      φ_q and φ_k with their own W and b for each head
    y_i  = Σ_j φ_q(q_i)·φ_k(k_j) v_j / Σ_j φ_q(q_i)·φ_k(k_j)  over all tokens, or j ≤ i; then W^O as usual

    loss = −mean_i Σ_j a_ij log â_ij     a_i = softmax(q_i kᵀ / √d_h), â_ij: the weight of v_j in y_i

W starts as the identity and b as zero. Trained on `HedgehogAttention.distillation_loss` with all else frozen, φ_q and
φ_k give weights as spiky as softmax's, and as monotone in q·k. `hedgehog_conversion` makes and distils linear layers
from pretrained ones. ``feature_map="softmax"`` divides each half of φ by its own sum, as the authors' code does.

Cost: time O(n d² / h) besides the projections, memory O(n d); the decoding state is 2 d (d / h + 1) + h numbers. The
loss and `attention_map` are dense, O(n²): they are for sequences as long as those of the layer to be copied.

Differences: features are computed over the largest so far, which cancels in y and keeps exp finite. A feature is held
above e^-60 of the largest of its token (float64: e^-600), the authors' code holds it above 1e-12. Their code for exp
divides each half of each key by its largest as well, which changes the weights; this one follows the equation. With
fewer key heads than heads φ_k belongs to the key head, so that the state stays small. Rotary positions, for layers that
have them, turn queries and keys before φ; as φ is not linear, where a sequence begins then makes a difference.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.attention import Attention
from regard.ops.attention import attention_weights
from regard.ops.checks import one_of, require
from regard.ops.linear import linear_attention
from regard.ops.masks import Mask, Padding, Segments
from regard.ops.positions import rotary
from regard.ops.precision import exact, statistics_dtype

LEAST = {torch.float32: -60.0, torch.float64: -600.0}
"""The least logarithm of a feature beside the largest of its token: no query finds all weights rounded to zero."""


class HedgehogState(NamedTuple):
    """Sums over the tokens seen, the largest exponent among them, and how many they were."""

    sums: Float[Tensor, "batch key_heads features value_dim_and_1"]
    largest: Float[Tensor, "batch key_heads 1"]
    seen: int


class Features(NamedTuple):
    """φ of queries or keys over ``exp(size)``, a number per token."""

    scaled: Float[Tensor, "batch heads length features"]
    size: Float[Tensor, "batch heads length"]

    def over(self, size: Float[Tensor, "batch heads length_or_1"]) -> Float[Tensor, "batch heads length features"]:
        """φ over ``exp(size)`` of another size, no less than its own."""
        return self.scaled * (self.size - size).exp()[..., None]

    def without(self, tokens: Bool[Tensor, "batch 1 length"]) -> Features:
        """With nothing for some tokens."""
        return Features(self.scaled.masked_fill(tokens[..., None], 0.0), self.size.masked_fill(tokens, 0.0))


class FeatureMap(nn.Module):
    """φ: an affine map per head, and exp or softmax of it and of its negative."""

    def __init__(
        self,
        heads: int,
        head_dim: int,
        kind: Literal["exp", "softmax"],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.empty(heads, head_dim, head_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim, device=device, dtype=dtype))
        with torch.no_grad():
            self.weight.copy_(torch.eye(head_dim, device=device, dtype=dtype).expand_as(self.weight))

    def forward(self, x: Float[Tensor, "batch heads length head_dim"]) -> Features:
        """φ(x), in at least float32."""
        half = _affine(x, self.weight, self.bias)
        if self.kind == "softmax":
            logs, size = torch.cat([half.log_softmax(-1), (-half).log_softmax(-1)], -1), torch.zeros_like(half[..., 0])
        else:
            # What is divided by here is multiplied by or cancels later: no gradient need pass.
            size = half.detach().abs().amax(-1)
            logs = torch.cat([half, -half], -1) - size[..., None]
        return Features(logs.clamp(min=LEAST[logs.dtype]).exp(), size)


@exact
def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    precise = statistics_dtype(x.dtype)
    return x.to(precise) @ weight.to(precise).mT + bias.to(precise)[:, None]


@register(
    "hedgehog",
    paper="hedgehog",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self", "causal self"),
        time="n*d*d/h + n*d*d",
        memory="n*d + d*d",
        padding=True,
        packed=True,
        step=True,
        state="constant",
        attention_map=True,
        permutation="equivariant",
        options=(
            OptionSet({"feature_map": "softmax", "kv_heads": 2}),
            OptionSet(
                {"position": "rotary", "rotary_base": 500.0, "kv_heads": 1}, {"positions": True, "permutation": None}
            ),
            OptionSet({"head_dim": 6, "bias": True}),
        ),
    ),
)
class HedgehogAttention(Attention):
    """Linear attention with learned feature maps that mimic softmax.

    Args:
        feature_map: ``"exp"`` as in the paper's equation, or ``"softmax"``, exp over the sum of its half of φ.
        position: None, or ``"rotary"`` with the wavelengths of `rotary_base` (see `regard.ops.positions.rotary`).

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
        feature_map: Literal["exp", "softmax"] = "exp",
        position: Literal["rotary"] | None = None,
        rotary_base: float = 10000.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if position is not None:
            one_of(type(self).__name__, "position", position, ("rotary",))
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            causal=causal,
            position=position,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        one_of(self._name, "feature_map", feature_map, ("exp", "softmax"))
        require(rotary_base > 0, self._name, f"rotary_base {rotary_base}", "give a positive number")
        self.rotary_base = rotary_base
        self.query_map = FeatureMap(heads, self.head_dim, feature_map, device, dtype)
        self.key_map = FeatureMap(self.kv_heads, self.head_dim, feature_map, device, dtype)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself. `mask` may be `Padding`, or `Segments` whose tokens stand together.

        `positions` (with ``position="rotary"``) defaults to 0, 1, 2, …, anew in each of the `Segments`.
        Raises ValueError for a context.
        """
        query, key, value = self.project(x, context, mask, positions)
        features, keys = self.query_map(query).scaled, self.key_map(key)
        if isinstance(mask, Padding):
            keys = keys.without(~mask.real(x.shape[1]).to(x.device)[:, None])
        starts = mask.starts().to(x.device).view(-1, 1, x.shape[1]) if isinstance(mask, Segments) else None
        if self.causal:
            mixed, _ = _from_past(features, keys, value, starts, self.init_state(x.shape[0]))
        else:
            mixed = _from_everywhere(features, keys, value, starts)
        return self.combine(mixed.to(x.dtype))

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        """The weights â and the values they mix: ``combine(weights @ value)`` is the output."""
        query, key, value = self.project(x, context, mask, positions)
        weights = self.log_weights(query, key, mask).exp()
        return weights.to(value.dtype), value.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def distillation_loss(
        self,
        x: Float[Tensor, "batch length dim"],
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, ""]:
        """Cross-entropy of â under the softmax weights of the same queries and keys, the mean over tokens and heads.

        It trains the feature maps alone: queries and keys are taken as they are. Padding counts for nothing.
        """
        target, log_weights, counted = self.both_maps(x, mask=mask, positions=positions)
        return cross_entropy(target, log_weights)[counted].mean()

    def both_maps(
        self, x: Tensor, *, mask: Mask | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax weights a, log â, both (batch, heads, length, length), and which rows are tokens of a sequence."""
        with torch.no_grad():
            query, key, _ = self.project(x, None, mask, positions)
            target = attention_weights(query, key, mask=self.full_mask(mask))
        real = torch.ones_like(target[..., 0], dtype=torch.bool)
        if isinstance(mask, Padding):
            real = real & mask.real(x.shape[1]).to(x.device)[:, None]
        return target, self.log_weights(query, key, mask), real

    def log_weights(self, query: Tensor, key: Tensor, mask: Mask | None) -> Float[Tensor, "batch heads length length"]:
        """log â, −inf where nothing may be attended."""
        features, (scaled, size) = self.query_map(query).scaled, self.key_map(key)
        scaled, size = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (scaled, size))
        scores = _products(features, scaled).log() + size[..., None, :]
        full = self.full_mask(mask)
        if full is None:
            return scores.log_softmax(-1)
        batch, _, length, _ = query.shape
        allowed = full.dense(length, length, batch=batch, heads=self.heads, device=query.device)
        scores = scores.masked_fill(~allowed & allowed.any(-1, keepdim=True), -torch.inf)
        return scores.log_softmax(-1).masked_fill(~allowed, -torch.inf)

    def init_state(self, batch: int) -> HedgehogState:
        """The state before the first token."""
        weight = self.key.weight
        factory = {"device": weight.device, "dtype": statistics_dtype(weight.dtype)}
        sums = torch.zeros(batch, self.kv_heads, 2 * self.head_dim, self.head_dim + 1, **factory)
        return HedgehogState(sums, torch.zeros(batch, self.kv_heads, 1, **factory), 0)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: HedgehogState
    ) -> tuple[Float[Tensor, "batch new dim"], HedgehogState]:
        """The outputs of one or more further tokens, and the state after them."""
        query, key, value = self.project_step(x, state.seen, state.sums.shape[0])
        mixed, state = _from_past(self.query_map(query).scaled, self.key_map(key), value, None, state)
        return self.combine(mixed.to(x.dtype)), state

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None, *, seen: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.check_tokens(x, context, mask, positions, takes_positions=self.position == "rotary")
        self.check_width(x, self.dim)
        if mask is not None:
            mask.validate(x.shape[0], self.heads, x.shape[1], x.shape[1])
        require(
            not isinstance(mask, Segments) or mask.query_ids is None,
            self._name,
            "Segments with query_ids in self-attention",
            "leave query_ids out: queries and keys are the same tokens",
        )
        query, key, value = self.split(x, x)
        if self.position == "rotary":
            if isinstance(mask, Segments):
                places = mask.places().to(x.device)
            else:
                places = torch.arange(seen, seen + x.shape[1], device=x.device)
            places = places if positions is None else positions
            query, key = (rotary(tensor, places, base=self.rotary_base) for tensor in (query, key))
        return query, key, value


def cross_entropy(
    target: Float[Tensor, "*batch queries keys"], log_weights: Float[Tensor, "*batch queries keys"]
) -> Float[Tensor, "*batch queries"]:
    """``−Σ_j a_ij log â_ij``; what has no weight in `target` adds nothing."""
    return -(target * log_weights.masked_fill(target == 0, 0.0)).sum(-1)


@exact
def _products(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT


def _from_past(
    query: Tensor, key: Features, value: Tensor, starts: Tensor | None, state: HedgehogState
) -> tuple[Tensor, HedgehogState]:
    """What each token reads of itself and those before, and the state after the last."""
    largest = _largest_so_far(torch.cat([state.largest.to(query.dtype), key.size], -1), starts)
    # The running maximum is divided by: where it rises, the sums so far shrink.
    decay = -largest.diff(dim=-1)
    decay = decay if starts is None else decay.masked_fill(starts, -torch.inf)
    mixed, sums = linear_attention(
        query,
        key.over(largest[..., 1:]),
        value.to(query.dtype),
        log_decay=decay,
        normalize=True,
        initial_state=state.sums,
        return_state=True,
    )
    return mixed, HedgehogState(sums, largest[..., -1:].clone(), state.seen + value.shape[2])


def _from_everywhere(query: Tensor, key: Features, value: Tensor, starts: Tensor | None) -> Tensor:
    """What each token reads of all tokens, or of those of its own run."""
    value = value.to(query.dtype)
    if starts is None:
        keys = key.over(key.size.amax(-1, keepdim=True))
        return linear_attention(query, keys, value, causal=False, normalize=True)
    return _within_runs(query, key.over(_largest_of_run(key.size, starts)), value, starts)


def _largest_so_far(size: Tensor, starts: Tensor | None) -> Tensor:
    """Running maximum of all but the first entry along with it; anew from each start."""
    if starts is None:
        return size.cummax(-1).values
    # Whole numbers in the order of the sizes, moved up from run to run, make one running maximum of all of them.
    tokens = size[..., 1:]
    ordered, order = tokens.sort(-1)
    count = tokens.shape[-1]
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(count, device=size.device).expand_as(order))
    highest = (ranks + count * starts.cumsum(-1)).cummax(-1).values % count
    return torch.cat([size[..., :1], ordered.gather(-1, highest)], -1)


def _largest_of_run(size: Tensor, starts: Tensor) -> Tensor:
    runs = (starts.cumsum(-1) - 1).expand_as(size)
    return torch.zeros_like(size).scatter_reduce(-1, runs, size, "amax").gather(-1, runs)


def _within_runs(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> Tensor:
    """Linear attention of each run of tokens to itself: to itself and what comes before, and to what comes after."""
    batch, heads, length, _ = key.shape
    value = F.pad(value, (0, 1), value=1.0)
    ends = torch.cat([starts[..., 1:], torch.ones_like(starts[..., :1])], -1).flip(-1)

    def forgetting(where: Tensor) -> Tensor:
        never = torch.zeros(batch, heads, length, dtype=key.dtype, device=key.device)
        return never.masked_fill(where, -torch.inf)

    # Backwards, each key one place late: a token meets those after it, and itself no second time.
    late_key, late_value = (F.pad(tensor.flip(2), (0, 0, 1, 0))[:, :, :-1] for tensor in (key, value))
    late_key = late_key.masked_fill(ends[..., None], 0.0)
    past = linear_attention(query, key, value, log_decay=forgetting(starts))
    future = linear_attention(query.flip(2), late_key, late_value, log_decay=forgetting(ends)).flip(2)
    total = past + future
    return total[..., :-1] / total[..., -1:].masked_fill(total[..., -1:] == 0, torch.inf)
