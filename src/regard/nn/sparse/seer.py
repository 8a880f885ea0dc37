"""SeerAttention. "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", Gao et al., 2024, arXiv 2410.13276.

    Q̄ = RoPE(W_q avg(Q)),  K̄ = RoPE(W_k [max(K), min(K), avg(K)])     pooled over blocks of b tokens, before their RoPE
    S = softmax(Q̄ K̄ᵀ / √d_gate)                                       the gate (AttnGate), over blocks, per query head
    A = softmax(Q Kᵀ / √d),   T = maxpool_{b×b}(A), rows divided by their sums
    loss = KL(T ‖ S)          the gate alone is trained; Q, K and all that makes them stay as they are

A block of queries then attends only to the blocks of keys with the highest scores (``top_k``), or with scores of at
least ``threshold``, and always to its own. Pooled tokens stand where the first of their block stands. T is made from a
strip of b queries at a time.

Cost: the gate time O(n² d_gate / b²), the attention O(n k b d) with k blocks a row, memory O(n d + h n²/b²); the loss
O(n² d) time and O(h n b + h n²/b²) memory: no n × n map.

With ``causal=True`` the paper's gate is for prompts given whole, `prefill`: the mean of a block's queries knows its
later tokens, and what is chosen shows them to the earlier ones. `forward` and `step` are strictly causal instead. They
take the gate the authors later gave to decoding ("SeerAttention-R", 2025, arXiv 2506.08889): each query chooses for
itself (``query_block=1``) among the blocks that are complete by then, and reads its own whatever the gate says. Gate
and loss then cost b times as much, O(n² d_gate / b) time and O(h n² / b) memory, and T is pooled over keys only. The
later paper shares a choice among the heads of a group; here each head has its own, as in the first paper's code.

Differences: the own block is always read; the authors' code for prompts leaves it to the gate, but reads everything for
the last two blocks of queries. It decodes densely, as ``threshold=0.0`` does. W_k is per query head, as in the released
gates, also with fewer key heads. Those have no W_q where d_gate = d: it is the identity then. The loss is the mean over
rows; the authors' code leaves out the first quarter of them and divides by the number of blocks as well. Weights start
Glorot-uniform for each head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.attention import Attention
from regard.nn.heads.gqa import GroupedQueryAttention
from regard.nn.heads.mqa import MultiQueryAttention
from regard.nn.heads.multi_head import MultiHeadAttention
from regard.nn.linear.hedgehog import cross_entropy
from regard.nn.sparse._seer_gate import AttnGate, gate_logits, known_log_softmax
from regard.ops.attention import attention, attention_weights, attention_with_lse
from regard.ops.blocks import BlockMap
from regard.ops.cache import KeyValueCache
from regard.ops.checks import one_of, require
from regard.ops.masks import Mask, Padding
from regard.ops.positions import rotary
from regard.ops.precision import statistics_dtype

THRESHOLD = 5e-4
"""The least of the scores the authors give for prompts; up to 5e-3 they call typical."""


class SeerState(NamedTuple):
    """Keys and values; the gate's keys of complete blocks; keys, before rotary, of the block that is not."""

    cache: KeyValueCache
    blocks: Float[Tensor, "batch heads blocks gate_dim"]
    recent: Float[Tensor, "batch key_heads fewer head_dim"]


class Heads(NamedTuple):
    """Queries and keys before rotary, values, and where the tokens stand."""

    query: Float[Tensor, "batch heads length head_dim"]
    key: Float[Tensor, "batch key_heads length head_dim"]
    value: Float[Tensor, "batch key_heads length head_dim"]
    places: Int[Tensor, "*batch length"]
    real: Bool[Tensor, "batch_or_1 length"]
    """Which tokens are not padding."""


