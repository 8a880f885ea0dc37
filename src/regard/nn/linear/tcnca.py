"""TCNCA. "TCNCA: Temporal Convolution Network with Chunked Attention for Scalable Sequence Processing", Terzić et al.,
2023, arXiv 2312.05605; gates and attention are those of "Mega: Moving Average Equipped Gated Attention", Ma et al.,
2022, arXiv 2209.10655, the network that of "An Empirical Evaluation of Generic Convolutional and Recurrent Networks for
Sequence Modeling", Bai et al., 2018, arXiv 1803.01271.

    X' = TCN(X)                                 in place of Mega's moving average: blocks i = 0 … D − 1 in turn,
      block_i(u) = ReLU(u + (ReLU ∘ conv_i)^B(u))   conv_i over K tokens fⁱ apart, each channel alone
    Z = SiLU(X' W_z + b_z),  Q = κ_q ⊙ Z + μ_q,  K = κ_k ⊙ Z + μ_k,  V = SiLU(X W_v + b_v)
    O = f(Q Kᵀ / τ + bias) V                    one head, within chunks of c tokens
    γ = SiLU(X' W_γ + b_γ),  φ = σ(X' W_φ + b_φ)    the reset and the update gate
    Ĥ = SiLU(X' W_h + (γ ⊙ O) U_h + b_h),  Y = φ ⊙ Ĥ + (1 − φ) ⊙ X

f is softmax with τ = √z, or Laplace's ½ (1 + erf((s − μ) / (σ √2))) with τ the number of keys, μ = √½ and σ = √(1/4π).
The bias depends on the distance: a table, or rotary (R_i α)·(R_j β). The network looks at
R = 1 + B (K − 1) (f^D − 1) / (f − 1) tokens, all of them if f ≤ 1 + B (K − 1), and nothing passes from farther than
R + c − 2 away.

Cost: time O(n d (d + c + B D K)), memory O(n (d + c)); the decoding state is c keys and values and the inputs that the
convolutions still see, R d numbers.

Differences: no code is released, and the inside of the paper's residual block and its defaults were not at hand. The
block is Bai et al.'s, depthwise as the average it stands for, without weight normalisation; without `causal` its taps
lie on both sides, where Mega adds an average from the other end. Mega's norm is left to the model around.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.mechanism import Mechanism
from regard.ops.attention import attention
from regard.ops.biases import RelativeBias
from regard.ops.checks import one_of, require
from regard.ops.masks import Causal, Mask, Padding
from regard.ops.normalizers import Normalizer
from regard.ops.positions import rotary
from regard.ops.precision import statistics_dtype

INITIAL_STD = 0.02


class TemporalConvolution(NamedTuple):
    """Sizes of the convolution network."""

    kernel_size: int = 9
    dilation: int = 8
    """f: how much farther apart the taps of a block are than those of the one before."""
    depth: int = 3
    convolutions: int = 2
    """B: how many a block has."""

    @property
    def receptive_field(self) -> int:
        """R: how many tokens an output sees."""
        return 1 + self.convolutions * (self.kernel_size - 1) * sum(self.dilation**i for i in range(self.depth))

    def covering(self, length: int) -> TemporalConvolution:
        """The same, as deep as needed to see `length` tokens."""
        require(self.kernel_size > 1, "TemporalConvolution", "kernel_size 1 sees one token", "give at least 2")
        depth = 1
        while self._replace(depth=depth).receptive_field < length:
            depth += 1
        return self._replace(depth=depth)


DEFAULT = TemporalConvolution()


@dataclass(frozen=True, eq=False, repr=False)
class Laplace(Normalizer):
    """``½ (1 + erf((s_ij − μ) / (σ √2)))`` with μ = √½ and σ = √(1/4π), where it is closest to a squared ReLU."""

    def weights(self, scores: Tensor, counts: Tensor) -> Tensor:
        allowed = scores > -torch.inf
        scores = scores.masked_fill(~allowed, 0.0)
        weights = (1 + torch.erf((scores - math.sqrt(0.5)) * math.sqrt(2 * math.pi))) / 2
        return weights.masked_fill(~allowed, 0.0)


class TCNCAState(NamedTuple):
    """What decoding keeps, however many tokens were seen."""

    recent: tuple[Float[Tensor, "batch dim reach"], ...]
    """The inputs that each convolution still sees."""
    key: Float[Tensor, "batch chunk_size head_dim"]
    value: Float[Tensor, "batch chunk_size value_dim"]
    filled: int
    """How many keys and values belong to the chunk under way."""


@register(
    "tcnca",
    paper="tcnca",
    contract=Contract(
        input="tokens",
        patterns=("noncausal self", "causal self"),
        time="n*d*(d + min(n, chunk_size))",
        memory="n*(d + min(n, chunk_size))",
        padding=True,
        step=True,
        state="constant",
        options=(
            OptionSet({"chunk_size": 5, "tcn": TemporalConvolution(3, 2, 2, 1)}),
            OptionSet({"chunk_size": 8, "normalizer": "laplace", "tcn": TemporalConvolution(2, 3, 3, 2)}),
            OptionSet({"chunk_size": 6, "position": "rotary", "head_dim": 6, "value_dim": 20}),
            OptionSet({"chunk_size": 7, "normalizer": "laplace", "position": "rotary", "dropout": 0.1}),
            OptionSet({"chunk_size": 3, "attention_dropout": 0.1, "tcn": TemporalConvolution(4, 1, 1, 1)}),
        ),
    ),
)
class TCNChunkedAttention(Mechanism):
    """Gated attention within chunks; a dilated convolution network carries what is farther.

    Args:
        dim: width of the tokens.
        head_dim: width z of queries and keys; a quarter of `dim` by default.
        value_dim: width of values; twice `dim` by default.
        chunk_size: number c of tokens that attend to each other.
        tcn: kernel size, dilation factor, depth and convolutions per block of the network.
        causal: whether a token sees only itself and what came before.
        normalizer: ``"softmax"`` or ``"laplace"``.
        position: what the bias is made of: ``"relative"``, a table of the distances in a chunk, or ``"rotary"``.
        dropout: probability of dropping a feature in training: in the network, behind it, of values and of Ĥ.
        attention_dropout: probability of dropping an attention weight in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int | None = None,
        value_dim: int | None = None,
        chunk_size: int = 128,
        tcn: TemporalConvolution = DEFAULT,
        causal: bool = False,
        normalizer: Literal["softmax", "laplace"] = "softmax",
        position: Literal["relative", "rotary"] = "relative",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.chunk_size, self.tcn, self.causal = dim, chunk_size, TemporalConvolution(*tcn), causal
        self.head_dim = max(2, dim // 8 * 2) if head_dim is None else head_dim
        self.value_dim = 2 * dim if value_dim is None else value_dim
        self.dropout, self.attention_dropout = dropout, attention_dropout
        for name in ("dim", "head_dim", "value_dim", "chunk_size"):
            size = getattr(self, name)
            require(size > 0, self._name, f"{name} {size}", "give a positive number")
        for name, size in self.tcn._asdict().items():
            require(size > 0, self._name, f"{name} {size} of tcn", "give a positive number")
        for name, share in (("dropout", dropout), ("attention_dropout", attention_dropout)):
            require(0.0 <= share < 1.0, self._name, f"{name} {share}", "give a probability in [0, 1)")
        one_of(self._name, "normalizer", normalizer, ("softmax", "laplace"))
        one_of(self._name, "position", position, ("relative", "rotary"))
        require(
            position != "rotary" or self.head_dim % 2 == 0,
            self._name,
            f"head_dim {self.head_dim} is odd with position='rotary'",
            "rotary turns pairs of features: use an even head_dim",
        )
        self.normalizer, self.position = normalizer, position
        factory = {"device": device, "dtype": dtype}
        self.convolutions = nn.ModuleList(
            nn.Conv1d(dim, dim, self.tcn.kernel_size, dilation=self.tcn.dilation**block, groups=dim, **factory)
            for block in range(self.tcn.depth)
            for _ in range(self.tcn.convolutions)
        )
        self.value = nn.Linear(dim, self.value_dim, **factory)
        self.shared = nn.Linear(dim, self.head_dim, **factory)
        self.reset = nn.Linear(dim, self.value_dim, **factory)
        self.update = nn.Linear(dim, dim, **factory)
        self.hidden = nn.Linear(dim, dim, **factory)
        self.output = nn.Linear(self.value_dim, dim, bias=False, **factory)
        self.gain = nn.Parameter(torch.empty(2, self.head_dim, **factory))
        self.shift = nn.Parameter(torch.empty(2, self.head_dim, **factory))
        entries = (2 * chunk_size - 1,) if position == "relative" else (2, self.head_dim)
        self.relative = nn.Parameter(torch.empty(entries, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mega's normal weights and zero biases; convolutions as PyTorch has them."""
        for projection in (self.value, self.shared, self.reset, self.update, self.hidden, self.output):
            nn.init.normal_(projection.weight, std=INITIAL_STD)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for parameter in (self.gain, self.relative):
            nn.init.normal_(parameter, std=INITIAL_STD)
        nn.init.zeros_(self.shift)
        for convolution in self.convolutions:
            assert isinstance(convolution, nn.Conv1d)
            convolution.reset_parameters()

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Convolve, attend within chunks and gate. `mask` may be `Padding`."""
        self.check_tokens(x, None, mask, None, takes_positions=False)
        self.check_width(x, self.dim)
        batch, length, _ = x.shape
        real = lengths = None
        if isinstance(mask, Padding):
            mask.validate(batch, 1, length, length)
            real, lengths = mask.real(length).to(x.device), mask.lengths.to(x.device)
            x = x.masked_fill(~real.unsqueeze(-1), 0.0)
        moved, _ = self.convolve(x, real=real)
        query, key, value = self.project(x, moved)
        return self.gate(x, moved, self._chunked(query, key, value, lengths))

    def init_state(self, batch: int) -> TCNCAState:
        """The state before the first token."""
        weight = self.value.weight
        reaches = (self._reach(index) for index in range(len(self.convolutions)))
        return TCNCAState(
            tuple(weight.new_zeros(batch, self.dim, reach) for reach in reaches),
            weight.new_zeros(batch, self.chunk_size, self.head_dim),
            weight.new_zeros(batch, self.chunk_size, self.value_dim),
            0,
        )

    def step(
        self, x: Float[Tensor, "batch new dim"], state: TCNCAState
    ) -> tuple[Float[Tensor, "batch new dim"], TCNCAState]:
        """The outputs of one or more further tokens, and the state after them."""
        self.check_step(x, self.dim, state.key.shape[0])
        moved, recent = self.convolve(x, state.recent)
        query, key, value = self.project(x, moved)
        keys = torch.cat([state.key[:, : state.filled], key], dim=1)
        values = torch.cat([state.value[:, : state.filled], value], dim=1)
        # What is left of the chunk under way, and the chunks after it.
        end = min(keys.shape[1], self.chunk_size)
        first = end - state.filled
        attended = self._attend(query[:, :first], keys[:, :end], values[:, :end], None)
        if first < x.shape[1]:
            rest = self._chunked(query[:, first:], keys[:, end:], values[:, end:], None)
            attended = torch.cat([attended, rest], dim=1)
        filled = keys.shape[1] % self.chunk_size
        key, value = (
            F.pad(seen[:, seen.shape[1] - filled :], (0, 0, 0, self.chunk_size - filled)) for seen in (keys, values)
        )
        return self.gate(x, moved, attended), TCNCAState(recent, key, value, filled)

    def convolve(
        self,
        x: Float[Tensor, "batch length dim"],
        before: tuple[Tensor, ...] | None = None,
        real: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length dim"], tuple[Tensor, ...]]:
        """X', and what each convolution sees of later tokens; `before` is that of earlier ones, zeros by default."""
        out, kept = x.mT, []
        for index, convolution in enumerate(self.convolutions):
            first, last = (index % self.tcn.convolutions == place for place in (0, self.tcn.convolutions - 1))
            if first:
                entered = out
            reach = self._reach(index)
            if before is None:
                seen = F.pad(out, (reach, 0) if self.causal else (reach // 2, reach - reach // 2))
            else:
                seen = torch.cat([before[index], out], dim=-1)
                kept.append(seen[..., seen.shape[-1] - reach :].clone())
            out = self._dropped(F.relu(convolution(seen)))
            if last:
                out = F.relu(entered + out)
            if real is not None:
                # A sequence alone has zeros behind its end in every layer.
                out = out.masked_fill(~real.unsqueeze(1), 0.0)
        return self._dropped(out.mT), tuple(kept)

    def project(self, x: Tensor, moved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of X', values of X."""
        shared = F.silu(self.shared(moved))
        query, key = (shared * gain + shift for gain, shift in zip(self.gain, self.shift, strict=True))
        return query, key, self._dropped(F.silu(self.value(x)))

    def gate(self, x: Tensor, moved: Tensor, attended: Tensor) -> Float[Tensor, "batch length dim"]:
        """Y: how much of what was attended to enters, and how much of the token is replaced."""
        reset, update = F.silu(self.reset(moved)), torch.sigmoid(self.update(moved))
        hidden = self._dropped(F.silu(self.hidden(moved) + self.output(reset * attended)))
        return torch.lerp(x, hidden, update)

    def _chunked(self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None) -> Tensor:
        """Attention within chunks, the first of which begins here; samples end at `lengths`."""
        batch, length, _ = query.shape
        size = min(self.chunk_size, length)
        chunks = -(-length // size)
        if not self.causal and (lengths is not None or chunks * size > length):
            ends = torch.full((batch,), length, device=query.device) if lengths is None else lengths
            starts = torch.arange(chunks, device=query.device) * size
            lengths = (ends.unsqueeze(1) - starts).clamp(0, size).flatten()
        query, key, value = (
            F.pad(part, (0, 0, 0, chunks * size - length)).reshape(batch * chunks, size, -1)
            for part in (query, key, value)
        )
        return self._attend(query, key, value, lengths).reshape(batch, chunks * size, -1)[:, :length]

    def _attend(
        self,
        query: Float[Tensor, "chunks queries head_dim"],
        key: Float[Tensor, "chunks keys head_dim"],
        value: Float[Tensor, "chunks keys value_dim"],
        lengths: Int[Tensor, " chunks"] | None,
    ) -> Float[Tensor, "chunks queries value_dim"]:
        """Attention in every chunk. A causal query sees no padding, which comes after all that is real."""
        queries, keys = query.shape[1], key.shape[1]
        mask = Causal() if self.causal else None if lengths is None else Padding(lengths)
        if self.normalizer == "laplace":
            if self.causal:
                counts = torch.arange(keys - queries + 1, keys + 1, device=query.device).unsqueeze(-1)
            else:
                counts = keys if lengths is None else lengths.clamp(min=1)[:, None, None]
            query = query / counts
        mixed = attention(
            query.unsqueeze(1),
            key.unsqueeze(1),
            value.unsqueeze(1),
            mask=mask,
            bias=RelativeBias(self._distances(), self.chunk_size - 1),
            normalizer=Laplace() if self.normalizer == "laplace" else "softmax",
            scale=1.0 if self.normalizer == "laplace" else None,
            dropout=self.attention_dropout if self.training else 0.0,
        )
        return mixed.squeeze(1)

    def _distances(self) -> Float[Tensor, "1 entries"]:
        """The bias of all distances j − i in a chunk, from the farthest past on."""
        if self.position == "relative":
            return self.relative.unsqueeze(0)
        query, key = self.relative.to(statistics_dtype(self.relative.dtype))
        offsets = torch.arange(1 - self.chunk_size, self.chunk_size, device=key.device)
        turned = rotary(key.expand(1, 1, len(offsets), -1), offsets)
        return (turned * query).sum(-1).squeeze(0)

    def _reach(self, index: int) -> int:
        """How far back the convolution of this place looks."""
        return (self.tcn.kernel_size - 1) * self.tcn.dilation ** (index // self.tcn.convolutions)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)
