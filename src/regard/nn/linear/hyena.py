"""Hyena. "HyenaDNA: Long-Range Genomic Sequence Modeling at Single Nucleotide Resolution", Nguyen et al., 2023, arXiv
2306.15794, and "Hyena Hierarchy: Towards Larger Convolutional Language Models", Poli et al., 2023, arXiv 2302.10866.

    (x¹, …, x^N, v) = short_conv(u W)                   N the order; one causal depthwise convolution over 3 tokens
    z¹ = v ⊙ x¹,   zⁿ⁺¹ = (hⁿ * zⁿ + Dⁿ ⊙ zⁿ) ⊙ xⁿ⁺¹,   y = z^N W_o
    h_t = FFN(γ_t) ⊙ (exp(−α t / (L − 1)) + shift)      γ_t = (t / (L − 1), cos 2πft / L, −sin 2πft / L)

* is causal convolution. The filters h are as long as the sequence and are no weights: a network with sine activations
of trained frequency makes them from features γ of the position, and a window with one decay rate α per channel favours
what is near. Order 2 is HyenaDNA's D_{x²} T_h D_{x¹} v.

Cost: time O(N n log n d + N n d²), memory O(N n d). Decoding keeps what was convolved and the filters, O(N n d), and
takes O(N n d) a token.

Differences: Hyena's definition convolves v before the first gate as well (`filter_value`); HyenaDNA and the releases
leave that to the short convolution. Positions beyond L go on with the same features, where the releases cut the
sequence. γ is fixed, as in HyenaDNA; the releases can train it. Heads, blocks and outer products, which one release has
and neither paper, are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.mechanism import Mechanism
from regard.ops.cache import KeyValueCache
from regard.ops.checks import require
from regard.ops.long_convolution import long_convolution
from regard.ops.masks import Padding
from regard.ops.precision import statistics_dtype, without_autocast

SHORT = 3
"""Tokens that the convolution of the projections sees, the own one included."""

_FASTEST, _SLOWEST, _FALLEN = 0.3, 1.5, 1e-2
"""Shares of the filter's length after which the windows of the first and last channel have fallen so far."""


