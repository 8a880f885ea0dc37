"""The blocks around LMUFormer's memory. "LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory
Units", Liu et al., 2024, arXiv 2402.04882.

    x ← x + BN(LMU(x))                               the memory, `lmuformer`
    x ← x + ReLU(BN(W_2 GELU(BN(W_1 x))))            the convolutional channel mixer: W are 1×1 convolutions

The patch embedding before the blocks is four times BN(ReLU(conv_3(x))) and x ← x + conv_3(x): with kernels of three,
each convolution waits for one token more. Spiking, every activation is a leaky integrate-and-fire neuron after a
batch normalisation, so that what a projection multiplies is zeros and ones:

    memory   s = LIF_½(BN(x)),  u = LIF(BN(W_u s)),  m = LIF(BN(Ā^k B̄ ∗ u)),  h = LIF(BN(W_h [m; s])),  y = W_o h
    mixer    W_2 LIF(BN(W_1 LIF(BN(x))))

Differences: none known. Of the three spiking variants in the authors' code this is the one that their configuration
trains, with shortcuts for the membrane potential; its neurons and initialisations are the code's. Their step form
leaves out the neurons of m; here it is the parallel form. In training batch normalisation takes its statistics over all
real tokens of the batch, so that only eval mode is causal and has steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.nn.linear.lmuformer import LegendreMemory, blanked
from regard.ops.checks import require
from regard.ops.masks import Mask, Padding
from regard.ops.precision import statistics_dtype
from regard.ops.spikes import leaky_integrate_and_fire

Potentials = tuple[Tensor | None, ...]


class TokenNorm(nn.BatchNorm1d):
    """Batch normalisation of (batch, length, width), whose statistics leave padding out."""

    def forward(self, x: Tensor, real: Bool[Tensor, "batch length"] | None = None) -> Tensor:
        if real is None or not self.training:
            return super().forward(x.flatten(0, 1)).view_as(x)
        return torch.zeros_like(x).index_put((real,), super().forward(x[real]))


class Neurons(nn.Module):
    """Batch normalisation and leaky integrate-and-fire neurons."""

    def __init__(self, width: int, *, threshold: float = 1.0, device=None, dtype=None) -> None:
        super().__init__()
        self.threshold = threshold
        self.norm = TokenNorm(width, device=device, dtype=dtype)

    def forward(self, x: Tensor, real: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Spikes of every token, and the potential after the last."""
        return leaky_integrate_and_fire(self.norm(x, real), threshold=self.threshold, state=state)

    def init_state(self, batch: int) -> Tensor:
        """Potentials of zero, at least float32."""
        weight = self.norm.weight
        return weight.new_zeros(batch, len(weight), dtype=statistics_dtype(weight.dtype))


class SpikingMemoryState(NamedTuple):
    """The memory, and the potentials of the four layers of neurons."""

    memory: Float[Tensor, "batch memory_size"]
    potentials: tuple[Tensor, Tensor, Tensor, Tensor]


class SpikingLegendreMemory(LegendreMemory):
    """`LegendreMemory` among spiking neurons; twice `dim` polynomials by default."""

    def __init__(
        self,
        dim: int,
        *,
        memory_size: int | None = None,
        theta: float = 128.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, memory_size=2 * dim if memory_size is None else memory_size, theta=theta, device=device, dtype=dtype
        )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.arriving = Neurons(dim, threshold=0.5, **factory)
        self.writing = Neurons(1, **factory)
        self.remembering = Neurons(self.memory_size, **factory)
        self.reading = Neurons(dim, **factory)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch length dim"]:
        self.check_tokens(x, None, mask, None, takes_positions=False)
        self.check_width(x, self.dim)
        return self._run(x, mask, None, (None,) * 4)[0]

    def init_state(self, batch: int) -> SpikingMemoryState:
        neurons = (self.arriving, self.writing, self.remembering, self.reading)
        a, b, c, d = (layer.init_state(batch) for layer in neurons)
        return SpikingMemoryState(super().init_state(batch), (a, b, c, d))

    def step(
        self, x: Float[Tensor, "batch new dim"], state: SpikingMemoryState
    ) -> tuple[Float[Tensor, "batch new dim"], SpikingMemoryState]:
        require(not self.training, self._name, "step in training", "call eval() first: batch statistics have no steps")
        self.check_step(x, self.dim, state.memory.shape[0])
        return self._run(x, None, state.memory, state.potentials)

    def _run(
        self, x: Tensor, mask: Mask | None, memory: Tensor | None, potentials: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, SpikingMemoryState]:
        real, after = real_tokens(x, mask), []

        def fire(neurons: Neurons, charge: Tensor) -> Tensor:
            spikes, potential = neurons(charge, real, potentials[len(after)])
            after.append(potential)
            return spikes

        arrived = fire(self.arriving, x)
        written = fire(self.writing, self.input(arrived))
        remembered, memory = self.remember(blanked(written, mask), memory)
        recalled = fire(self.remembering, remembered.to(x.dtype))
        read = fire(self.reading, self.hidden(torch.cat([recalled, arrived], -1)))
        return self.output(read), SpikingMemoryState(memory, tuple(after))


