"""Random-feature attention. "What can a Single Attention Layer Learn? A Study Through the Random Features Lens", Fu et
al., 2023, arXiv 2307.11353.

    y_i = Σ_h 1/n Σ_j σ(x̃_iᵀ W_h x̃_j) V_h x̃_j        x̃ = [x, 1],  σ(t) = max(t, 0),  n keys that i may look at
    W_h = m [I 0; 0 0] + s Z,   Z_ab ~ N(0, 1)         drawn once and frozen; only the values V_h are learned

W_h is the product of a query and a key matrix. m = 0 is the paper's RFA, m = 1 its biased BRFA, which needs fewer
samples where the target depends on x_i·x_j. The layer is linear in V: fitting V to targets with squared loss is least
squares on `RandomFeatureAttention.features`. With many heads it expresses functions of x_i and the set of x_j.

Cost: time O(n m h d²) for h heads, as each has keys and values as wide as the tokens, memory O(n h d); the decoding
state is the tokens themselves, whatever the number of heads. Not linear in the length: only a single query makes it so.

Differences: the paper's output is a number, here a vector, each of its numbers with values of its own. s = 1/2 gives
scores variance 1 for the paper's tokens, of length 1; for tokens of length √d that is ``std=1 / (dim + 1)``.
The paper's body was not at hand: s, the appended 1 and the mean [I 0; 0 0] could not be compared with it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, CROSS
from regard.nn.mechanism import Mechanism
from regard.ops.attention import attention, attention_weights
from regard.ops.cache import KeyValueCache
from regard.ops.checks import require
from regard.ops.masks import Causal, Mask


@register(
    "random_feature_attention",
    paper="random_feature_attention",
    contract=replace(
        ATTENTION,
        time="random_heads * (n*m*d + n*d*d)",
        memory="n*d*random_heads + m*d",
        exact=False,
        minimum={"dim": 1, "length": 1},
        options=(CROSS, OptionSet({"mean": 1.0, "std": 0.1, "random_heads": 5})),
    ),
)
class RandomFeatureAttention(Mechanism):
    """Rectified attention with random frozen queries and keys, whose values alone are learned.

    Args:
        dim: width of the tokens.
        random_heads: number of heads, whatever `dim` is; the paper's theory is of many.
        causal: whether a token sees only itself and what came before.
        mean: m, the multiple of the identity around which the query-key matrices are drawn; other than 0 it needs a
            context as wide as the tokens.
        std: s, their standard deviation.
        context_dim: width of `context`; `dim` by default.
    """

    def __init__(
        self,
        dim: int,
        *,
        random_heads: int = 8,
        causal: bool = False,
        mean: float = 0.0,
        std: float = 0.5,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query_key: Tensor
        self.dim, self.heads, self.causal = dim, random_heads, causal
        self.context_dim = dim if context_dim is None else context_dim
        for name, size in (("dim", dim), ("random_heads", random_heads), ("context_dim", self.context_dim)):
            require(size > 0, self._name, f"{name} {size}", "give a positive number")
        require(std > 0, self._name, f"std {std}", "give a positive number: heads must differ")
        require(
            mean == 0 or self.context_dim == dim,
            self._name,
            f"mean {mean} with context_dim {self.context_dim} beside dim {dim}",
            "use mean=0 for a context of another width",
        )
        factory = {"device": device, "dtype": dtype}
        # A buffer: weight decay would shrink a frozen parameter.
        drawn = std * torch.randn(random_heads, dim + 1, self.context_dim + 1, **factory)
        if mean != 0:
            drawn[:, :dim, :dim] += mean * torch.eye(dim, **factory)
        self.register_buffer("query_key", drawn)
        self.output = nn.Linear(random_heads * (self.context_dim + 1), dim, bias=False, **factory)
        nn.init.xavier_uniform_(self.output.weight)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Tensor | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself, or to `context`, with whose end the queries are then aligned.

        `mask` may be any. Raises ValueError for positions.
        """
        return self.output(self.features(x, context, mask=mask, positions=positions))

    def features(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Tensor | None = None,
    ) -> Float[Tensor, "batch length features"]:
        """``1/n Σ_j σ(x̃_iᵀ W_h x̃_j) x̃_j`` of all heads side by side: ``features @ output.weight.T`` is the output."""
        query, source = self.project(x, context, mask, positions)
        mixed = attention(query, source, source, mask=self.full_mask(mask), normalizer="relu", scale=1.0)
        return self.concatenate(mixed)

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys width"]]:
        """The weights and the tokens they mix: ``combine(weights @ value)`` is the output."""
        query, source = self.project(x, context, mask, positions)
        weights = attention_weights(query, source, mask=self.full_mask(mask), normalizer="relu", scale=1.0)
        return weights.to(source.dtype), source.expand(-1, self.heads, -1, -1)

    def combine(self, mixed: Float[Tensor, "batch heads length width"]) -> Float[Tensor, "batch length dim"]:
        """The values: Σ_h V_h of what the heads read."""
        return self.output(self.concatenate(mixed))

    def concatenate(self, mixed: Float[Tensor, "batch heads length width"]) -> Float[Tensor, "batch length features"]:
        """What the heads read, side by side."""
        return rearrange(mixed, "batch heads length width -> batch length (heads width)")

    def init_state(self, batch: int) -> KeyValueCache:
        """The state before the first token. All heads share the tokens, which are keys and values at once."""
        weight = self.output.weight
        return KeyValueCache.empty(batch, 1, self.dim + 1, value_dim=0, device=weight.device, dtype=weight.dtype)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache]:
        """The outputs of one or more further tokens, and the state after them. Causal self-attention only."""
        self.check_step(x, self.dim, state.key.shape[0])
        query, source = self.project(x, None, None, None)
        state = state.append(source, source[..., :0])
        mixed = attention(query, state.key, state.key, mask=self.full_mask(None), normalizer="relu", scale=1.0)
        return self.combine(mixed), state

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None
    ) -> tuple[Float[Tensor, "batch heads length width"], Float[Tensor, "batch 1 keys width"]]:
        """Checked arguments as queries x̃ᵀ W and the tokens x̃ that are keys and values of every head."""
        self.check_tokens(x, context, mask, positions, takes_positions=False)
        self.check_width(x, self.dim)
        require(
            context is not None or self.context_dim == self.dim,
            self._name,
            f"no context, built with context_dim {self.context_dim} beside dim {self.dim}",
            "give a context, or build without context_dim",
        )
        source = x if context is None else context
        self.check_width(source, self.context_dim, name="x" if context is None else "context")
        query = torch.einsum("bnd,hde->bhne", F.pad(x, (0, 1), value=1.0), self.query_key)
        return query, F.pad(source, (0, 1), value=1.0).to(query.dtype)[:, None]

    def full_mask(self, mask: Mask | None) -> Mask | None:
        """The caller's mask, and causality."""
        if not self.causal:
            return mask
        return Causal() if mask is None else Causal() & mask