class ImplicitFilter(nn.Module):
    """Convolution filters of any length, as a network's function of the position."""

    def __init__(
        self,
        channels: int,
        *,
        length: int,
        width: int,
        features: int,
        frequency: float,
        shift: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rates: Tensor
        self.length, self.bands, self.shift = length, (features - 1) // 2, shift
        factory = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(nn.Linear(inner, width, **factory) for inner in (features, width, width))
        self.output = nn.Linear(width, channels, bias=False, **factory)
        self.frequency = nn.Parameter(torch.full((width,), float(frequency), **factory))
        slow, fast = (-math.log(_FALLEN) / share for share in (_SLOWEST, _FASTEST))
        self.register_buffer("rates", torch.linspace(slow, fast, channels, **factory))

    def forward(self, start: int, end: int) -> Float[Tensor, "positions channels"]:
        """Values of the filters at positions `start` to ``end - 1``, at least float32 so that positions differ."""
        precise, device = statistics_dtype(self.frequency.dtype), self.frequency.device
        with without_autocast(device):
            position = torch.arange(start, end, device=device, dtype=precise).unsqueeze(-1)
            time = position / (self.length - 1)
            bands = torch.linspace(1e-4, self.bands - 1, self.bands, device=device, dtype=precise)
            angle = 2 * math.pi / self.length * position * bands
            hidden = torch.cat([time, angle.cos(), -angle.sin()], dim=-1)
            for layer in self.layers:
                assert isinstance(layer, nn.Linear)
                hidden = F.linear(hidden, layer.weight.to(precise), layer.bias.to(precise))
                hidden = (self.frequency.to(precise) * hidden).sin()
            window = (-time * self.rates.to(precise)).exp() + self.shift
            return F.linear(hidden, self.output.weight.to(precise)) * window


class HyenaState(NamedTuple):
    """What decoding keeps."""

    recent: Float[Tensor, "batch kept width"]
    """The projections that the short convolution still sees."""
    filters: KeyValueCache
    """The filters up to here, (1, filters, length, dim)."""
    convolved: tuple[KeyValueCache, ...]
    """What went into each long convolution, (batch, 1, length, dim)."""


@register(
    "hyena",
    paper="hyena",
    contract=Contract(
        input="tokens",
        patterns=("causal self",),
        time="order*n*log2(n)*d + order*n*d*d + n*filter_width*(filter_width + order*d)",
        memory="n*(order*d + filter_width)",
        padding=True,
        step=True,
        state="linear",
        options=(
            OptionSet({"order": 3, "filter_length": 64, "filter_width": 16, "features": 7, "shift": 0.0}),
            OptionSet({"filter_value": True, "frequency": 1.0, "filter_length": 8}),
        ),
    ),
)
class HyenaOperator(Mechanism):
    """Gates and implicit convolutions as long as the sequence, in turn.

    Args:
        dim: width of the tokens.
        order: number of gates; there is one long convolution between two of them.
        filter_length: L, the length the filters are made for. A longer sequence is taken, but not what they were
            initialised for.
        filter_width: width of the network that makes the filters.
        features: number of features of a position: one of time, the others cosines and sines.
        frequency: what the frequency of the sine activations starts with.
        shift: what the window of the filters does not fall below.
        filter_value: whether the value is convolved before the first gate too.
        dropout: probability of dropping an input of a long convolution in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        order: int = 2,
        filter_length: int = 1024,
        filter_width: int = 64,
        features: int = 5,
        frequency: float = 10.0,
        shift: float = 0.05,
        filter_value: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("dim", dim, 1),
            ("order", order, 2),
            ("filter_length", filter_length, 2),
            ("filter_width", filter_width, 1),
            ("features", features, 3),
        ):
            require(value >= least, self._name, f"{name} {value}", f"give at least {least}")
        require(features % 2 == 1, self._name, f"features {features}", "give an odd number: time, and pairs of waves")
        require(0.0 <= dropout < 1.0, self._name, f"dropout {dropout}", "give a probability in [0, 1)")
        self.dim, self.order, self.filter_value, self.dropout = dim, order, filter_value, dropout
        width, self.filters = (order + 1) * dim, order - 1 + filter_value
        factory = {"device": device, "dtype": dtype}
        self.input = nn.Linear(dim, width, **factory)
        self.short = nn.Conv1d(width, width, SHORT, groups=width, **factory)
        self.filter = ImplicitFilter(
            self.filters * dim,
            length=filter_length,
            width=filter_width,
            features=features,
            frequency=frequency,
            shift=shift,
            **factory,
        )
        self.skip = nn.Parameter(torch.randn(self.filters, dim, **factory))
        self.output = nn.Linear(dim, dim, **factory)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Padding | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Mix every token with those before it. `mask` may be a ``Padding``."""
        self.check_tokens(x, None, mask, None, takes_positions=False)
        self.check_width(x, self.dim)
        batch, length, _ = x.shape
        if mask is not None:
            # Causality hides padding, but a transform would spread its roundoff.
            mask.validate(batch, 1, length, length)
            x = x.masked_fill(~mask.real(length).to(x.device).unsqueeze(-1), 0.0)
        kernels = self._filters(0, length)[0].mT

        def convolve(value: Tensor, index: int) -> Tensor:
            return long_convolution(value, kernels[index])

        projected, _ = self._project(x, self._nothing_seen(batch))
        return self._recurrence(projected, convolve)

    def init_state(self, batch: int) -> HyenaState:
        """The state before the first token."""
        weight = self.input.weight
        given = {"value_dim": 0, "device": weight.device}
        filters = KeyValueCache.empty(1, self.filters, self.dim, dtype=statistics_dtype(weight.dtype), **given)
        nothing = KeyValueCache.empty(batch, 1, self.dim, dtype=weight.dtype, **given)
        return HyenaState(self._nothing_seen(batch), filters, (nothing,) * self.filters)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: HyenaState
    ) -> tuple[Float[Tensor, "batch new dim"], HyenaState]:
        """The outputs of one or more further tokens, and the state after them."""
        self.check_step(x, self.dim, state.recent.shape[0])
        before, convolved = state.filters.length, []
        projected, recent = self._project(x, state.recent)
        filters = _appended(state.filters, self._filters(before, before + x.shape[1]))
        kernels = filters.key[0].mT

        def convolve(value: Tensor, index: int) -> Tensor:
            seen = state.convolved[index]
            convolved.append(_appended(seen, value.mT.unsqueeze(1)))
            return long_convolution(value, kernels[index], initial_state=seen.key[:, 0].mT)

        return self._recurrence(projected, convolve), HyenaState(recent, filters, tuple(convolved))

    def _filters(self, start: int, end: int) -> Float[Tensor, "1 filters length dim"]:
        pattern = "length (filters dim) -> 1 filters length dim"
        return rearrange(self.filter(start, end), pattern, filters=self.filters)

    def _nothing_seen(self, batch: int) -> Float[Tensor, "batch kept width"]:
        return self.input.weight.new_zeros(batch, SHORT - 1, self.input.out_features)

    def _project(self, x: Tensor, recent: Tensor) -> tuple[Float[Tensor, "batch width length"], Tensor]:
        """Projections after the short convolution, and those it still sees of the next token."""
        seen = torch.cat([recent, self.input(x)], dim=1)
        return self.short(seen.mT), seen[:, 1 - SHORT :].clone()

    def _recurrence(
        self, projected: Float[Tensor, "batch width length"], convolve: Callable[[Tensor, int], Tensor]
    ) -> Float[Tensor, "batch length dim"]:
        """Gates and convolutions in turn. The last gate comes first among the projections, and the value last."""
        *gates, value = projected.chunk(self.order + 1, dim=1)
        inputs = [None, *reversed(gates[1:])] if self.filter_value else gates[:0:-1]
        for index, gate in enumerate(inputs):
            if gate is not None:
                value = value * gate
            value = F.dropout(value, self.dropout, self.training)
            value = convolve(value, index) + value * self.skip[index].unsqueeze(-1)
        return self.output((value * gates[0]).mT)


def _appended(cache: KeyValueCache, new: Float[Tensor, "batch heads new dim"]) -> KeyValueCache:
    return cache.append(new, new[..., :0])