class ChannelMixer(nn.Module):
    """The convolutional channel mixer: two 1×1 convolutions, with `hidden` channels between them."""

    def __init__(self, dim: int, hidden: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.widen = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.narrow = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.first = TokenNorm(hidden, device=device, dtype=dtype)
        self.second = TokenNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, real: Tensor | None, state: Potentials) -> tuple[Tensor, Potentials]:
        """The mixed channels; there are no neurons."""
        wide = F.gelu(self.first(self.widen(x), real))
        return F.relu(self.second(self.narrow(wide), real)), state

    def init_state(self, batch: int) -> Potentials:
        return None, None


class SpikingChannelMixer(nn.Module):
    """`ChannelMixer` of spikes."""

    def __init__(self, dim: int, hidden: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.widen = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.narrow = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.first = Neurons(dim, device=device, dtype=dtype)
        self.second = Neurons(hidden, device=device, dtype=dtype)

    def forward(self, x: Tensor, real: Tensor | None, state: Potentials) -> tuple[Tensor, Potentials]:
        """The mixed channels, and the potentials after the last token."""
        spikes, first = self.first(x, real, state[0])
        spikes, second = self.second(self.widen(spikes), real, state[1])
        return self.narrow(spikes), (first, second)

    def init_state(self, batch: int) -> Potentials:
        return self.first.init_state(batch), self.second.init_state(batch)


class LMUFormerBlock(nn.Module):
    """A block of LMUFormer: the memory mixes tokens, two 1×1 convolutions mix channels.

    Args:
        dim: width of the tokens.
        memory_size: number of polynomials; `dim` by default, twice that if spiking.
        theta: how many tokens the memory spans.
        ratio: width inside the channel mixer over `dim`.
        spiking: whether activations are spikes.
    """

    def __init__(
        self,
        dim: int,
        *,
        memory_size: int | None = None,
        theta: float = 128.0,
        ratio: float = 4.0,
        spiking: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        memory, mixer = (SpikingLegendreMemory, SpikingChannelMixer) if spiking else (LegendreMemory, ChannelMixer)
        self.memory = memory(dim, memory_size=memory_size, theta=theta, **factory)
        self.norm = TokenNorm(dim, **factory)
        self.mixer = mixer(dim, int(ratio * dim), **factory)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """`mask` may be `Padding`."""
        real = real_tokens(x, mask)
        x = x + self.norm(self.memory(x, mask=mask), real)
        return x + self.mixer(x, real, (None, None))[0]

    def init_state(self, batch: int) -> tuple:
        """The state before the first token."""
        return self.memory.init_state(batch), self.mixer.init_state(batch)

    def step(self, x: Float[Tensor, "batch new dim"], state: tuple) -> tuple[Float[Tensor, "batch new dim"], tuple]:
        """The outputs of one or more further tokens, and the state after them. In eval mode only."""
        require(not self.training, "LMUFormerBlock", "step in training", "call eval(): batch statistics have no steps")
        mixed, memory = self.memory.step(x, state[0])
        x = x + self.norm(mixed)
        mixed, potentials = self.mixer(x, None, state[1])
        return x + mixed, (memory, potentials)


class PatchEmbedding(nn.Module):
    """Convolutions over neighbouring tokens before the first block, from `width` features to `dim`.

    Not causal: an output sees ``layers + 1`` tokens ahead.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        *,
        layers: int = 4,
        spiking: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = (width, *(dim,) * layers)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(before, after, 3, padding=1, bias=False, **factory)
            for before, after in zip(widths, (*widths[1:], dim), strict=True)
        )
        self.activations = nn.ModuleList((Neurons if spiking else TokenNorm)(dim, **factory) for _ in range(layers))
        self.spiking = spiking

    def forward(
        self, x: Float[Tensor, "batch length width"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """`mask` may be `Padding`."""
        real = real_tokens(x, mask)
        *stem, last = self.convolutions

        def convolve(convolution: nn.Module, tokens: Tensor) -> Tensor:
            return convolution(blanked(tokens, mask).mT).mT

        if not self.spiking:
            for convolution, norm in zip(stem, self.activations, strict=True):
                x = norm(F.relu(convolve(convolution, x)), real)
            return x + convolve(last, x)
        charge = spikes = x
        for convolution, neurons in zip(stem, self.activations, strict=True):
            charge = convolve(convolution, spikes)
            spikes, _ = neurons(charge, real)
        return charge + convolve(last, spikes)


def real_tokens(x: Tensor, mask: Mask | None) -> Bool[Tensor, "batch length"] | None:
    """Which tokens are not padding, if a mask says."""
    return mask.real(x.shape[1]).to(x.device) if isinstance(mask, Padding) else None
