"""Landmark attention. "Landmark Attention: Random-Access Infinite Context Length for Transformers", Mohtashami & Jaggi,
2023, arXiv 2305.16300.

After every b tokens stands a landmark; the b tokens and their landmark are a section. Query i of section t gives

    g_i  = softmax of [q_i · k_j / √d_h for j ≤ i in section t ;  q_i · k_s* / √d_h for s < t]    k_s*: landmark s
    w_ij = g_ij in the own section,    g_is · softmax_{j' in s}(q_i · k_j' / √d_h)_j in section s < t
    o_i  = Σ_j w_ij v_j                            landmarks and the own section's landmark have no weight

so that w_i is the softmax of the scores with ``q_i · k_s* − lse_{j in s}`` added in section s. At inference `retrieved`
blocks per query and head, those with the highest landmark scores, stand for all of them: keys and values of blocks are
kept where `offload` says, and only the chosen ones are fetched. Rotary positions (which count landmarks) are then
stingy: right before the own section lies a segment of k + 1 sections; the last k blocks keep their true distance, all
others are scored at its first section, and the chosen ones stand in it in their order, those not of the last k to the
left (their landmarks' scores in g are from there). No distance is larger than k + 2 sections.

b is `block_size`, k is `retrieved`. Cost: time O(n m d), with retrieval O(n (n / b + (k + 1) b) d); memory O(n d) (rows
are computed a tile at a time and again in backward). The decoding state holds all tokens, of which a step with
retrieval reads n / b landmark keys, k b tokens and the own section.

Differences: in the paper landmarks are tokens of the sequence, put in before the first layer, and after one layer they
know their block. ``carried=True`` is that: every (b + 1)-th token of `x` is a landmark and has an output
(`insert_landmarks`, `remove_landmarks`). By default the layer inserts landmarks itself, so that it takes plain tokens
and gives one output for each: its learned vector ℓ would say nothing of its block, so it reads it first, as a layer
with the same weights would, ``k_s* = W^K (ℓ + W^O attend(W^Q ℓ, block s))``, and is then taken out again. Memory begins
at the own section, where the paper processes an input in pieces of several sections and chooses among those before the
piece; each query and head has its own choice, of which the paper also tries coarser ones. Landmarks stand at regular
places, so that no section is a landmark alone, whose mass the formula would lose. The sequences of a packed row have
sections of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.catalogue import OptionSet, Taxonomy, register
from regard.nn.attention import ATTENTION, Attention, Position
from regard.nn.conversion import converted
from regard.nn.heads.multi_head import MultiHeadAttention
from regard.nn.memory._sections import Reading, Sections
from regard.ops.attention import attention
from regard.ops.cache import KeyValueCache
from regard.ops.checks import one_of, require
from regard.ops.masks import Mask, segments_of
from regard.ops.positions import rotary
from regard.ops.precision import statistics_dtype, without_autocast


@dataclass(frozen=True)
class LandmarkState:
    """Keys and values of the tokens of closed blocks, the keys of their landmarks, and the section that is still open.

    The first may be on another device (`offload`) than the others.
    """

    blocks: KeyValueCache
    landmarks: KeyValueCache
    key: Float[Tensor, "batch heads open head_dim"]
    value: Float[Tensor, "batch heads open head_dim"]


@register(
    "landmark",
    paper="landmark",
    taxonomy=Taxonomy(),
    contract=replace(
        ATTENTION,
        patterns=("causal self",),
        memory="n*d",
        any_mask=False,
        exact=False,
        permutation=None,
        # The suite's sequences do not close a block of 50 tokens, and nobody looks for an open one by its landmark.
        frozen=("landmark",),
        options=(
            OptionSet({"block_size": 3}, {"frozen": ()}),
            OptionSet({"block_size": 2, "carried": True, "position": "rotary"}, {"frozen": ()}),
            OptionSet(
                {"block_size": 4, "retrieved": 1, "position": "rotary", "offload": "cpu"},
                {"frozen": (), "time": "n*(n/block_size+(retrieved+1)*block_size)*d"},
            ),
            # A key's bias adds the same to every score of a row, which both softmaxes take off again.
            OptionSet(
                {"block_size": 1, "retrieved": 3, "carried": True, "head_dim": 6, "bias": True, "dropout": 0.1},
                {"frozen": ("key.bias",), "time": "n*(n/block_size+(retrieved+1)*block_size)*d"},
            ),
        ),
    ),
)
class LandmarkAttention(Attention):
    """Tokens of earlier blocks are reached through a landmark of their block, which also finds blocks in a memory.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        block_size: number of tokens between two landmarks.
        retrieved: number of earlier blocks that each query and head attends to, those whose landmarks score highest;
            all by default, as in training. The attribute may be set afterwards, between two sequences.
        carried: whether landmarks are tokens of `x`, every ``block_size + 1``-th; otherwise the layer inserts them.
        head_dim: width of a head; ``dim / heads`` by default.
        position: None or ``"rotary"``.
        bias: whether the projections have biases.
        dropout: probability of dropping an attention weight in training.
        offload: where `step` keeps keys and values of blocks, e.g. ``"cpu"``; beside the weights by default.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        block_size: int = 50,
        retrieved: int | None = None,
        carried: bool = False,
        head_dim: int | None = None,
        position: Position | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        offload: torch.device | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if position is not None:
            one_of(self._name, "position", position, ("rotary",))
        require(block_size > 0, self._name, f"block_size {block_size}", "give a positive number of tokens")
        require(
            retrieved is None or retrieved > 0,
            self._name,
            f"retrieved {retrieved}",
            "give a positive number of blocks, or None for all",
        )
        super().__init__(
            dim,
            heads=heads,
            head_dim=head_dim,
            causal=True,
            position=position,
            bias=bias,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self.block_size, self.retrieved, self.carried, self.offload = block_size, retrieved, carried, offload
        if not carried:
            self.landmark = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform projections; the landmark is drawn as the embedding of a token, with deviation 0.02."""
        super().reset_parameters()
        if "landmark" in self._parameters:
            nn.init.normal_(self.landmark, std=0.02)

    @classmethod
    def from_multi_head(
        cls, layer: MultiHeadAttention, *, block_size: int = 50, carried: bool = False
    ) -> LandmarkAttention:
        """A layer to fine-tune from a trained causal one, which it equals up to the first landmark."""
        return converted(cls, layer, causal=True, block_size=block_size, carried=carried)

    @property
    def section(self) -> int:
        """Tokens of `x` in a section."""
        return self.block_size + self.carried

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """Attend from `x` to itself; `mask` is None, ``Padding`` or ``Segments``."""
        query, key, value = self.project(x, context, mask, positions)
        own = Sections.of(x.shape[1], self.section, mask, x.device)
        reading = self._reading(query, own, own.grid(key), own.grid(value))
        return self._read(reading, own, self.dropout if self.training else 0.0)

    def attention_map(
        self,
        x: Float[Tensor, "batch length dim"],
        context: Float[Tensor, "batch context_length context_dim"] | None = None,
        *,
        mask: Mask | None = None,
        positions: Int[Tensor, "*batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads length keys"], Float[Tensor, "batch heads keys head_dim"]]:
        query, key, value = self.project(x, context, mask, positions)
        own = Sections.of(x.shape[1], self.section, mask, x.device)
        with without_autocast(x.device):
            weights = self._reading(query, own, own.grid(key), own.grid(value)).weights()
        return own.tokens(weights).to(value.dtype), value

    def init_state(self, batch: int) -> LandmarkState:
        weight, shape = self.key.weight, (batch, self.heads, self.head_dim)
        store = weight.device if self.offload is None else torch.device(self.offload)
        none = weight.new_empty(batch, self.heads, 0, self.head_dim).detach()
        return LandmarkState(
            KeyValueCache.empty(*shape, device=store, dtype=weight.dtype),
            KeyValueCache.empty(*shape, value_dim=0, device=weight.device, dtype=weight.dtype),
            none,
            none,
        )

    def step(self, x: Float[Tensor, "batch new dim"], state: LandmarkState) -> tuple[Tensor, LandmarkState]:
        query, key, value = self.project_step(x, 0, state.key.shape[0])
        key, value = torch.cat([state.key, key], dim=2), torch.cat([state.value, value], dim=2)
        own = Sections.of(key.shape[2], self.section, None, x.device, before=state.landmarks.length)
        grids = own.grid(key), own.grid(value)
        closed = key.shape[2] // self.section
        blocks, landmarks, store = state.blocks, state.landmarks, state.blocks.key_buffer.device
        if closed:
            block_key, block_value, landmark = self._close(grids[0][:, :, :closed], grids[1][:, :, :closed], own.before)
            blocks = blocks.append(block_key.flatten(2, 3).to(store), block_value.flatten(2, 3).to(store))
            landmarks = landmarks.append(landmark, landmark[..., :0])
        # Copies: what is left of a long prompt would keep all of it alive.
        key, value = (tokens[:, :, closed * self.section :].clone() for tokens in (key, value))
        after = LandmarkState(blocks, landmarks, key, value)
        return self._read(self._reading(query, own, *grids, after), own), after

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None, *, seen: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads; positions go by section and are applied there."""
        self.check_tokens(x, context, mask, positions, takes_positions=False)
        self.check_width(x, self.dim)
        if mask is not None:
            mask.validate(x.shape[0], self.heads, x.shape[1], x.shape[1])
        segments = segments_of(mask)
        require(
            segments is None or segments.query_ids is None,
            self._name,
            "Segments with query_ids for a self-attention",
            "give ids alone",
        )
        return self.split(x, x)

    def _read(self, reading: Reading, own: Sections, dropout: float = 0.0) -> Float[Tensor, "batch length dim"]:
        with without_autocast(reading.query.device):
            mixed = reading.read(own, dropout)
        return self.combine(mixed.to(self.output.weight.dtype))

    def _reading(
        self, query: Tensor, own: Sections, key: Tensor, value: Tensor, state: LandmarkState | None = None
    ) -> Reading:
        """`query` belongs to the last tokens of `own`, laid out in `key` and `value`; `state` holds all closed blocks.

        Without one they are the closed ones among the own sections.
        """
        filled, length, device = own.filled(), query.shape[2], query.device
        section, place, first = (part[:, -length:] for part in (own.section, own.place, own.first))
        if state is None:
            closed, kept = filled.all(-1), self._close(key, value, 0)
        else:
            size = state.landmarks.length, self.block_size
            closed = torch.ones(1, size[0], dtype=torch.bool, device=device)
            kept = state.blocks.key.unflatten(2, size), state.blocks.value.unflatten(2, size), state.landmarks.key
        statistics = statistics_dtype(query.dtype)
        query, landmark = query.to(statistics) * self.head_dim**-0.5, kept[2].to(statistics)
        key, value = (tokens[..., : self.block_size, :].to(statistics) for tokens in (key, value))
        start = (own.before + torch.arange(own.count, device=device)) * self._stride
        section = section + own.before
        near_query = self._turn_rows(query, section * self._stride + place)
        if self.retrieved is not None:
            # The own section stands right behind a segment of `retrieved` + 1 sections.
            behind = (self.retrieved + 1) * self._stride
            start, query = torch.full_like(start, behind), self._turn_rows(query, behind + place)
        reading = Reading(
            near_query if self.retrieved is None else query,
            section,
            place,
            first,
            self._turn(key, start[:, None] + torch.arange(self.block_size, device=device)),
            value,
            filled[..., : self.block_size],
            own.before,
            *kept[:2],
            closed,
            near_query,
            landmark,
        )
        if self.retrieved is None:
            return reading
        first_of_segment = torch.full((landmark.shape[2],), self.block_size, device=device)
        in_place = first_of_segment + torch.arange(landmark.shape[2], device=device) * self._stride
        return replace(
            reading,
            near=self._turn(landmark, in_place),
            far=self._turn(landmark, first_of_segment),
            landmark=landmark,
            chosen=self.retrieved,
            turn=self._turn_fetched,
        )

    def _close(
        self, key: Float[Tensor, "batch heads sections places head_dim"], value: Tensor, before: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of the blocks of whole sections and their landmarks' keys, as they are kept.

        Where all are read they are turned by position; where some are, their place depends on who reads them.
        """
        landmark = key[..., -1, :] if self.carried else self._inserted(key, value)
        key, value = key[..., : self.block_size, :], value[..., : self.block_size, :]
        if self.retrieved is None:
            start = torch.arange(before, before + key.shape[2], device=key.device) * self._stride
            key = self._turn(key, start[:, None] + torch.arange(self.block_size, device=key.device))
            landmark = self._turn(landmark, start + self.block_size)
        return key, value, landmark

    def _inserted(self, key: Tensor, value: Tensor) -> Float[Tensor, "batch heads sections head_dim"]:
        """Keys of the layer's own landmarks, which have read their blocks."""
        batch = key.shape[0]
        key, value = (rearrange(blocks, "b h s block width -> (b s) h block width") for blocks in (key, value))
        query = rearrange(self.query(self.landmark), "(heads width) -> 1 heads 1 width", heads=self.heads)
        places = torch.arange(self.block_size + 1, device=key.device)
        query, key = self._turn(query, places[-1:]), self._turn(key, places[:-1])
        read = self.combine(attention(query.expand(key.shape[0], -1, -1, -1), key, value))
        keys = self.key(self.landmark + read)
        return rearrange(keys, "(b s) 1 (heads width) -> b heads s width", b=batch, heads=self.heads)

    @property
    def _stride(self) -> int:
        """Positions from one section to the next: landmarks count."""
        return self.block_size + 1

    def _turn(self, x: Float[Tensor, "batch heads *shape head_dim"], positions: Int[Tensor, "*shape"]) -> Tensor:
        if self.position is None:
            return x
        return rotary(x.flatten(2, -2), positions.flatten()).view(x.shape)

    def _turn_rows(self, query: Tensor, positions: Int[Tensor, "batch_or_1 rows"]) -> Tensor:
        if self.position is None:
            return query
        return rotary(query, positions[0] if positions.shape[0] == 1 else positions)

    def _turn_fetched(
        self,
        key: Float[Tensor, "batch heads rows blocks places head_dim"],
        segment: Int[Tensor, "batch heads rows blocks"],
    ) -> Tensor:
        """Keys at their section of the segment, which differs by head."""
        if self.position is None:
            return key
        places = segment[..., None] * self._stride + torch.arange(self._stride, device=key.device)
        return rotary(key.flatten(2, 4).flatten(0, 1)[:, None], places.flatten(2).flatten(0, 1)).view(key.shape)


def insert_landmarks(
    x: Float[Tensor, "batch length dim"], landmark: Float[Tensor, " dim"], block_size: int
) -> Float[Tensor, "batch longer dim"]:
    """`x` with the vector `landmark` after every `block_size` tokens, for layers with ``carried=True``."""
    blocks = x.shape[1] // block_size
    whole, rest = x.split([blocks * block_size, x.shape[1] - blocks * block_size], dim=1)
    whole = whole.unflatten(1, (blocks, block_size))
    landmarks = landmark.expand(x.shape[0], blocks, 1, -1)
    return torch.cat([torch.cat([whole, landmarks], dim=2).flatten(1, 2), rest], dim=1)


def remove_landmarks(x: Float[Tensor, "batch longer dim"], block_size: int) -> Float[Tensor, "batch length dim"]:
    """What `insert_landmarks` was given."""
    return x[:, torch.arange(x.shape[1], device=x.device) % (block_size + 1) != block_size]
