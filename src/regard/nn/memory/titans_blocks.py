"""The three Titans around a neural memory: memory as a context, as a gate and as a layer. "Titans: Learning to Memorize
at Test Time", Behrouz et al., 2024, arXiv 2501.00663.

    MAC   h = M*_{t−1}(q), q = S^(t) W_Q        M_{t−1}: the memory after the last segment; M*: read, nothing written
          y = Attn([p_1 … p_Np] ‖ h ‖ S^(t))    S^(t): segment t of x
          M_t = M_{t−1}(y),  o = y ⊗ M*_t(y)
    MAG   x̃ = [p_1 … p_Np] ‖ x,  o = SWA*(x̃) ⊗ M(x̃)           SWA*: a sliding window, and the p_i in sight of all
    MAL   x̃ = [p_1 … p_Np] ‖ x,  o = SWA(M(x̃))
    y ⊗ m = RMSNorm(y) ⊙ sigmoid(RMSNorm(m))

The p_i are learned: persistent memory. M is `NeuralMemory`, `memory` its arguments; attention has rotary positions,
counted from p_1 (in MAC anew in each segment). Outputs of the p_i are dropped.

Cost: MAC time O(n (2 s + N_p) d), MAG and MAL O(n (w + N_p) d), memory O(n d), beside those of the neural memory, for
segments of s and windows of w tokens. The decoding state is that of the memory, and in MAC the memory after the last
segment and keys and values of one, in MAG and MAL those of the window.

Differences: these are layers of a model, which has the norms, residual connections and MLPs. A token of MAC sees those
h_j and reads that M_t which come from tokens up to itself: the paper's, of the whole segment, would see its future. Of
⊗ the paper says that both sides are normalised with learned weights, before a non-linearity. Its models have 128
persistent tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.attention import Attention
from regard.nn.mechanism import Mechanism, head_width
from regard.nn.memory.titans import NeuralMemory, NeuralMemoryState, Projection, without_padding
from regard.nn.sparse.window import WindowAttention, WindowState
from regard.ops.attention import attention
from regard.ops.checks import one_of, require
from regard.ops.masks import Dense, Mask
from regard.ops.neural_memory import Weights, chunks
from regard.ops.positions import rotary

_SMALL_MEMORY = {"heads": 2, "chunk_size": 8, "expansion": 2}
_CONTRACT = Contract(
    input="tokens",
    patterns=("causal self",),
    time="n*d*d + n*(window + persistent)*d",
    memory="(n + persistent)*d*d/h",
    padding=True,
    step=True,
    state="constant",
    options=(
        OptionSet({"window": 5, "persistent": 3, "memory": _SMALL_MEMORY}),
        OptionSet({"window": 64, "persistent": 0, "position": None, "memory": {"convolution": 0, "depth": 1}}),
    ),
)


class _Titans(Mechanism, ABC):
    """A memory, persistent tokens and the checks; `_advance` is what a derived class adds."""

    def __init__(
        self,
        dim: int,
        heads: int,
        persistent: int,
        position: str | None,
        memory: Mapping[str, object] | None,
        **factory: Any,
    ) -> None:
        super().__init__()
        head_width(self._name, dim, heads, None)
        require(persistent >= 0, self._name, f"persistent {persistent}", "give 0 or more tokens")
        if position is not None:
            one_of(self._name, "position", position, ("rotary",))
        self.dim, self.heads = dim, heads
        self.memory = NeuralMemory(dim, **{**(memory or {}), **factory})  # pyright: ignore[reportArgumentType] it checks
        self.persistent = nn.Parameter(torch.randn(persistent, dim, **factory)) if persistent else None

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Attend and memorise causally. `mask` may be a ``Padding``."""
        self.check_tokens(x, None, mask, None, takes_positions=False)
        self.check_width(x, self.dim)
        return self._advance(without_padding(x, mask), self.init_state(x.shape[0]))[0]

    def step(self, x: Float[Tensor, "batch new dim"], state: Any) -> tuple[Float[Tensor, "batch new dim"], Any]:
        """The outputs of one or more further tokens, and the state after them."""
        self.check_step(x, self.dim, state.memory.key.shape[0])
        return self._advance(x, state)

    @abstractmethod
    def init_state(self, batch: int) -> Any:
        """The state before the first token."""

    @abstractmethod
    def _advance(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Outputs of checked tokens, and the state after them."""


class Gating(nn.Module):
    """``RMSNorm(y) ⊙ sigmoid(RMSNorm(m))``, with learned weights."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.attended = nn.RMSNorm(dim, eps=1e-6, device=device, dtype=dtype)
        self.remembered = nn.RMSNorm(dim, eps=1e-6, device=device, dtype=dtype)

    def forward(self, attended: Tensor, remembered: Tensor) -> Tensor:
        return self.attended(attended) * self.remembered(remembered).sigmoid()


class ContextState(NamedTuple):
    """What memory as a context keeps: the memory, what it was after the last segment, the last inputs of the queries'
    convolution, and keys and values of the segment (room for a whole one; of what was remembered, then of tokens)."""

    memory: NeuralMemoryState
    past: Weights
    query: Float[Tensor, "batch kept dim"]
    key: Float[Tensor, "batch heads kinds segment head_dim"]
    value: Float[Tensor, "batch heads kinds segment head_dim"]
    place: int


@register(
    "titans_mac",
    paper="titans",
    contract=Contract(
        input="tokens",
        patterns=("causal self",),
        time="n*d*d + n*(2*segment + persistent)*d",
        memory="(n + persistent)*d*d/h",
        padding=True,
        step=True,
        state="constant",
        options=(
            OptionSet({"segment": 6, "persistent": 0, "memory": _SMALL_MEMORY}),
            OptionSet({"segment": 32, "persistent": 3, "position": None, "memory": {"convolution": 0, "depth": 1}}),
        ),
    ),
)
class TitansContext(_Titans):
    """Memory as a context: attention within segments sees what the memory recalls, and writes what it makes of it.

    Args:
        dim: width of the tokens.
        heads: number of heads of the attention.
        segment: number of tokens that attention sees at most.
        persistent: number of learned tokens in front of every segment.
        position: ``"rotary"`` or None.
        memory: arguments of the `NeuralMemory`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        segment: int = 128,
        persistent: int = 16,
        position: Literal["rotary"] | None = "rotary",
        memory: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(dim, heads, persistent, position, memory, **factory)
        require(segment > 0, self._name, f"segment {segment}", "give a positive number of tokens")
        self.segment, self.position = segment, position
        self.recall = Projection(dim, self.memory.key.kept + 1 if self.memory.key.convolution else 0, **factory)
        self.attention = Attention(dim, heads=heads, causal=True, position=position, **factory)
        self.gating = Gating(dim, **factory)

    def init_state(self, batch: int) -> ContextState:
        memory, like = self.memory.init_state(batch), self.attention.key.weight
        none = like.new_zeros(batch, self.heads, 2, self.segment, self.attention.head_dim)
        return ContextState(memory, memory.memory.weights, self.recall.init_state(batch), none, none, 0)

    def _advance(self, x: Tensor, state: ContextState) -> tuple[Tensor, ContextState]:
        asked, kept = self.recall(x, state.query)
        state, outs = state._replace(query=kept), []
        first = self._persistent(x.shape[0])
        # Split, not sliced: the gradient of a slice is as long as the sequence.
        sizes = chunks(x.shape[1], state.place, self.segment)
        for tokens, questions in zip(x.split(sizes, dim=1), asked.split(sizes, dim=1), strict=True):
            out, state = self._segment(tokens, questions, first, state)
            outs.append(out)
        return torch.cat(outs, dim=1), state

    def _segment(
        self, x: Tensor, asked: Tensor, first: tuple[Tensor, Tensor], state: ContextState
    ) -> tuple[Tensor, ContextState]:
        """Tokens of one segment."""
        begin, end = state.place, state.place + x.shape[1]
        remembered = self.memory.retrieve(asked, state.past)
        query, *own = self.attention.split(x, x)
        recalled = self.attention.split(remembered, remembered)[1:]
        # Remembered and own tokens of the segment so far, of keys and of values.
        key, value = (
            torch.cat([old[:, :, :, :begin], torch.stack(new, dim=2)], dim=3)
            for old, new in zip((state.key, state.value), zip(recalled, own, strict=True), strict=True)
        )
        y = self._attend(query, key, value, first, begin)
        written, memory = self.memory.step(y, state.memory)
        # Room for the whole segment, so that the state is of one size.
        key, value = (F.pad(kept, (0, 0, 0, self.segment - end)) for kept in (key, value))
        past = memory.memory.weights if end == self.segment else state.past
        return self.gating(y, written), ContextState(memory, past, state.query, key, value, end % self.segment)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, first: tuple[Tensor, Tensor], begin: int
    ) -> Float[Tensor, "batch length dim"]:
        tokens, persistent = key.shape[3], first[0].shape[2]
        places = torch.arange(tokens, device=key.device)
        if self.position is not None:
            # In the paper's order: persistent tokens, all that is remembered, the segment.
            spots = torch.cat([persistent + places, persistent + self.segment + places])
            query = rotary(query, spots[tokens + begin :])
            key = rotary(key.flatten(2, 3), spots).view_as(key)
        seen = places <= places[begin:, None]
        allowed = torch.cat([seen.new_ones(tokens - begin, persistent), seen, seen], dim=1)
        keys, values = (
            torch.cat([mine, given.flatten(2, 3)], dim=2) for mine, given in zip(first, (key, value), strict=True)
        )
        return self.attention.combine(attention(query, keys, values, mask=Dense(allowed)))

    def _persistent(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the persistent tokens."""
        if self.persistent is None:
            empty = self.attention.key.weight.new_zeros(batch, self.heads, 0, self.attention.head_dim)
            return empty, empty
        _, key, value = self.attention.split(self.persistent[None], self.persistent[None])
        if self.position is not None:
            key = rotary(key, torch.arange(key.shape[2], device=key.device))
        return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)


