"""Sparsifiner. "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", Wei et
al., 2023, arXiv 2303.13755.

    A_down = softmax(Q' (W_down K')ᵀ / √h)        Q', K': queries and keys, projected to half the width of a head
    Ã      = A_down W_up                          W_down, W_up of size r × n, r far below n: the connectivity scores
    M_ij   = Ã_ij among the B largest of row i    B: the budget of keys a query; W_up below τ and all but the c largest
                                                  of a row of A_down count as zero here
    y_i    = softmax over the kept j of (q_i · k_j / √d_h), times v_j

The weights are not of low rank: only what is kept is chosen by a map that is. A class token keeps all keys. W_down and
W_up have an entry per place, so that the layer is for `max_length` tokens; fewer use the places `positions` says, the
first ones by default. Tokens pruned on the way through a model are left out of `x`, and of `positions`.

The choice has no derivative. The paper trains the predictor alone on the distance of Ã from the attention of a
pretrained model (`attention_loss`), then all else with the predictor frozen (``predictor.requires_grad_(False)``).
Without either, from scratch, training lets gradients straight through: 1 + Ã − detach(Ã) multiplies what is kept before
it is normalised, which passes to the predictor, and to nothing else, how much each kept key would have been worth.

Cost: time O(n² r h + n B d), memory O(n² h + n B d); the scores Ã are a dense product, where the paper counts the
entries left of a sparse one. From B ≤ n / 64 on kept keys are gathered for each query; before, dense products under a
mask are faster and smaller, and attention takes O(n² d).

Differences: the straight-through gradient; the authors' code has none. The paper's body was not at hand: that the scale
is 1/√h for h heads, that the choice takes W_up without its signs and the loss with them, defaults and initialisation
are the authors' code. Where fewer keys have a score above 0 than are to be kept, the first places fill up. Beside
padding a share is one of the tokens that are left. The losses on a teacher's logits and tokens are not the layer's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION
from regard.nn.conversion import converted
from regard.nn.heads.multi_head import MultiHeadAttention
from regard.nn.mechanism import Mechanism, head_width
from regard.ops.attention import Backend, attention, attention_weights
from regard.ops.biases import TableBias
from regard.ops.checks import require
from regard.ops.masks import Dense, Mask, Padding
from regard.ops.precision import statistics_dtype, without_autocast

GATHERED = 64
"""Tokens per kept key from which on gathering is cheaper than a mask (forward and backward on a CPU, heads of 64)."""
PARTS = 10**6
"""What shares are rounded to: with integers a length kept on the device gives what it gives as a number."""


class Choice(NamedTuple):
    """The keys each query keeps, best first, and zeros that carry the gradient of their connectivity."""

    keys: Int[Tensor, "batch heads queries budget"]
    kept: Bool[Tensor, "batch heads queries budget"]
    credit: Float[Tensor, "batch heads queries budget"] | None


class ConnectivityPredictor(nn.Module):
    """A_down and Ã of queries and keys, which it takes as they are: no gradient goes through it to them."""

    def __init__(
        self,
        head_dim: int,
        *,
        max_length: int,
        rank: int,
        coefficients: int | None,
        threshold: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.coefficients, self.threshold = coefficients, threshold
        width = max(1, head_dim // 2)
        self.query = nn.Linear(head_dim, width, device=device, dtype=dtype)
        self.key = nn.Linear(head_dim, width, device=device, dtype=dtype)
        self.down = nn.Parameter(torch.empty(max_length, rank, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(max_length, rank, device=device, dtype=dtype))

    def forward(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch heads keys head_dim"],
        real: Bool[Tensor, "batch keys"] | None,
        positions: Int[Tensor, "*batch keys"] | None,
        *,
        sparse: bool = True,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Ã in at least float32, of what the choice counts of A_down and W_up or, not `sparse`, of all of them."""
        precise = statistics_dtype(query.dtype)
        with without_autocast(query.device):
            query, key = (
                F.linear(heads.detach().to(precise), made.weight.to(precise), made.bias.to(precise))
                for heads, made in ((query, self.query), (key, self.key))
            )
            if real is not None:
                key = key.masked_fill(~real[:, None, :, None], 0.0)
            down, up = (
                (bases[: key.shape[2]] if positions is None else bases[positions]).to(precise).unsqueeze(-3)
                for bases in (self.down, self.up)
            )
            shares = (query @ (key.mT @ down) * query.shape[1] ** -0.5).softmax(-1)
            if sparse:
                up = F.threshold(up.abs(), self.threshold, 0.0)
            if sparse and self.coefficients is not None:
                values, bases = shares.topk(min(self.coefficients, shares.shape[-1]), dim=-1)
                shares = torch.zeros_like(shares).scatter(-1, bases, values)
            return shares @ up.mT


