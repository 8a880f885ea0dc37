"""The Legendre memory unit of LMUFormer. "LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory
Units", Liu et al., 2024, arXiv 2402.04882; the unit is that of "Parallelizing Legendre Memory Unit Training", Chilkuri
and Eliasmith, 2021, arXiv 2102.11417.

    u_t = ReLU(W_u x_t + b_u)                        one number a token
    m_t = Ā m_{t−1} + B̄ u_t = Σ_{s≤t} Ā^{t−s} B̄ u_s   d_m numbers: a recurrence, and a causal convolution with Ā^k B̄
    h_t = ReLU(W_h [m_t; x_t] + b_h)
    y_t = W_o h_t + b_o                              the 1×1 convolution

m_t are the coefficients of the last θ values of u in the first d_m Legendre polynomials. With i, j from 0 the delay
system is θ m' = A m + B u,

    A_ij = (2i + 1) (−1 if i < j else (−1)^{i−j+1}),   B_i = (2i + 1) (−1)^i

and Ā, B̄ are its zero-order hold over one token. They are constants.

Cost: time O(n d (d + d_m) + n d_m² + n d_m log n), memory O(n (d + d_m)); the decoding state is d_m numbers.

Differences: the batch normalisation that ends the authors' module stands in `lmuformer_block`, with the rest of the
block and the spiking variant. It takes statistics over all tokens, those to come included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.mechanism import Mechanism
from regard.ops.checks import require
from regard.ops.long_convolution import long_convolution
from regard.ops.masks import Mask, Padding
from regard.ops.precision import exact, statistics_dtype


@register(
    "lmuformer",
    paper="lmuformer",
    contract=Contract(
        input="tokens",
        patterns=("causal self",),
        time="n*d*d + n*d*log2(n)",
        memory="n*d",
        padding=True,
        step=True,
        state="constant",
        options=(OptionSet({"memory_size": 12, "theta": 20.0}),),
    ),
)
class LegendreMemory(Mechanism):
    """A linear memory of the last θ tokens in Legendre polynomials, as a convolution and as a recurrence.

    Args:
        dim: width of the tokens.
        memory_size: number d_m of polynomials; `dim` by default.
        theta: how many tokens the memory spans.
    """

    def __init__(
        self,
        dim: int,
        *,
        memory_size: int | None = None,
        theta: float = 128.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.transition: Tensor
        self.entry: Tensor
        self.dim, self.theta = dim, theta
        self.memory_size = dim if memory_size is None else memory_size
        require(dim > 0, self._name, f"dim {dim}", "give a positive width")
        require(self.memory_size > 0, self._name, f"memory_size {memory_size}", "give a number of polynomials")
        require(theta > 0, self._name, f"theta {theta}", "give a positive number of tokens")
        factory = {"device": device, "dtype": dtype}
        self.input = nn.Linear(dim, 1, **factory)
        self.hidden = nn.Linear(self.memory_size + dim, dim, **factory)
        self.output = nn.Linear(dim, dim, **factory)
        self.reset_parameters()
        self._discretise()

    def reset_parameters(self) -> None:
        """Normal weights of 0.02 cut off at 2, without biases; PyTorch's default for the output."""
        for projection in (self.input, self.hidden):
            nn.init.trunc_normal_(projection.weight, std=0.02)
            nn.init.zeros_(projection.bias)
        self.output.reset_parameters()

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Remember and read. `mask` may be `Padding`."""
        self.check_tokens(x, None, mask, None, takes_positions=False)
        self.check_width(x, self.dim)
        remembered, _ = self.remember(blanked(F.relu(self.input(x)), mask), None)
        return self.read(x, remembered)

    def init_state(self, batch: int) -> Float[Tensor, "batch memory_size"]:
        """The state before the first token: zeros, at least float32."""
        return self.entry.new_zeros(batch, self.memory_size)

    def step(self, x: Float[Tensor, "batch new dim"], state: Tensor) -> tuple[Float[Tensor, "batch new dim"], Tensor]:
        """The outputs of one or more further tokens, and the state after them."""
        self.check_step(x, self.dim, state.shape[0])
        remembered, state = self.remember(F.relu(self.input(x)), state)
        return self.read(x, remembered), state

    def remember(
        self, written: Float[Tensor, "batch length 1"], state: Tensor | None
    ) -> tuple[Float[Tensor, "batch length memory_size"], Tensor]:
        """m_t of every token, in the type it is computed in, and the last one."""
        length = written.shape[1]
        kernel = orbit(self.transition, self.entry, length)
        memory = long_convolution(written.to(kernel.dtype).mT, kernel)
        if state is not None:
            memory = memory + orbit(self.transition, state, length + 1)[..., 1:]
        return memory.mT, memory[..., -1].clone()

    def read(self, x: Tensor, remembered: Tensor) -> Float[Tensor, "batch length dim"]:
        """y_t of what is remembered and the token itself."""
        return self.output(F.relu(self.hidden(torch.cat([remembered.to(x.dtype), x], -1))))

    def _discretise(self) -> None:
        weight = self.input.weight
        given = {"device": weight.device, "dtype": statistics_dtype(weight.dtype)}
        for name, matrix in zip(("transition", "entry"), legendre_delay(self.memory_size, self.theta), strict=True):
            self.register_buffer(name, matrix.to(**given), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LegendreMemory:
        """A conversion to half precision would round eigenvalues near 1: the constants are computed anew."""
        super()._apply(fn, recurse)
        self._discretise()
        return self


def legendre_delay(size: int, theta: float) -> tuple[Float[Tensor, "size size"], Float[Tensor, " size"]]:
    """Ā and B̄ for `size` polynomials and a span of `theta` tokens, in float64: exp of [[A, B], [0, 0]] / θ has both."""
    index = torch.arange(size, device="cpu", dtype=torch.float64)
    row, column = index[:, None], index[None]
    sign = 1 - 2 * (row - column + 1).remainder(2)
    system = torch.zeros(size + 1, size + 1, device="cpu", dtype=torch.float64)
    system[:size, :size] = torch.where(row < column, -1.0, sign)
    system[:size, size] = 1 - 2 * index.remainder(2)
    system[:size] *= (2 * row + 1) / theta
    held = torch.linalg.matrix_exp(system)
    return held[:size, :size].contiguous(), held[:size, size].contiguous()


@exact
def orbit(
    matrix: Float[Tensor, "size size"], start: Float[Tensor, "*batch size"], length: int
) -> Float[Tensor, "*batch size length"]:
    """``start``, ``matrix start``, ``matrix² start``, …: twice as many with every squaring."""
    found = start.unsqueeze(-1)
    while found.shape[-1] < length:
        found = torch.cat([found, matrix @ found], -1)
        matrix = matrix @ matrix
    return found[..., :length]


def blanked(written: Tensor, mask: Mask | None) -> Tensor:
    """Zeros for padding, so that a transform does not spread its roundoff."""
    if not isinstance(mask, Padding):
        return written
    batch, length = written.shape[:2]
    mask.validate(batch, 1, length, length)
    return written.masked_fill(~mask.real(length).to(written.device).unsqueeze(-1), 0)