class BranchState(NamedTuple):
    """What memory as a gate or as a layer keeps."""

    memory: NeuralMemoryState
    attention: WindowState


class _Windowed(_Titans):
    """A memory and a sliding window over persistent tokens and x."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        sinks: int,
        persistent: int,
        position: Literal["rotary"] | None,
        memory: Mapping[str, object] | None,
        **factory: Any,
    ) -> None:
        super().__init__(dim, heads, persistent, position, memory, **factory)
        self.attention = WindowAttention(
            dim, heads=heads, window=window, sinks=sinks, causal=True, position=position, **factory
        )

    def init_state(self, batch: int) -> BranchState:
        state = BranchState(self.memory.init_state(batch), self.attention.init_state(batch))
        if self.persistent is None:
            return state
        return self._advance(self.persistent.expand(batch, -1, -1), state)[1]


@register(
    "titans_mag",
    paper="titans",
    contract=_CONTRACT,
)
class TitansGate(_Windowed):
    """Memory as a gate: a sliding window and a memory side by side, one gating the other.

    Args:
        dim: width of the tokens.
        heads: number of heads of the attention.
        window: number of tokens in sight, the own one included.
        persistent: number of learned tokens before the first, in sight of all.
        position: ``"rotary"`` or None.
        memory: arguments of the `NeuralMemory`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 256,
        persistent: int = 16,
        position: Literal["rotary"] | None = "rotary",
        memory: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(dim, heads, window, persistent, persistent, position, memory, **factory)
        self.gating = Gating(dim, **factory)

    def _advance(self, x: Tensor, state: BranchState) -> tuple[Tensor, BranchState]:
        attended, window = self.attention.step(x, state.attention)
        remembered, memory = self.memory.step(x, state.memory)
        return self.gating(attended, remembered), BranchState(memory, window)


@register(
    "titans_mal",
    paper="titans",
    contract=_CONTRACT,
)
class TitansLayer(_Windowed):
    """Memory as a layer: a sliding window over what a memory makes of the tokens.

    The arguments are those of `TitansGate`; persistent tokens are in sight as long as the window reaches them.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        window: int = 256,
        persistent: int = 16,
        position: Literal["rotary"] | None = "rotary",
        memory: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory = {"device": device, "dtype": dtype}
        super().__init__(dim, heads, window, 0, persistent, position, memory, **factory)

    def _advance(self, x: Tensor, state: BranchState) -> tuple[Tensor, BranchState]:
        remembered, memory = self.memory.step(x, state.memory)
        attended, window = self.attention.step(remembered, state.attention)
        return attended, BranchState(memory, window)
