"""Mixture of sparse attention. "Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice
Routing", Piękos et al., 2025, arXiv 2505.00315.

    r     = σ(x W_h^r)                                            the router of head h, a score for every token
    I     = the k tokens of highest r,  k = max(⌊T / ρ⌋, 2)       expert choice: the head chooses its tokens
    A     = softmax(Q Kᵀ / √d_h + M) V                            Q, K, V of x_I only, k × k scores
    Y_{I} = diag(r_I) A W_h^o,  0 for the tokens not chosen       y = Σ_h Y, and the heads of the hybrid

ρ is `sparsity`. With ``masked=True`` M hides what stands later in the sequence, I_j > I_i. Half of the features turn by
rotary positions, those of the sequence. The paper adds four dense heads, for long sequences local ones (`window`).

Cost: time O(H (k d d_h + k² d_h + T d)) beside the dense heads, memory O(T d + H k d).

Choosing looks at the whole sequence, with ``masked=True`` too: an output does not attend to later tokens, but they take
part in deciding whether there is one. The paper trains so, names it a limitation and leaves decoding to future work.
Hence there is no ``causal``, which would promise more, and no step.

Differences: local heads see a sliding window, those of the authors' code blocks. Initialisation is not in the paper:
chosen heads have the code's, dense ones ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.attention import Attention
from regard.nn.heads.multi_head import MultiHeadAttention
from regard.nn.mechanism import Mechanism, head_width
from regard.nn.sparse.window import WindowAttention
from regard.ops.attention import attention, attention_weights
from regard.ops.checks import require
from regard.ops.masks import Causal, Mask, Padding
from regard.ops.positions import rotary
from regard.ops.precision import statistics_dtype, without_autocast


class Chosen(NamedTuple):
    """The tokens of each head in the order of the sequence, and their scores; the slots after `counts` are empty."""

    index: Int[Tensor, "batch heads chosen"]
    scores: Float[Tensor, "batch heads chosen"]
    counts: Int[Tensor, " batch"] | None = None


class _PartlyTurned(Attention):
    """Dense or local heads of which only the first features turn."""

    rotary_dim: int = 0

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None, *, seen: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x, context, mask, None, seen=seen)
        if self.rotary_dim:
            places = torch.arange(x.shape[1], device=x.device) if positions is None else positions
            query, key = (rotary(each, places, rotary_dim=self.rotary_dim) for each in (query, key))
        return query, key, value


class _DenseHeads(_PartlyTurned, MultiHeadAttention):
    pass


class _LocalHeads(_PartlyTurned, WindowAttention):
    pass


@register(
    "mosa",
    paper="mosa",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self",),
        time="n*d*h+n/sparsity*d*d+n*n/sparsity/sparsity*d+n*n*d*dense_heads/h",
        memory="n*d*(1+h/sparsity)",
        padding=True,
        positions=True,
        attention_map=True,
        options=(
            # It hides later tokens and yet is chosen by them: neither a causal pattern nor a noncausal one.
            OptionSet({"masked": True, "sparsity": 3}, {"patterns": ()}),
            OptionSet({"masked": True, "sparsity": 2, "window": 4, "keep_first": True}, {"patterns": ()}),
            OptionSet(
                {"sparsity": 2, "dense_heads": 0, "rotary_fraction": 0.0, "head_dim": 6},
                {"positions": False, "permutation": "equivariant"},
            ),
            OptionSet({"sparsity": 4, "window": 6, "dense_heads": 2, "rotary_fraction": 1.0}),
        ),
    ),
)
class MixtureOfSparseAttention(Mechanism):
    """Each head chooses its tokens by a router of its own and attends among them; a few dense heads see all.

    Args:
        heads: number H of heads that choose their tokens.
        sparsity: a head chooses one token of so many, and two at least.
        dense_heads: number of heads beside them that take all tokens.
        window: what a dense head sees, as in `WindowAttention`; everything by default.
        keep_first: whether the first token takes one of the k places of every head, whatever its score.
        head_dim: width of a head of either kind; ``dim / heads`` by default.
        rotary_fraction: share of a head's features that turn by position.
        masked: whether tokens are hidden from those before them. They still take part in the choice of tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        sparsity: int = 32,
        dense_heads: int = 4,
        window: int | None = None,
        keep_first: bool = False,
        head_dim: int | None = None,
        rotary_fraction: float = 0.5,
        masked: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.sparsity, self.keep_first = dim, heads, sparsity, keep_first
        self.masked = masked
        self.head_dim = head_width(self._name, dim, heads, head_dim)
        require(sparsity > 0, self._name, f"sparsity {sparsity}", "give 1 or more")
        require(dense_heads >= 0, self._name, f"dense_heads {dense_heads}", "give 0 or more")
        require(
            window is None or dense_heads > 0,
            self._name,
            f"window {window} with dense_heads {dense_heads}",
            "only dense heads have a window",
        )
        require(
            0.0 <= rotary_fraction <= 1.0,
            self._name,
            f"rotary_fraction {rotary_fraction}",
            "give a share of the features in [0, 1]",
        )
        self.rotary_dim = int(rotary_fraction * self.head_dim) // 2 * 2
        factory = {"device": device, "dtype": dtype}
        self.router = nn.Linear(dim, heads, bias=False, **factory)
        self.projections = nn.Parameter(torch.empty(heads, dim, 3 * self.head_dim, **factory))
        self.output = nn.Parameter(torch.empty(heads, self.head_dim, dim, **factory))
        self.dense: _PartlyTurned | None = None
        if dense_heads and window is None:
            self.dense = _DenseHeads(dim, heads=dense_heads, head_dim=self.head_dim, causal=masked, **factory)
        elif dense_heads and window is not None:
            self.dense = _LocalHeads(
                dim, heads=dense_heads, window=window, head_dim=self.head_dim, causal=masked, **factory
            )
        if self.dense is not None:
            self.dense.rotary_dim = self.rotary_dim
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform up to one over the root of the outputs of a head's projections, of all heads' outputs for W^o."""
        for weight, width in ((self.projections, 3 * self.head_dim), (self.output, self.heads * self.dim)):
            nn.init.uniform_(weight, -(width**-0.5), width**-0.5)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself; of a ``Padding`` mask only real tokens are chosen, one of `sparsity` of them."""
        self.check(x, context, mask, positions)
        chosen = self.choose(x, mask)
        query, key, value = self.project(x, chosen, positions)
        mixed = attention(query, key, value, mask=self.own_mask(chosen)) * chosen.scores[..., None].to(x.dtype)
        made = einsum(mixed, self.output, "batch heads chosen width, heads width dim -> batch heads chosen dim")
        places = chosen.index.flatten(1)[..., None].expand(-1, -1, self.dim)
        out = torch.zeros_like(x, dtype=made.dtype).scatter_add(1, places, made.flatten(1, 2))
        return out if self.dense is None else out + self.dense(x, mask=mask, positions=positions)

    def choose(self, x: Float[Tensor, "batch length dim"], mask: Padding | None = None) -> Chosen:
        """The tokens each head chooses, and their scores in at least float32."""
        length, precise = x.shape[1], statistics_dtype(x.dtype)
        with without_autocast(x.device):
            logits = F.linear(x.to(precise), self.router.weight.to(precise)).mT
        ranked = logits.detach()
        if self.keep_first:
            ranked = torch.cat([torch.full_like(ranked[..., :1], torch.inf), ranked[..., 1:]], dim=-1)
        most = min(max(length // self.sparsity, 2), length)
        if mask is None:
            index = ranked.topk(most, dim=-1).indices.sort(dim=-1).values
            return Chosen(index, logits.gather(-1, index).sigmoid())
        mask.validate(x.shape[0], self.heads, length, length)
        lengths = mask.lengths.to(x.device)
        counts = (lengths // self.sparsity).clamp(min=2).minimum(lengths)
        full = torch.arange(most, device=x.device) < counts[:, None, None]
        index = ranked.masked_fill(~mask.real(length).to(x.device)[:, None], -torch.inf).topk(most, dim=-1).indices
        index = index.where(full, length).sort(dim=-1).values.clamp(max=length - 1)
        return Chosen(index, logits.gather(-1, index).sigmoid().masked_fill(~full, 0.0), counts)

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch all_heads length length"], Float[Tensor, "batch all_heads length head_dim"]]:
        """The weights times r, 0 where either token is not chosen, and the values; the dense heads come last."""
        self.check(x, context, mask, positions)
        chosen = self.choose(x, mask)
        query, key, value = self.project(x, chosen, positions)
        weights = attention_weights(query, key, mask=self.own_mask(chosen)) * chosen.scores[..., None]
        weights = _scattered(_scattered(weights.mT, chosen.index, x.shape[1]).mT, chosen.index, x.shape[1])
        maps, values = [weights.to(x.dtype)], [_scattered(value, chosen.index, x.shape[1])]
        if self.dense is not None:
            dense_weights, dense_value = self.dense.attention_map(x, mask=mask, positions=positions)
            maps, values = [*maps, dense_weights], [*values, dense_value]
        return torch.cat(maps, dim=1), torch.cat(values, dim=1)

    def combine(self, mixed: Float[Tensor, "batch all_heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        """What the heads write, summed."""
        chosen, dense = mixed[:, : self.heads], mixed[:, self.heads :]
        out = einsum(chosen, self.output, "batch heads length width, heads width dim -> batch length dim")
        return out if self.dense is None else out + self.dense.combine(dense)

    def check(self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None) -> None:
        """Raise ValueError for arguments of `forward` that the contract does not declare."""
        self.check_tokens(x, context, mask, positions, takes_positions=self.rotary_dim > 0)
        self.check_width(x, self.dim)

    def project(
        self, x: Float[Tensor, "batch length dim"], chosen: Chosen, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the chosen tokens, and of no others."""
        rows = x.gather(1, chosen.index.flatten(1)[..., None].expand(-1, -1, self.dim))
        rows = rearrange(rows, "batch (heads chosen) dim -> batch heads chosen dim", heads=self.heads)
        if chosen.counts is not None:
            empty = torch.arange(rows.shape[2], device=x.device) >= chosen.counts[:, None]
            rows = rows.masked_fill(empty[:, None, :, None], 0.0)
        made = einsum(rows, self.projections, "batch heads chosen dim, heads dim width -> batch heads chosen width")
        query, key, value = made.chunk(3, dim=-1)
        if self.rotary_dim:
            places = chosen.index
            if positions is not None:
                places = positions.expand(x.shape[0], -1)[:, None].expand(-1, self.heads, -1).gather(-1, chosen.index)
            query, key = (self._turned(each, places) for each in (query, key))
        return query, key, value

    def own_mask(self, chosen: Chosen) -> Mask | None:
        """Which chosen tokens see which: in the order of the sequence, the causal mask is the usual one."""
        causal, full = Causal() if self.masked else None, None if chosen.counts is None else Padding(chosen.counts)
        return full if causal is None else causal if full is None else causal & full

    def _turned(self, heads: Tensor, places: Tensor) -> Tensor:
        # Every head has positions of its own, which `rotary` takes along the batch.
        turned = rotary(heads.flatten(0, 1)[:, None], places.flatten(0, 1), rotary_dim=self.rotary_dim)
        return turned.view_as(heads)


def _scattered(
    rows: Float[Tensor, "batch heads chosen width"], index: Int[Tensor, "batch heads chosen"], length: int
) -> Float[Tensor, "batch heads length width"]:
    out = rows.new_zeros(*rows.shape[:2], length, rows.shape[3])
    return out.scatter_add(2, index[..., None].expand_as(rows), rows)
