"""Routing attention. "Efficient Content-Based Sparse Attention with Routing Transformers", Roy et al., 2020, arXiv
2003.05997.

    Q, K  = LayerNorm(x W^Q), LayerNorm(x W^K)        without scale and bias: on a sphere; K = Q where they are shared
    μ(t)  = argmax_c μ_c · t / |μ_c|                  the cluster of a query or key among k centroids per head
    y_i   = Σ_{j: μ(K_j) = μ(Q_i)} A_ij V_j           A = softmax over these j of Q_i · K_j / √d_h
    μ_c   ← λ μ_c + (1−λ)/2 Σ_{μ(Q_i) = c} Q_i + (1−λ)/2 Σ_{μ(K_j) = c} K_j         in training, after the output

For clusters of one size, centroid c instead takes the w = ⌈n/k⌉ queries and the w keys nearest to it; a query in many
clusters gets the mean of what they give, one in none gets 0. The paper computes it so, with local heads as the other
half. With ``masked=True`` later tokens are hidden, as in its language models, whose keys are the queries.

The w nearest are chosen from the whole sequence, so that with ``masked=True`` later tokens still have a say in the
clusters. ``causal=True`` keeps to the assignment μ(t) above, where they have none, and can decode.

Cost: time O(n k d + n² d / k) (with clusters of unequal size the sum of their squares), O(n^1.5 d) for k = √n; memory
O(n d + n k h).

Differences: scores are scaled by 1/√d_h, on which the paper was not read; the authors' code scales before normalising,
which leaves d_h times the cosine. Only the direction of a centroid counts, as in spherical k-means, and one without
tokens stays; the code divides by running counts. Its relative embedding of places within a cluster and its further
linear map after the heads are not in here: order comes from the local heads (`position`) or from the input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.mechanism import Mechanism, head_width
from regard.nn.sparse.window import WindowAttention, WindowState
from regard.ops.attention import attention, attention_weights
from regard.ops.cache import KeyValueCache
from regard.ops.checks import require
from regard.ops.masks import Causal, Mask, Ordered, Padding, Segments
from regard.ops.precision import statistics_dtype, without_autocast


class Groups(NamedTuple):
    """Which queries and keys stand together, in the order of the sequence, and who sees whom within a group."""

    query: Int[Tensor, "batch heads groups size"]
    key: Int[Tensor, "batch heads groups size"]
    mask: Mask | None
    full: Bool[Tensor, "batch 1 1 size"] | None = None
    """Places that hold a token; all where None."""


@dataclass(frozen=True)
class RoutingState:
    """Keys, values and clusters of the tokens seen by routing heads, and what the local heads keep."""

    cache: KeyValueCache
    clusters: Int[Tensor, "batch heads length"]
    local: WindowState | None


@register(
    "routing_transformer",
    paper="routing_transformer",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self", "causal self"),
        time="n*d*d+n*clusters*d+n*n/clusters*d+n*min(n, window)*d",
        memory="n*(d+h*clusters)",
        padding=True,
        step=True,
        state="linear",
        attention_map=True,
        options=(
            OptionSet({"window": 4, "position": "rotary"}, {"positions": True}),
            OptionSet(
                {"clusters": 2, "local_heads": 0, "shared": True, "position": None}, {"permutation": "equivariant"}
            ),
            OptionSet(
                {"clusters": 12, "local_heads": 0, "shared": False, "position": None}, {"permutation": "equivariant"}
            ),
            # They hide later tokens and yet are clustered by them: neither a causal pattern nor a noncausal one.
            OptionSet(
                {"masked": True, "shared": True, "clusters": 3, "local_heads": 1, "window": 5},
                {"patterns": (), "step": False, "state": None},
            ),
            OptionSet(
                {"masked": True, "shared": False, "clusters": 2, "local_heads": 0, "decay": 0.9},
                {"patterns": (), "step": False, "state": None},
            ),
        ),
    ),
)
class RoutingAttention(Mechanism):
    """Queries and keys are clustered by online k-means; attention stays inside clusters, beside local heads.

    Args:
        heads: number of heads of both kinds.
        local_heads: how many of them are local; half of them by default.
        clusters: number k of clusters of each routing head; about √n, in the paper, for n tokens.
        window: what local heads see, as in `WindowAttention`.
        shared: whether keys are the queries; as in the paper, where later tokens are hidden, by default.
        causal: whether a token sees only itself and what came before; clusters are then of any size.
        masked: whether later tokens are hidden from a token and yet take part in the choice of clusters.
        position: ``"rotary"`` turns queries and keys of local heads.
        decay: λ, how slowly centroids follow the tokens in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        local_heads: int | None = None,
        clusters: int = 8,
        window: int = 256,
        shared: bool | None = None,
        causal: bool = False,
        masked: bool = False,
        position: Literal["rotary"] | None = None,
        decay: float = 0.999,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.clusters, self.causal, self.masked, self.decay = dim, clusters, causal, masked, decay
        self.position = position
        self.head_dim = head_width(self._name, dim, heads, None)
        local_heads = heads // 2 if local_heads is None else local_heads
        require(
            0 <= local_heads < heads,
            self._name,
            f"local_heads {local_heads} of heads {heads}",
            "leave one routing head at least",
        )
        require(clusters > 0, self._name, f"clusters {clusters}", "give a positive number")
        require(0.0 <= decay <= 1.0, self._name, f"decay {decay}", "give a number in [0, 1]")
        require(
            not (causal and masked),
            self._name,
            f"masked={masked} with causal={causal}",
            "choose: masked tokens are hidden but choose clusters, with causal they do neither",
        )
        require(
            position is None or local_heads > 0,
            self._name,
            f"position {position!r} with local_heads {local_heads}",
            "only local heads have positions",
        )
        self.shared = (causal or masked) if shared is None else shared
        self.routing_heads = heads - local_heads
        factory = {"device": device, "dtype": dtype}
        width = self.routing_heads * self.head_dim
        self.query = nn.Linear(dim, width, bias=False, **factory)
        self.key = None if self.shared else nn.Linear(dim, width, bias=False, **factory)
        self.value = nn.Linear(dim, width, bias=False, **factory)
        self.output = nn.Linear(width, dim, bias=False, **factory)
        self.local: WindowAttention | None = None
        if local_heads:
            self.local = WindowAttention(
                dim,
                heads=local_heads,
                head_dim=self.head_dim,
                window=window,
                causal=causal or masked,
                position=position,
                **factory,
            )
        # At least float32: a half type would not move by (1 − λ) of itself.
        precise = statistics_dtype(dtype or torch.get_default_dtype())
        centroids = torch.empty(self.routing_heads, clusters, self.head_dim, device=device, dtype=precise)
        self.register_buffer("centroids", centroids)
        self.centroids: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform projections, random centroids on the sphere."""
        for projection in (self.query, self.key, self.value, self.output):
            if projection is not None:
                nn.init.xavier_uniform_(projection.weight)
        with torch.no_grad():
            self.centroids.copy_(_on_sphere(torch.randn_like(self.centroids)))

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself; `mask` may be a ``Padding``. In training the centroids then follow the tokens."""
        query, key, value = self.project(x, context, mask, positions)
        out = self.merge(self.attend(query, key, value, mask))
        if self.training:
            self.follow(query, key, mask)
        return out if self.local is None else out + self.local(x, mask=mask, positions=positions)

    def attend(
        self,
        query: Float[Tensor, "batch heads length head_dim"],
        key: Float[Tensor, "batch heads length head_dim"],
        value: Float[Tensor, "batch heads length head_dim"],
        mask: Padding | None = None,
    ) -> Float[Tensor, "batch heads length head_dim"]:
        """Attention inside clusters between projected heads."""
        groups = self.groups(query, key, mask)
        inside = attention(
            _gathered(query.to(value.dtype), groups.query),
            _gathered(key.to(value.dtype), groups.key),
            _gathered(value, groups.key),
            mask=groups.mask,
        )
        rows = inside.reshape(*groups.query.shape, -1)
        return _mean(rows, groups, query.shape[2])

    def groups(
        self,
        query: Float[Tensor, "batch heads length head_dim"],
        key: Float[Tensor, "batch heads length head_dim"],
        mask: Padding | None = None,
    ) -> Groups:
        """The clusters of one size, a group each; with ``causal=True`` one group in the order of the clusters."""
        heads, length = query.shape[1:3]
        real = None if mask is None else self._real(query, mask)
        if self.causal:
            chosen, ids = self._sorted(query, real)
            seen, key_ids = (chosen, ids) if self.shared else self._sorted(key, real)
            order = Causal() if self.shared else Ordered(*(each.flatten(0, 1).int() for each in (chosen, seen)))
            same = Segments(key_ids.flatten(0, 1), None if self.shared else ids.flatten(0, 1)) & order
            if mask is not None:
                same = same & Padding(mask.lengths.to(query.device).repeat_interleave(heads))
            return Groups(chosen[:, :, None], seen[:, :, None], same)
        size, full, counts = -(-length // self.clusters), None, None
        if mask is not None:
            counts = -(-mask.lengths.to(query.device) // self.clusters)
            full = (torch.arange(size, device=query.device) < counts[:, None])[:, None, None]
        chosen = self._nearest(query, real, full, size)
        seen = chosen if self.shared else self._nearest(key, real, full, size)
        inside: Mask | None = None
        if self.masked:
            inside = Causal() if self.shared else Ordered(chosen.flatten(0, 2), seen.flatten(0, 2))
        if counts is not None:
            lengths = Padding(counts.repeat_interleave(heads * self.clusters))
            inside = lengths if inside is None else inside & lengths
        return Groups(chosen, seen, inside, full)

    def similarities(
        self, tokens: Float[Tensor, "batch heads length head_dim"]
    ) -> Float[Tensor, "batch heads length k"]:
        """The product of queries or keys with the direction of every centroid."""
        with torch.no_grad(), without_autocast(tokens.device):
            precise = statistics_dtype(tokens.dtype)
            means = F.normalize(self.centroids.to(precise), dim=-1)
            return tokens.to(precise) @ means.mT

    @torch.no_grad()
    def follow(self, query: Tensor, key: Tensor, mask: Padding | None = None) -> None:
        """Move the centroids towards the queries and keys of their clusters."""
        sums, counts = 0.0, 0.0
        for tokens in (query, key):
            nearest = self.similarities(tokens).argmax(-1)
            members = F.one_hot(nearest, self.clusters).to(self.centroids.dtype)
            if mask is not None:
                members = members * self._real(query, mask)[..., None]
                tokens = tokens.where(self._real(query, mask)[..., None], 0.0)
            found = tokens.to(self.centroids.dtype)
            sums = sums + einsum(members, found, "batch heads length k, batch heads length width -> heads k width") / 2
            counts = counts + members.sum((0, 2))
        moved = self.decay * self.centroids + (1 - self.decay) * sums
        self.centroids.copy_(torch.where((counts > 0)[..., None], moved, self.centroids))

    def commitment_loss(
        self, x: Float[Tensor, "batch length dim"], *, mask: Padding | None = None
    ) -> Float[Tensor, ""]:
        """Mean squared distance of queries and keys from their centroids: the authors' code adds 1e-4 of it."""
        query, key, _ = self.project(x, None, mask, None)
        losses = []
        for tokens in (query, key):
            nearest = self.similarities(tokens).argmax(-1)
            means = F.normalize(self.centroids, dim=-1).to(tokens.dtype) * self.head_dim**0.5
            goals = _taken(means.expand(x.shape[0], -1, -1, -1), nearest)
            squares = (tokens - goals).square().mean(-1)
            if mask is None:
                losses.append(squares.mean())
            else:
                real = self._real(query, mask).expand_as(squares)
                losses.append(squares.where(real, 0.0).sum() / real.sum().clamp(min=1))
        return losses[0] + losses[1]

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Tensor | None = None,
        *,
        mask: Padding | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch all_heads length length"], Float[Tensor, "batch all_heads length head_dim"]]:
        """The weights, 0 between clusters, and the values; local heads come last."""
        query, key, value = self.project(x, context, mask, positions)
        groups = self.groups(query, key, mask)
        inside = attention_weights(_gathered(query, groups.query), _gathered(key, groups.key), mask=groups.mask)
        inside = inside.reshape(*groups.query.shape, -1)
        length = x.shape[1]
        places = groups.key[..., None, :].expand_as(inside)
        rows = inside.new_zeros(*inside.shape[:-1], length).scatter_add(-1, places, inside)
        maps, values = [_mean(rows, groups, length).to(value.dtype)], [value]
        if self.local is not None:
            local_map, local_value = self.local.attention_map(x, mask=mask, positions=positions)
            maps, values = [*maps, local_map], [*values, local_value]
        return torch.cat(maps, dim=1), torch.cat(values, dim=1)

    def combine(self, mixed: Float[Tensor, "batch all_heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        """What the heads write, summed."""
        out = self.merge(mixed[:, : self.routing_heads])
        return out if self.local is None else out + self.local.combine(mixed[:, self.routing_heads :])

    def merge(self, mixed: Float[Tensor, "batch heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        """Concatenate the routing heads and project."""
        return self.output(rearrange(mixed, "batch heads length width -> batch length (heads width)"))

    def init_state(self, batch: int) -> RoutingState:
        """The state before the first token."""
        weight = self.value.weight
        cache = KeyValueCache.empty(batch, self.routing_heads, self.head_dim, device=weight.device, dtype=weight.dtype)
        none = torch.empty(batch, self.routing_heads, 0, device=weight.device, dtype=torch.long)
        return RoutingState(cache, none, None if self.local is None else self.local.init_state(batch))

    def step(
        self, x: Float[Tensor, "batch new dim"], state: RoutingState
    ) -> tuple[Float[Tensor, "batch new dim"], RoutingState]:
        """The outputs of one or more further tokens, and the state after them; with ``causal=True`` only."""
        self.check_step(x, self.dim, state.clusters.shape[0])
        query, key, value = self.split(x)
        cache = state.cache.append(key.to(value.dtype), value)
        clusters = torch.cat([state.clusters, self.similarities(key).argmax(-1)], dim=2)
        own = clusters[:, :, -x.shape[1] :] if self.shared else self.similarities(query).argmax(-1)
        mixed = attention(
            *(each.flatten(0, 1)[:, None] for each in (query.to(value.dtype), cache.key, cache.value)),
            mask=Causal() & Segments(clusters.flatten(0, 1), own.flatten(0, 1)),
        )
        out, local = self.merge(mixed.view_as(query)), None
        if self.local is not None and state.local is not None:
            near, local = self.local.step(x, state.local)
            out = out + near
        return out, RoutingState(cache, clusters, local)

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Checked arguments as normalised queries and keys, and values, of the routing heads."""
        turned = self.local is not None and self.local.position == "rotary"
        self.check_tokens(x, context, mask, positions, takes_positions=turned)
        self.check_width(x, self.dim)
        if mask is not None:
            mask.validate(x.shape[0], self.routing_heads, x.shape[1], x.shape[1])
        return self.split(x)

    def split(self, x: Float[Tensor, "batch length dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """Project, split into heads and normalise queries and keys."""
        query, value = (self._heads(projection(x)) for projection in (self.query, self.value))
        query = _on_sphere(query)
        return query, query if self.key is None else _on_sphere(self._heads(self.key(x))), value

    def _heads(self, projected: Tensor) -> Float[Tensor, "batch heads length head_dim"]:
        return rearrange(projected, "batch length (heads width) -> batch heads length width", heads=self.routing_heads)

    def _real(self, tokens: Tensor, mask: Padding) -> Bool[Tensor, "batch 1 length"]:
        return mask.real(tokens.shape[2]).to(tokens.device)[:, None]

    def _sorted(self, tokens: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens in the order of their clusters, earlier ones first in each, and the clusters; padding is last."""
        ids = self.similarities(tokens).argmax(-1)
        sorted_ids, order = (ids if real is None else ids.where(real, self.clusters)).sort(dim=-1, stable=True)
        return order, sorted_ids.int()

    def _nearest(
        self, tokens: Tensor, real: Tensor | None, full: Tensor | None, size: int
    ) -> Int[Tensor, "batch heads groups size"]:
        """The tokens nearest to each centroid, in the order of the sequence, and then places without a token."""
        near, length = self.similarities(tokens).mT, tokens.shape[2]
        if real is None or full is None:
            return near.topk(size, dim=-1).indices.sort(dim=-1).values
        index = near.masked_fill(~real[:, :, None], -torch.inf).topk(size, dim=-1).indices
        return index.where(full, length).sort(dim=-1).values.clamp(max=length - 1)


def _on_sphere(tokens: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
    """LayerNorm without scale and bias, in at least float32: which cluster is nearest hangs on little."""
    with without_autocast(tokens.device):
        return F.layer_norm(tokens.to(statistics_dtype(tokens.dtype)), tokens.shape[-1:], eps=1e-6)


def _taken(tokens: Tensor, index: Int[Tensor, "batch heads chosen"]) -> Float[Tensor, "batch heads chosen width"]:
    # Whole rows at once: many times faster than gather and its gradient.
    taken = tokens.reshape(-1, tokens.shape[3]).index_select(0, _rows(index, tokens.shape[2]))
    return taken.view(*index.shape, tokens.shape[3])


def _rows(index: Int[Tensor, "batch heads chosen"], length: int) -> Int[Tensor, " all_chosen"]:
    """Indices into a sequence as indices into those of all samples and heads, one after the other."""
    row = torch.arange(index.shape[0] * index.shape[1], device=index.device).view(*index.shape[:2], 1)
    return (row * length + index).flatten()


def _gathered(
    tokens: Tensor, index: Int[Tensor, "batch heads groups size"]
) -> Float[Tensor, "all_groups 1 size width"]:
    """Every group as a sample of its own."""
    return _taken(tokens, index.flatten(2)).reshape(-1, 1, index.shape[3], tokens.shape[3])


def _mean(
    rows: Float[Tensor, "batch heads groups size width"], groups: Groups, length: int
) -> Float[Tensor, "batch heads length width"]:
    """The mean of what a query gets in its groups, 0 where it is in none."""
    batch, heads, _, _, width = rows.shape
    taken = rows.new_ones(1, 1, 1, 1, 1)
    if groups.full is not None:
        taken = groups.full[..., None].to(rows.dtype)
        rows = rows * taken
    places = _rows(groups.query.flatten(2), length)
    total = rows.new_zeros(batch * heads * length, width).index_add(0, places, rows.flatten(0, 3))
    counts = rows.new_zeros(batch * heads * length, 1)
    counts = counts.index_add(0, places, taken.expand(*rows.shape[:4], 1).flatten(0, 3))
    return (total / counts.clamp(min=1)).view(batch, heads, length, width)
