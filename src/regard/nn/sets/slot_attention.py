"""Slot attention. "Object-Centric Learning with Slot Attention", Locatello et al., 2020, arXiv 2006.15055; implicit
differentiation: "Object Representations as Fixed Points", Chang et al., 2022, arXiv 2207.00787.

    k, v = W_k LN(inputs), W_v LN(inputs)
    a    = softmax over slots of (W_q LN(slots) · k / √d)          slots compete for every input
    u    = Σ_j (a_ij + ε) v_j / Σ_j (a_ij + ε)                      a weighted mean of the inputs each slot won
    s    = GRU(u, state = slots),  slots ← s + MLP(LN(s))           T times, from slots ~ N(μ, diag σ²)

`SlotAttention` is the refinement: slots in (`x`), slots out, inputs as the context. `InitialSlots` draws the first
ones, from one Gaussian that all slots share, μ and σ learned, or gives learned ones. Slots are exchangeable: what
permutes them permutes the output, and the order of the inputs is irrelevant.

``implicit=j`` takes what T iterations found, without gradient, for a fixed point, and iterates j times more with it:
the implicit derivative's Neumann series to j terms. Chang et al. have j = 1; T then costs no memory. The first slots
get no gradient, and what the others get is not the derivative of all that was computed.

Cost: time O(T n m d), memory O(n m + m d) for n slots and m inputs, and of n m + n d for each iteration in training.

Differences: the slots' LayerNorm has no bias, which would add the same to the scores of all slots and cancel in their
softmax. Initialisation is the authors' code's (Glorot-uniform, orthogonal in the GRU's state, zero biases), whose
LayerNorms add 1e-3 to a variance, Keras's default: set `eps` of the norms for weights trained with it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalogue import Contract, OptionSet, Paper, register
from regard.nn.mechanism import Mechanism
from regard.ops.attention import attention, attention_weights
from regard.ops.checks import require
from regard.ops.masks import Mask, Padding, Segments
from regard.ops.normalizers import ReversedSoftmax


@register(
    "slot_attention",
    paper=(
        "slot_attention",
        Paper(
            key="implicit_slot_attention",
            title="Object Representations as Fixed Points: Training Iterative Refinement Algorithms with Implicit "
            "Differentiation",
            year=2022,
            arxiv="2207.00787",
        ),
    ),
    contract=Contract(
        input="tokens",
        patterns=("noncausal cross",),
        time="iterations*(n*m*d + n*d*d) + m*d*d",
        memory="n*m + (n+m)*d",
        padding=True,
        packed=True,
        permutation="equivariant",
        options=(
            OptionSet({"context_dim": 24, "hidden_dim": 20}),
            OptionSet({"iterations": 1, "epsilon": 1e-2}),
        ),
    ),
)
class SlotAttention(Mechanism):
    """Slots compete for inputs, and each is updated by what it won, several times over.

    Args:
        dim: width of the slots.
        iterations: number T of updates.
        hidden_dim: width of the MLP's hidden layer; twice `dim` by default, as in the authors' models.
        context_dim: width of the inputs; `dim` by default.
        epsilon: ε, what every slot reads of every input at least.
        implicit: number j of further iterations that alone pass gradients on; 0 for gradients through all.
    """

    def __init__(
        self,
        dim: int,
        *,
        iterations: int = 3,
        hidden_dim: int | None = None,
        context_dim: int | None = None,
        epsilon: float = 1e-8,
        implicit: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.context_dim = dim, dim if context_dim is None else context_dim
        self.iterations, self.implicit = iterations, implicit
        hidden = 2 * dim if hidden_dim is None else hidden_dim
        for name, width in (("dim", dim), ("context_dim", self.context_dim), ("hidden_dim", hidden)):
            require(width > 0, self._name, f"{name} {width}", "give a positive width")
        require(iterations > 0, self._name, f"iterations {iterations}", "give a positive number")
        require(implicit >= 0, self._name, f"implicit {implicit}", "give 0 or more iterations")
        require(epsilon > 0, self._name, f"epsilon {epsilon}", "give a positive number: a slot may win nothing")
        factory = {"device": device, "dtype": dtype}
        self.normalizer = ReversedSoftmax(epsilon)
        self.context_norm = nn.LayerNorm(self.context_dim, **factory)
        self.slot_norm = nn.LayerNorm(dim, bias=False, **factory)
        self.query = nn.Linear(dim, dim, bias=False, **factory)
        self.key = nn.Linear(self.context_dim, dim, bias=False, **factory)
        self.value = nn.Linear(self.context_dim, dim, bias=False, **factory)
        self.cell = nn.GRUCell(dim, dim, **factory)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim, **factory),
            nn.Linear(dim, hidden, **factory),
            nn.ReLU(),
            nn.Linear(hidden, dim, **factory),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform weights, an orthogonal recurrence, zero biases."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                init = nn.init.orthogonal_ if name == "cell.weight_hh" else nn.init.xavier_uniform_
                init(parameter)
            elif "bias" in name:
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Float[Tensor, "batch slots dim"],
        context: Float[Tensor, "batch inputs context_dim"] | None = None,
        *,
        mask: Padding | Segments | None = None,
        positions: Tensor | None = None,
    ) -> Float[Tensor, "batch slots dim"]:
        """Refine the slots `x` by the inputs `context`, which is required.

        `mask` may be ``Padding`` of the inputs, or ``Segments`` with ids of the inputs and of the slots: slots then
        compete among those of their segment. Raises ValueError for any other mask and for positions.
        """
        key, value = self.project(x, context, mask, positions)
        return self._iterate(x, key, value, mask, self.iterations + self.implicit)

    def shares(
        self,
        x: Float[Tensor, "batch slots dim"],
        context: Float[Tensor, "batch inputs context_dim"],
        *,
        mask: Padding | Segments | None = None,
    ) -> Float[Tensor, "batch slots inputs"]:
        """What share of each input each slot won in the last iteration of `forward`; those of an input sum to 1."""
        key, value = self.project(x, context, mask, None)
        slots = self._iterate(x, key, value, mask, self.iterations + self.implicit - 1)
        return attention_weights(self.ask(slots), key, mask=mask, normalizer=ReversedSoftmax())[:, 0]

    def update(
        self,
        slots: Float[Tensor, "batch slots dim"],
        key: Float[Tensor, "batch 1 inputs dim"],
        value: Float[Tensor, "batch 1 inputs dim"],
        mask: Mask | None,
    ) -> Float[Tensor, "batch slots dim"]:
        """One iteration."""
        won = attention(self.ask(slots), key, value, mask=mask, normalizer=self.normalizer)
        slots = self.cell(won.flatten(0, 2), slots.flatten(0, 1)).view_as(slots)
        return slots + self.mlp(slots)

    def ask(self, slots: Float[Tensor, "batch slots dim"]) -> Float[Tensor, "batch 1 slots dim"]:
        """The query of each slot."""
        return self.query(self.slot_norm(slots))[:, None]

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None
    ) -> tuple[Float[Tensor, "batch 1 inputs dim"], Float[Tensor, "batch 1 inputs dim"]]:
        """Checked arguments as keys and values."""
        self.check_tokens(x, context, mask, positions, takes_positions=False)
        self.check_width(x, self.dim)
        if context is None:
            require(False, self._name, "no context", "slots `x` attend to inputs: give these as the context")
        assert context is not None
        self.check_width(context, self.context_dim, name="context")
        inputs = self.context_norm(context)
        return self.key(inputs)[:, None], self.value(inputs)[:, None]

    def _iterate(self, slots: Tensor, key: Tensor, value: Tensor, mask: Mask | None, count: int) -> Tensor:
        """`count` iterations, of which the first T are without gradient where differentiation is implicit."""
        unrolled = count
        if self.implicit:
            unrolled = max(count - self.iterations, 0)
            with torch.no_grad():
                for _ in range(count - unrolled):
                    slots = self.update(slots, key, value, mask)
        for _ in range(unrolled):
            slots = self.update(slots, key, value, mask)
        return slots


class InitialSlots(nn.Module):
    """The slots that refinement starts from: drawn from one learned Gaussian, or learned one by one.

    Args:
        slots: number of slots, which another number may replace when they are drawn.
        dim: width of a slot.
        learned: whether each slot is a learned vector, the same for every sample.
    """

    def __init__(
        self,
        slots: int,
        dim: int,
        *,
        learned: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("slots", slots), ("dim", dim)):
            require(value > 0, "InitialSlots", f"{name} {value}", "give a positive number")
        self.slots, self.learned = slots, learned
        factory = {"device": device, "dtype": dtype}
        self.mean = nn.Parameter(torch.empty(slots if learned else 1, dim, **factory))
        self.log_deviation = None if learned else nn.Parameter(torch.empty(1, dim, **factory))
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)

    def forward(
        self, batch: int, *, slots: int | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch slots dim"]:
        """Slots for `batch` samples; drawn anew at every call, in eval mode too, unless they are learned."""
        count = self.slots if slots is None else slots
        if self.log_deviation is None:
            require(
                count == self.slots,
                "InitialSlots",
                lambda: f"{count} slots, of which {self.slots} are learned",
                "build without learned=True to draw any number",
            )
            return self.mean.expand(batch, -1, -1)
        mean = self.mean
        noise = torch.randn(batch, count, mean.shape[-1], generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + self.log_deviation.exp() * noise
