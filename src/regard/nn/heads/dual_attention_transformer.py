"""Dual attention. "Disentangling and Integrating Relational and Sensory Information in Transformer Architectures",
Altabaa and Lafferty, 2024, arXiv 2405.16727.

    sensory head      e_i = Σ_j α_ij x_j W_v                            softmax attention
    relational head   a_i = Σ_j α_ij (r_ij W_r + s_j W_s)               α, W_r and W_s are the head's own
    relations         r_ij^l = x_i W_q^{rel,l} · x_j W_k^{rel,l} / √p   l = 1 … d_r, the same for all heads; p wide
    y_i = [ [e_i^1, …] W_o^sensory, [a_i^1, …] W_o^relational ]         each half has an output of its own

x enters a relational head through α and r only; s_j is a symbol that stands for token j (`symbols`):

    "attention"     multi-head attention of x_j to learned templates, whose values are the library of symbols
    "positional"    the symbol of position j
    "relative"      s_ij, the symbol of the clipped offset j − i

No relation of a pair is kept: what a head reads of relation l is the query's own projection times a mix of keys, so
that the keys of all relations stand beside the symbols in the values of a relational head:

    Σ_j α_ij r_ij^l = x_i W_q^{rel,l} · (Σ_j α_ij x_j W_k^{rel,l}) / √p

Cost: time O(n m d H_r), memory O((n + m) d H_r) for H_r relational heads; with relative symbols memory O(n m H) for the
relational heads' weights, where the release holds a symbol per pair.

Differences: symbols belong to the layer; the release may share them between layers. Projections start as Glorot's.
Nonlinear relations, an option of the release, are left out: the paper's relations are inner products.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import OptionSet, register
from regard.nn.attention import ATTENTION, Attention
from regard.ops.attention import attention, attention_weights
from regard.ops.cache import KeyValueCache
from regard.ops.checks import one_of, require
from regard.ops.masks import Mask, segments_of
from regard.ops.masks.base import Tiles

Symbols = Literal["attention", "positional", "relative"]
LIBRARY = {"attention": 128, "positional": 4096, "relative": 257}
"""Numbers of symbols by default."""

_HEADS = "batch length (heads width) -> batch heads length width"


@dataclass(frozen=True, eq=False, repr=False)
class LaterHeads(Mask):
    """A mask for `heads` heads as those from `first` on see it."""

    mask: Mask
    first: int
    heads: int

    def allows(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.mask.allows(batch, head + self.first, query, key)

    def validate(self, batch: int, heads: int, queries: int, keys: int) -> None:
        self.mask.validate(batch, self.heads, queries, keys)

    def tile_states(self, tiles: Tiles) -> Tensor:
        states = self.mask.tile_states(replace(tiles, heads=self.heads))
        return states if states.shape[1] == 1 else states[:, self.first : self.first + tiles.heads]


@register(
    "dual_attention_transformer",
    paper="dual_attention_transformer",
    contract=replace(
        ATTENTION,
        patterns=("noncausal self", "causal self"),
        time="n*m*d*h",
        memory="n*d*h",
        exact=False,
        minimum={"length": 1, "heads": 2},
        options=(
            OptionSet(
                {"position": "rotary", "relational_heads": 1, "relations": 4}, {"positions": True, "permutation": None}
            ),
            OptionSet({"symbols": "positional", "symmetric": True}, {"permutation": None}),
            OptionSet(
                {"symbols": "relative", "library_size": 9, "dropout": 0.1},
                {"permutation": None, "memory": "n*m*h", "attention_map": False},
            ),
            OptionSet(
                {"library_size": 5, "relational_heads": 3, "dropout": 0.1}, {"minimum": {"length": 1, "heads": 4}}
            ),
        ),
    ),
)
class DualAttention(Attention):
    """Some heads read what tokens are like, others how tokens relate, tagged with symbols.

    Args:
        heads: number of heads of both kinds.
        relational_heads: how many of them are relational; half by default.
        relations: number d_r of relations; as many as relational heads by default.
        symmetric: whether r_ij = r_ji, by one projection for both sides.
        symbols: what stands for a token.
        library_size: number of symbols: those to choose from, the longest sequence, or an odd number of offsets.
        position: None or ``"rotary"``, which turns what α is made of but no relation.

    The other arguments are those of `Attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        relational_heads: int | None = None,
        relations: int | None = None,
        symmetric: bool = False,
        symbols: Symbols = "attention",
        library_size: int | None = None,
        causal: bool = False,
        position: Literal["rotary"] | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if position is not None:
            one_of(self._name, "position", position, ("rotary",))
        one_of(self._name, "symbols", symbols, LIBRARY)
        super().__init__(
            dim, heads=heads, causal=causal, position=position, dropout=dropout, device=device, dtype=dtype
        )
        self.relational_heads = heads // 2 if relational_heads is None else relational_heads
        require(
            0 < self.relational_heads < heads,
            self._name,
            f"relational_heads {self.relational_heads} of heads {heads}",
            "give one head or more to either kind",
        )
        self.sensory_heads = heads - self.relational_heads
        sensory, relational = self.sensory_heads * self.head_dim, self.relational_heads * self.head_dim
        self.relations = self.relational_heads if relations is None else relations
        require(
            self.relations > 0 and relational % self.relations == 0,
            self._name,
            f"relations {self.relations} for relational heads of width {relational} together",
            "give a divisor",
        )
        self.symbols: Symbols = symbols
        self.library_size = LIBRARY[symbols] if library_size is None else library_size
        require(
            self.library_size > 0 and (symbols != "relative" or self.library_size % 2 == 1),
            self._name,
            f"library_size {self.library_size} with symbols {symbols!r}",
            "give a positive number, odd for relative symbols: as many offsets back as ahead, and 0",
        )
        factory = {"device": device, "dtype": dtype}
        self.value = nn.Linear(dim, sensory, bias=False, **factory)
        self.output = nn.Linear(sensory, sensory, bias=False, **factory)
        self.symbol_value = nn.Linear(dim, relational, bias=False, **factory)
        self.relational_output = nn.Linear(relational, relational, bias=False, **factory)
        self.relation_query = nn.Linear(dim, relational, bias=False, **factory)
        self.relation_key = self.relation_query if symmetric else nn.Linear(dim, relational, bias=False, **factory)
        self.relation_value = nn.Parameter(torch.empty(self.relational_heads, self.head_dim, self.relations, **factory))
        self.library = nn.Parameter(torch.empty(self.library_size, dim, **factory))
        if symbols == "attention":
            self.symbol_query = nn.Linear(dim, dim, **factory)
            self.templates = nn.Parameter(torch.empty(self.library_size, dim, **factory))
            nn.init.normal_(self.templates)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.kaiming_uniform_(self.relation_value, a=5**0.5)
        if symbols == "relative":
            nn.init.xavier_uniform_(self.library)
        else:
            nn.init.normal_(self.library)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        query, key, own = self.project(x, context, mask, positions)
        symbols = self.symbol_values(x, mask, positions, 0)
        return self.mix(x, query, key, torch.cat([own, symbols], dim=-1), mask)

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch maps length keys"], Float[Tensor, "batch maps keys head_dim"]]:
        """α of the sensory heads, α of the relational ones, and ``α r^l`` for each of these and each relation l.

        The values are those of tokens, of symbols, and the rows of W_r. ``combine(weights @ value)`` is the output in
        eval mode. Raises ValueError with relative symbols, which belong to pairs.
        """
        require(
            self.symbols != "relative",
            self._name,
            "attention_map with symbols 'relative', where values belong to pairs of tokens",
            "build with other symbols",
        )
        query, key, own = self.project(x, context, mask, positions)
        weights = attention_weights(query, key, mask=self.full_mask(mask)).to(own.dtype)
        value, relation_keys = own.split([self.value.out_features, self.relation_key.out_features], dim=-1)
        left, right = (
            rearrange(side, _HEADS, heads=self.relations) for side in (self.relation_query(x), relation_keys)
        )
        relations = left @ right.mT * left.shape[-1] ** -0.5
        related = (weights[:, self.sensory_heads :, None] * relations[:, None]).flatten(1, 2)
        rows = self.relation_value.mT.flatten(0, 1)[None, :, None]
        symbols = self.symbol_values(x, mask, positions, 0)
        parts = (
            rearrange(value, _HEADS, heads=self.sensory_heads),
            rearrange(symbols, _HEADS, heads=self.relational_heads),
            rows.expand(x.shape[0], -1, x.shape[1], -1),
        )
        return torch.cat([weights, related], dim=1), torch.cat(parts, dim=1)

    def combine(self, mixed: Float[Tensor, "batch maps length head_dim"]) -> Float[Tensor, "batch length dim"]:
        """The two halves, of what was read by the maps of `attention_map`."""
        relational = self.relational_heads
        sensory, symbols, related = mixed.split([self.sensory_heads, relational, relational * self.relations], dim=1)
        return self.halves(sensory, symbols + related.unflatten(1, (relational, -1)).sum(2))

    def halves(self, sensory: Tensor, relational: Tensor) -> Float[Tensor, "batch length dim"]:
        """Each half by its own output."""
        joined = (
            rearrange(heads, "batch heads length width -> batch length (heads width)")
            for heads in (sensory, relational)
        )
        return torch.cat(
            [out(half) for out, half in zip((self.output, self.relational_output), joined, strict=True)], dim=-1
        )

    def init_state(self, batch: int) -> KeyValueCache:
        """The state before the first token: keys side by side; values, relation keys and symbols likewise."""
        weight = self.key.weight
        width = self.value.out_features + self.relation_key.out_features
        width += 0 if self.symbols == "relative" else self.symbol_value.out_features
        return KeyValueCache.empty(
            batch, 1, self.key.out_features, value_dim=width, device=weight.device, dtype=weight.dtype
        )

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache]:
        query, key, own = self.project_step(x, state.length, state.key.shape[0])
        tokens = torch.cat([own, self.symbol_values(x, None, None, state.length)], dim=-1)
        state = state.append(rearrange(key, "batch heads new width -> batch 1 new (heads width)"), tokens[:, None])
        return self.mix(x, query, rearrange(state.key[:, 0], _HEADS, heads=self.heads), state.value[:, 0], None), state

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query and key heads; the values and relation keys of tokens side by side."""
        query, key = (rearrange(linear(x), _HEADS, heads=self.heads) for linear in (self.query, self.key))
        return query, key, torch.cat([self.value(x), self.relation_key(x)], dim=-1)

    def symbol_values(
        self, x: Tensor, mask: Mask | None, positions: Tensor | None, seen: int
    ) -> Float[Tensor, "batch length width"]:
        """``s_j W_s`` of tokens that follow `seen` others; no width where symbols belong to pairs."""
        if self.symbols == "relative":
            return x[..., :0]
        if self.symbols == "attention":
            query = rearrange(self.symbol_query(x), _HEADS, heads=self.heads)
            templates, library = (
                rearrange(tokens[None], _HEADS, heads=self.heads).expand(x.shape[0], -1, -1, -1)
                for tokens in (self.templates, self.library)
            )
            read = attention(query, templates, library)
            return self.symbol_value(rearrange(read, "batch heads length width -> batch length (heads width)"))
        length = seen + x.shape[1]
        require(
            length <= self.library_size,
            self._name,
            lambda: f"length {length} with a symbol for each of library_size {self.library_size} positions",
            "build with a larger library_size, or with other symbols",
        )
        if positions is None:
            segments = segments_of(mask)
            if segments is not None:
                segments.validate(x.shape[0], self.heads, length, length)
            positions = torch.arange(seen, length, device=x.device) if segments is None else segments.places()
        symbols = self.symbol_value(self.library[positions.to(x.device)])
        return symbols.expand(x.shape[0], -1, -1)

    def mix(
        self, x: Tensor, query: Tensor, key: Tensor, tokens: Tensor, mask: Mask | None
    ) -> Float[Tensor, "batch length dim"]:
        """What the heads read of `tokens`, which have values, relation keys and symbols side by side."""
        dropout = self.dropout if self.training else 0.0
        value, content = tokens.split([self.value.out_features, tokens.shape[-1] - self.value.out_features], dim=-1)
        queries, keys_of = (heads.split([self.sensory_heads, self.relational_heads], dim=1) for heads in (query, key))
        own = None if mask is None else LaterHeads(mask, 0, self.heads)
        sensory = attention(
            queries[0],
            keys_of[0],
            rearrange(value, _HEADS, heads=self.sensory_heads),
            mask=self.full_mask(own),
            dropout=dropout,
        )
        later = self.full_mask(None if mask is None else LaterHeads(mask, self.sensory_heads, self.heads))
        width = self.relation_key.out_features
        keys = content[..., :width].unsqueeze(1).expand(-1, self.relational_heads, -1, -1)
        if self.symbols == "relative":
            weights = attention_weights(queries[1], keys_of[1], mask=later).to(x.dtype)
            weights = F.dropout(weights, dropout)
            related, symbols = weights @ keys, self.offset_symbols(weights)
        else:
            kinds = torch.cat([keys, rearrange(content[..., width:], _HEADS, heads=self.relational_heads)], dim=-1)
            mixed = attention(queries[1], keys_of[1], kinds, mask=later, dropout=dropout)
            related, symbols = mixed.split([width, self.head_dim], dim=-1)
        left = rearrange(
            self.relation_query(x),
            "batch length (relations width) -> batch length relations width",
            relations=self.relations,
        )
        read = torch.einsum("bnlp,bhnlp->bhnl", left, related.unflatten(-1, (self.relations, -1)))
        relational = symbols + read @ self.relation_value.mT * left.shape[-1] ** -0.5
        return self.halves(sensory, relational)

    def offset_symbols(
        self, weights: Float[Tensor, "batch heads length keys"]
    ) -> Float[Tensor, "batch heads length width"]:
        """``Σ_j α_ij s_{j−i} W_s``: the weights summed by offset, times the symbols of offsets."""
        queries, keys = weights.shape[-2:]
        reach, device = self.library_size // 2, weights.device
        offset = torch.arange(keys, device=device) - torch.arange(keys - queries, keys, device=device)[:, None]
        entry = offset.clamp(-reach, reach) + reach
        mass = weights.new_zeros(*weights.shape[:3], self.library_size).scatter_add(
            -1, entry.expand_as(weights), weights
        )
        return mass @ self.symbol_value(self.library).unflatten(-1, (self.relational_heads, -1)).transpose(0, 1)