@register(
    "sparsifiner",
    paper="sparsifiner",
    contract=replace(
        ATTENTION,
        patterns=("noncausal self",),
        time="n*n*(rank*h + d) + n*d*d",
        memory="n*n*h + n*d",
        any_mask=False,
        packed=False,
        positions=True,
        step=False,
        state=None,
        permutation=None,
        # In eval mode nothing passes the choice: see above.
        frozen=tuple(
            f"predictor.{name}" for name in ("query.weight", "query.bias", "key.weight", "key.bias", "down", "up")
        ),
        minimum={"dim": 1, "heads": 1, "length": 1},
        options=(
            OptionSet({"class_token": True, "budget": 0.4, "rank": 5, "coefficients": 2, "threshold": 0.05}),
            OptionSet(
                {"budget": 2, "coefficients": None, "bias": False, "max_length": 1100, "dropout": 0.1},
                {"time": "n*n*rank*h + n*min(n, budget)*d + n*d*d", "memory": "n*n*h + n*min(n, budget)*d + n*d"},
            ),
            # With more coefficients bfloat16 puts other keys first here, and two are few to make up for one.
            OptionSet({"budget": 2, "class_token": True, "coefficients": 1}),
        ),
    ),
)
class SparsifinerAttention(Mechanism):
    """A low-rank predictor of connectivity gives each query a sparse set of keys of its own.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        max_length: the largest number of tokens it takes, class token included: n of W_down and W_up.
        rank: r, the number of bases; the paper's 197 tokens have 32.
        coefficients: c, the number of bases that count for one query; None for all.
        threshold: τ, up to which an entry of W_up counts as zero.
        budget: B, the keys each query keeps: a number of them, or as a float a share of the tokens.
        class_token: whether the first token is a class token, which keeps all keys.
        bias: whether queries, keys, values and outputs have biases.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        max_length: int = 1024,
        rank: int = 32,
        coefficients: int | None = 8,
        threshold: float = 0.02,
        budget: float = 0.25,
        class_token: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, head_width(self._name, dim, heads, None)
        self.max_length, self.budget, self.class_token, self.dropout = max_length, budget, class_token, dropout
        for name, size in (("max_length", max_length), ("rank", rank), ("coefficients", coefficients)):
            require(size is None or size > 0, self._name, f"{name} {size}", "give a positive number")
        require(threshold >= 0, self._name, f"threshold {threshold}", "give 0 or more")
        require(
            budget >= 1 if isinstance(budget, int) else 0.0 < budget <= 1.0,
            self._name,
            f"budget {budget!r}",
            "give a positive number of keys, or a float in (0, 1] as a share of them",
        )
        require(0.0 <= dropout < 1.0, self._name, f"dropout {dropout}", "give a probability in [0, 1)")
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias, device=device, dtype=dtype)
        self.output = nn.Linear(dim, dim, bias=bias, device=device, dtype=dtype)
        self.predictor = ConnectivityPredictor(
            self.head_dim,
            max_length=max_length,
            rank=rank,
            coefficients=coefficients,
            threshold=threshold,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation: truncated normal of standard deviation 0.02, zero biases."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)

    @classmethod
    def from_multi_head(
        cls,
        layer: MultiHeadAttention,
        *,
        max_length: int = 1024,
        rank: int = 32,
        coefficients: int | None = 8,
        threshold: float = 0.02,
        budget: float = 0.25,
        class_token: bool = False,
    ) -> SparsifinerAttention:
        """A layer with the projections of a trained one and a new predictor, to be trained as the paper does.

        Raises ValueError for a `layer` that is causal, has positions, a context of another width, fewer key heads than
        heads, or heads of a width other than dim / heads.
        """
        state = layer.state_dict()
        for kind in ("weight", "bias") if layer.query.bias is not None else ("weight",):
            state[f"qkv.{kind}"] = torch.cat([state.pop(f"{name}.{kind}") for name in ("query", "key", "value")])
        return converted(
            cls,
            layer,
            state=state,
            max_length=max_length,
            rank=rank,
            coefficients=coefficients,
            threshold=threshold,
            budget=budget,
            class_token=class_token,
        )

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself; `mask` may be a ``Padding``, `positions` say which places the tokens have."""
        query, key, value = self.project(x, context, mask, positions)
        choice = self.choose(query, key, mask, positions)
        return self.combine(self.attend(query, key, value, choice, mask))

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length length"], Float[Tensor, "batch heads length head_dim"]]:
        """The weights, zero where a key is not kept, and the values: ``combine(weights @ value)`` is the output."""
        query, key, value = self.project(x, context, mask, positions)
        choice = self.choose(query, key, mask, positions)
        weights = attention_weights(query, key, mask=self.full_mask(choice, x.shape[1], mask))
        return weights.to(value.dtype), value

    def attention_loss(
        self,
        x: Float[Tensor, "batch length dim"],
        target: Float[Tensor, "batch heads length length"] | None = None,
        *,
        mask: Padding | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, ""]:
        """Squared distance of Ã, nothing of it left out, from `target`, or from the layer's own attention to all keys.

        The sum over heads, queries and keys, and the mean over samples. (The authors' code sums these too, and weighs
        it by 0.01.) The class token's row and padding count for nothing. It trains the predictor alone.
        """
        query, key, _ = self.project(x, None, mask, positions)
        batch, length = x.shape[:2]
        shape = (batch, self.heads, length, length)
        require(
            target is None or target.shape == shape,
            self._name,
            lambda: f"target of shape {tuple(target.shape) if target is not None else ()} for x {tuple(x.shape)}",
            lambda: f"give a map of shape {shape}",
        )
        if target is None:
            target = attention_weights(query, key, mask=mask)
        first, real = int(self.class_token), self.real(mask, length, x.device)
        found = self.predictor(query[:, :, first:], key, real, positions, sparse=False)
        error = (found - target[:, :, first:].detach()).square()
        if real is not None:
            error = error.masked_fill(~(real[:, None, first:, None] & real[:, None, None]), 0.0)
        return error.sum() / batch

    def combine(self, mixed: Float[Tensor, "batch heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        """Concatenate the heads and project."""
        return self.output(rearrange(mixed, "batch heads length width -> batch length (heads width)"))

    def project(
        self, x: Tensor, context: Tensor | None, mask: Padding | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads of checked arguments."""
        self.check_tokens(x, context, mask, positions, takes_positions=True)
        self.check_width(x, self.dim)
        length = x.shape[1]
        require(
            length <= self.max_length,
            self._name,
            lambda: f"{length} tokens, built for max_length {self.max_length}",
            "give fewer, or build with a larger max_length",
        )
        if mask is not None:
            mask.validate(x.shape[0], self.heads, length, length)
        heads = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def choose(self, query: Tensor, key: Tensor, mask: Padding | None, positions: Tensor | None) -> Choice:
        """The keys that each query keeps, without the class token's."""
        length = key.shape[2]
        real = self.real(mask, length, key.device)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            scores = self.predictor(query[:, :, int(self.class_token) :], key, real, positions)
        # Not one score is negative: below them, and before padding, those of 0 are ordered by place.
        ranked = torch.where(scores.detach() > 0, scores.detach(), -torch.arange(length, device=key.device))
        if real is not None:
            ranked = ranked.masked_fill(~real[:, None, None], -torch.inf)
        budget = self.budget if isinstance(self.budget, int) else share_of(length, self.budget)
        best, keys = ranked.topk(min(budget, length), dim=-1)
        kept = best > -torch.inf
        if real is not None and not isinstance(self.budget, int):
            budgets = share_of(real.sum(-1), self.budget)[:, None, None, None]
            kept = kept & (torch.arange(budget, device=key.device) < budgets)
        if not self.training:
            return Choice(keys, kept, None)
        chosen = scores.gather(-1, keys)
        return Choice(keys, kept, chosen - chosen.detach())

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, choice: Choice, mask: Padding | None
    ) -> Float[Tensor, "batch heads length head_dim"]:
        """Softmax attention over the kept keys."""
        length = key.shape[2]
        dropout = self.dropout if self.training else 0.0
        # Masks and biases are dense as they come, and the other engine drops no weights.
        backend = "fused" if dropout == 0 else "reference"
        if choice.keys.shape[-1] * GATHERED > length:
            bias = None if choice.credit is None else TableBias(self.spread(choice.credit, choice, length))
            allowed = self.full_mask(choice, length, mask)
            return attention(query, key, value, mask=allowed, bias=bias, dropout=dropout, backend=backend)
        sparse = gathered_attention(query[:, :, int(self.class_token) :], key, value, choice, dropout, backend)
        if not self.class_token:
            return sparse
        whole = attention(query[:, :, :1], key, value, mask=mask, dropout=dropout, backend=backend)
        return torch.cat([whole, sparse], dim=2)

    def full_mask(self, choice: Choice, length: int, mask: Padding | None) -> Mask:
        """What every token may look at."""
        kept = self.spread(choice.kept, choice, length, of_class_token=True)
        return Dense(kept) if mask is None else Dense(kept) & mask

    def spread(
        self, values: Tensor, choice: Choice, length: int, *, of_class_token: bool = False
    ) -> Shaped[Tensor, "batch heads length length"]:
        """`values` at the keys kept, zero at the others."""
        dense = torch.zeros(*values.shape[:3], length, dtype=values.dtype, device=values.device)
        dense = dense.scatter(-1, choice.keys, values)
        return F.pad(dense, (0, 0, int(self.class_token), 0), value=of_class_token)

    def real(self, mask: Padding | None, length: int, device: torch.device) -> Bool[Tensor, "batch length"] | None:
        """Which tokens are not padding, if any is."""
        return None if mask is None else mask.real(length).to(device)


def share_of(length: Any, share: float) -> Any:
    """A share of a length, or of each of several, rounded up."""
    return -(-length * round(share * PARTS) // PARTS)


def gathered_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys head_dim"],
    choice: Choice,
    dropout: float,
    backend: Backend,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Attention of each query to copies of the keys it keeps: one call with a sequence for each query."""
    batch, heads, length, width = key.shape
    each = choice.keys.shape[-1]
    starts = torch.arange(batch * heads, device=key.device).view(batch, heads, 1, 1) * length
    rows = (choice.keys + starts).flatten()
    key, value = (of.flatten(0, 2).index_select(0, rows).view(-1, 1, each, width) for of in (key, value))
    mask = Dense(choice.kept.reshape(-1, 1, 1, each))
    bias = None if choice.credit is None else TableBias(choice.credit.reshape(-1, 1, 1, each))
    query = query.reshape(-1, 1, 1, width)
    mixed = attention(query, key, value, mask=mask, bias=bias, dropout=dropout, backend=backend)
    return mixed.view(batch, heads, -1, width)