@register(
    "seer",
    paper="seer",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self", "causal self"),
        time="n*n*d",
        memory="n*d + h*n*n/block_size",
        padding=True,
        positions=True,
        step=True,
        state="linear",
        attention_map=True,
        # A choice has no gradient: the gate learns from `distillation_loss`.
        frozen=("gate.query", "gate.key"),
        options=(
            OptionSet({"block_size": 5, "top_k": 2, "kv_heads": 2, "head_dim": 6}),
            OptionSet({"block_size": 3, "threshold": 0.3, "gate_dim": 5, "position": None}, {"positions": False}),
        ),
    ),
)
class SeerAttention(Attention):
    """Blocks of keys chosen by a gate that is distilled from the pooled attention map.

    Args:
        block_size: tokens b of a block.
        top_k: blocks a row reads, its own included; None to go by `threshold`.
        threshold: least score of a block that is read; 5e-4 if there is no `top_k` either.
        gate_dim: width of the gate's queries and keys; head_dim by default.
        position: ``"rotary"``, of queries and keys and of the gate's, or None for neither.

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
        block_size: int = 64,
        top_k: int | None = None,
        threshold: float | None = None,
        gate_dim: int | None = None,
        position: Literal["rotary"] | None = "rotary",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if position is not None:
            one_of(self._name, "position", position, ("rotary",))
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            causal=causal,
            position=position,
            device=device,
            dtype=dtype,
        )
        self.block_size, self.top_k = block_size, top_k
        self.threshold = THRESHOLD if threshold is None else threshold
        self.gate_dim = self.head_dim if gate_dim is None else gate_dim
        require(block_size > 0, self._name, f"block_size {block_size}", "give a positive number of tokens")
        require(top_k is None or top_k > 0, self._name, f"top_k {top_k}", "read at least one block, a row's own")
        require(0.0 <= self.threshold <= 1.0, self._name, f"threshold {threshold}", "give a score, from 0 to 1")
        require(
            top_k is None or threshold is None,
            self._name,
            f"top_k {top_k} and threshold {threshold}",
            "choose blocks by one of them",
        )
        require(
            self.gate_dim > 0 and (position is None or self.gate_dim % 2 == 0),
            self._name,
            f"gate_dim {self.gate_dim} with position={position!r}",
            "give a positive width, even for rotary",
        )
        self.gate = AttnGate(heads, self.head_dim, self.gate_dim, device, dtype)

    @classmethod
    def from_attention(
        cls,
        layer: nn.Module,
        *,
        block_size: int = 64,
        top_k: int | None = None,
        threshold: float | None = None,
        gate_dim: int | None = None,
    ) -> SeerAttention:
        """A layer with the projections of a trained one, the same objects, and a new gate to be distilled.

        `layer` is a `MultiHeadAttention`, `GroupedQueryAttention` or `MultiQueryAttention` without position or with
        rotary, and without context_dim; raises ValueError for anything else.
        """
        owner = f"{cls.__name__}.from_attention"
        kinds = MultiHeadAttention, GroupedQueryAttention, MultiQueryAttention
        name = type(layer).__name__
        if not isinstance(layer, Attention) or type(layer) not in kinds:
            raise ValueError(f"{owner}: {name} is not a plain layer; give a {' or '.join(k.__name__ for k in kinds)}")
        position = layer.position
        if position not in (None, "rotary"):
            raise ValueError(f"{owner}: {name} has position {position!r}; the gate knows None and 'rotary'")
        require(
            layer.context_dim == layer.dim,
            owner,
            f"{name} has context_dim {layer.context_dim} beside dim {layer.dim}",
            "give a self-attention",
        )
        weight = layer.query.weight
        seer = cls(
            layer.dim,
            heads=layer.heads,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            causal=layer.causal,
            block_size=block_size,
            top_k=top_k,
            threshold=threshold,
            gate_dim=gate_dim,
            position=position,
            device=weight.device,
            dtype=weight.dtype,
        )
        seer.query, seer.key, seer.value, seer.output = layer.query, layer.key, layer.value, layer.output
        seer.dropout = layer.dropout
        return seer.train(layer.training)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself; `mask` may be `Padding`. Raises ValueError for a context or another mask."""
        heads = self.heads_of(x, context, mask, positions)
        return self.read(heads, self.chosen(heads, self.query_block), mask)

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        heads = self.heads_of(x, context, mask, positions)
        query, key = self.turned(heads.query, heads.places), self.turned(heads.key, heads.places)
        chosen = self.chosen(heads, self.query_block)
        weights = attention_weights(query, key, mask=_both(chosen, self.full_mask(mask)))
        return weights.to(heads.value.dtype), heads.value.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def prefill(self, x: Float[Tensor, "batch length dim"]) -> tuple[Float[Tensor, "batch length dim"], SeerState]:
        """The outputs of a whole prompt, whose queries choose block by block as in the paper, and the state after it.

        Causal self-attention only. `step` goes on from the state.
        """
        self.check_step(x, self.dim, x.shape[0])
        heads = self.heads_of(x, None, None, None)
        out = self.read(heads, self.chosen(heads, self.block_size), None)
        return out, self.grown(self.init_state(x.shape[0]), heads)

    def init_state(self, batch: int) -> SeerState:
        """The state before the first token."""
        cache = super().init_state(batch)
        blocks = cache.key.new_empty(batch, self.heads, 0, self.gate_dim, dtype=statistics_dtype(cache.key.dtype))
        return SeerState(cache, blocks, cache.key)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: SeerState
    ) -> tuple[Float[Tensor, "batch new dim"], SeerState]:
        """The outputs of one or more further tokens, and the state after them. Causal self-attention only."""
        self.check_step(x, self.dim, state.recent.shape[0])
        seen = state.cache.length
        heads = self.heads_of(x, None, None, None, seen=seen)
        state = self.grown(state, heads)
        with torch.no_grad():
            gate_query = self.turned(self.gate.queries(heads.query, 1, heads.real), heads.places)
            logits = gate_logits(gate_query, state.blocks)
            # The last block may not be complete: no query chooses it but as its own.
            logits = F.pad(logits, (0, -(-state.cache.length // self.block_size) - logits.shape[-1]))
            known, own = self.sight(logits, heads.real, 1, seen)
            chosen = self.choose(known_log_softmax(logits, known), known, own, 1, seen)
        query = self.turned(heads.query, heads.places)
        mixed = attention(query, state.cache.key, state.cache.value, mask=_both(chosen, self.full_mask(None)))
        return self.combine(mixed), state

    def gate_scores(
        self,
        x: Float[Tensor, "batch length dim"],
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
        query_block: int | None = None,
    ) -> Float[Tensor, "batch heads rows blocks"]:
        """S: what the gate expects of each block of keys, for rows of `query_block` queries; 0 out of sight.

        `query_block` is as many queries as choose together in `forward`, 1 with ``causal=True`` and else block_size;
        `prefill` has block_size.
        """
        heads = self.heads_of(x, None, mask, positions)
        return self.log_scores(heads, self.checked_rows(query_block))[0].exp()

    def pooled_map(
        self,
        x: Float[Tensor, "batch length dim"],
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
        query_block: int | None = None,
    ) -> Float[Tensor, "batch heads rows blocks"]:
        """T: the largest attention weight of each `query_block` queries and block of keys, rows divided by their sums.

        The weights are those of dense attention; no gradient. `query_block` is as in `gate_scores`.
        """
        heads = self.heads_of(x, None, mask, positions)
        return self.target(heads, mask, self.checked_rows(query_block))

    def distillation_loss(
        self,
        x: Float[Tensor, "batch length dim"],
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
        query_block: int | None = None,
    ) -> Float[Tensor, ""]:
        """``KL(T ‖ S)``, the mean over rows and heads; it has a gradient for ``gate`` alone.

        `query_block` is as in `gate_scores`: a gate for `prefill` is trained with block_size. Rows of padding, and
        rows that have no block in sight, count for nothing.
        """
        rows = self.checked_rows(query_block)
        with torch.no_grad():
            heads = self.heads_of(x, None, mask, positions)
            target = self.target(heads, mask, rows)
        log_scores, _, _ = self.log_scores(heads, rows)
        divergence = cross_entropy(target, log_scores) - cross_entropy(target, target.log())
        counted = target.sum(-1) > 0
        return divergence.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)

    @torch.no_grad()
    def caught(
        self,
        x: Float[Tensor, "batch length dim"],
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
        query_block: int | None = None,
    ) -> Float[Tensor, "batch heads length"]:
        """The share of each query's dense attention that lies on the blocks it reads: how well the gate chooses."""
        heads = self.heads_of(x, None, mask, positions)
        chosen = self.chosen(heads, self.checked_rows(query_block))
        query, key = self.turned(heads.query, heads.places), self.turned(heads.key, heads.places)
        full = self.full_mask(mask)
        _, read = attention_with_lse(query, key, heads.value, mask=_both(chosen, full))
        _, dense = attention_with_lse(query, key, heads.value, mask=full)
        return (read - dense).exp().nan_to_num(1.0)

    @property
    def query_block(self) -> int:
        """How many queries choose together in `forward`."""
        return 1 if self.causal else self.block_size

    def checked_rows(self, query_block: int | None) -> int:
        """`query_block`, or that of `forward`."""
        rows = self.query_block if query_block is None else query_block
        require(
            rows > 0 and self.block_size % rows == 0,
            self._name,
            f"query_block {rows} does not divide block_size {self.block_size}",
            "give a divisor",
        )
        return rows

    def heads_of(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None, *, seen: int = 0
    ) -> Heads:
        """Checked arguments as heads; `seen` tokens came before them."""
        self.check_tokens(x, context, mask, positions, takes_positions=self.position == "rotary")
        self.check_width(x, self.dim)
        batch, length, _ = x.shape
        places = torch.arange(seen, seen + length, device=x.device) if positions is None else positions
        if isinstance(mask, Padding):
            mask.validate(batch, self.heads, length, length)
            real = mask.real(length).to(x.device)
        else:
            real = torch.ones(1, length, dtype=torch.bool, device=x.device)
        return Heads(*self.split(x, x), places, real)

    def turned(self, x: Tensor, places: Tensor) -> Tensor:
        """With rotary positions, where this has them."""
        return x if self.position is None else rotary(x, places)

    def read(self, heads: Heads, chosen: BlockMap, mask: Mask | None) -> Float[Tensor, "batch length dim"]:
        """Attention to the chosen blocks."""
        query, key = self.turned(heads.query, heads.places), self.turned(heads.key, heads.places)
        dropout = self.dropout if self.training else 0.0
        mixed = attention(query, key, heads.value, mask=_both(chosen, self.full_mask(mask)), dropout=dropout)
        return self.combine(mixed)

    def log_scores(self, heads: Heads, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """log S, −∞ for what is not in sight; what is in sight; and which block is a row's own."""
        gate_query = self.gate.queries(heads.query, rows, heads.real)
        gate_key = self.gate.keys(heads.key, self.block_size, heads.real)
        # A block stands where its first token stands.
        gate_query = self.turned(gate_query, heads.places[..., ::rows])
        gate_key = self.turned(gate_key, heads.places[..., :: self.block_size])
        logits = gate_logits(gate_query, gate_key)
        known, own = self.sight(logits, heads.real, rows)
        return known_log_softmax(logits, known), known, own

    @torch.no_grad()
    def chosen(self, heads: Heads, rows: int) -> BlockMap:
        """The blocks that rows of `rows` queries read."""
        return self.choose(*self.log_scores(heads, rows), rows)

    def sight(self, logits: Tensor, real: Tensor, rows: int, seen: int = 0) -> tuple[Tensor, Tensor]:
        """Blocks a row may choose, complete by its last query with ``causal=True``, and which block is its own."""
        size = self.block_size
        first = torch.arange(logits.shape[-2], device=logits.device)[:, None] * rows + seen
        block = torch.arange(logits.shape[-1], device=logits.device)
        own = first // size == block
        if self.causal:
            return (block + 1) * size <= first + rows, own
        whole = F.pad(real, (0, -real.shape[1] % size)).unflatten(-1, (-1, size))
        return whole.any(-1)[:, None, None], own

    def choose(self, log_scores: Tensor, known: Tensor, own: Tensor, rows: int, seen: int = 0) -> BlockMap:
        """The blocks that are read: of those known the highest, and a row's own."""
        size = self.block_size
        if self.top_k is not None:
            scores = log_scores.masked_fill(own, torch.inf)
            return BlockMap.top_k(scores, self.top_k, query_block=rows, key_block=size, offset=seen)
        scores = log_scores.exp().masked_fill(~known, -torch.inf).masked_fill(own, torch.inf)
        return BlockMap.threshold(scores, self.threshold, query_block=rows, key_block=size, offset=seen)

    @torch.no_grad()
    def target(self, heads: Heads, mask: Mask | None, rows: int) -> Float[Tensor, "batch heads rows blocks"]:
        """T, from the attention weights of one block of queries at a time."""
        query, key = self.turned(heads.query, heads.places), self.turned(heads.key, heads.places)
        length, size, full = query.shape[2], self.block_size, self.full_mask(mask)
        real = heads.real[:, None, :, None]
        strips = []
        for start in range(0, length, size):
            stop = min(start + size, length)
            # With a causal mask the strip stands at the end of its keys; otherwise no mask asks where it stands.
            seen = key[:, :, : stop if self.causal else length]
            weights = attention_weights(query[:, :, start:stop], seen, mask=full)
            weights = weights.masked_fill(~real[:, :, start:stop], 0.0)
            weights = F.pad(weights, (0, -length % size + length - weights.shape[-1], 0, (start - stop) % rows))
            strips.append(weights.unflatten(-1, (-1, size)).unflatten(-3, (-1, rows)).amax((-3, -1)))
        pooled = torch.cat(strips, dim=2)
        pooled = pooled.masked_fill(~self.sight(pooled, heads.real, rows)[0], 0.0)
        return pooled / pooled.sum(-1, keepdim=True).clamp(min=torch.finfo(pooled.dtype).tiny)

    def grown(self, state: SeerState, heads: Heads) -> SeerState:
        """The state after further tokens."""
        cache = state.cache.append(self.turned(heads.key, heads.places), heads.value)
        first = state.cache.length - state.recent.shape[2]
        keys = torch.cat([state.recent, heads.key.detach()], dim=2)
        whole = keys.shape[2] // self.block_size * self.block_size
        blocks = state.blocks
        if whole:
            real = torch.ones(1, whole, dtype=torch.bool, device=keys.device)
            more = self.gate.keys(keys[:, :, :whole], self.block_size, real).detach()
            places = torch.arange(first, first + whole, self.block_size, device=keys.device)
            blocks = torch.cat([blocks, self.turned(more, places)], dim=2)
        return SeerState(cache, blocks, keys[:, :, whole:].clone())


def _both(chosen: BlockMap, mask: Mask | None) -> Mask:
    return chosen if mask is None else chosen & mask
