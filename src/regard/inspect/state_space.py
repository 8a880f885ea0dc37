"""Linear systems with a diagonal transition, and attention, state space models and gated RNNs written as one.

See `regard.inspect.dynamical_form` for the equations and their source.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from regard.inspect.plotting import plotly
from regard.ops.attention import attention
from regard.ops.biases import Bias
from regard.ops.checks import require
from regard.ops.engines import Call, reference
from regard.ops.linear import linear_attention
from regard.ops.masks import Causal, Mask
from regard.ops.normalizers import Softmax
from regard.ops.scan import associative_scan

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_OWNER = "dynamical_form"


@dataclass(frozen=True, eq=False)
class DynamicalForm:
    """Λ, B, C and D of every head, the input they act on, and the output computed directly, without them.

    Attributes:
        kind: which class of models.
        transition, entry, readout: diagonals Λ_i, columns B_i and rows C_i.
        inputs: u.
        direct: what the operation itself gives.
        skip: D, 0 if None.
    """

    kind: str
    transition: Float[Tensor, "batch heads length expansion"]
    entry: Float[Tensor, "batch heads length expansion"]
    readout: Float[Tensor, "batch heads length expansion"]
    inputs: Float[Tensor, "batch heads length width"]
    direct: Float[Tensor, "batch heads length width"]
    skip: Float[Tensor, " heads"] | None = None

    @property
    def expansion(self) -> int:
        """n, numbers kept for each channel of a head."""
        return self.entry.shape[-1]

    @property
    def state_size(self) -> int:
        """Numbers of h, over all heads."""
        return self.inputs.shape[1] * self.inputs.shape[3] * self.expansion

    def respond(self, inputs: Float[Tensor, "batch heads length any"]) -> Float[Tensor, "batch heads length any"]:
        """y for these u, by the recurrence, without D."""
        driven = self.entry[..., None] * inputs[..., None, :]
        _, states = associative_scan(_after, (self.transition[..., None], driven), dim=2)
        return (self.readout[..., None, :] @ states).squeeze(-2)

    @cached_property
    def mixing(self) -> Float[Tensor, "batch heads length length"]:
        """Φ: the responses to a one at each token."""
        batch, heads, length, _ = self.inputs.shape
        return self.respond(torch.eye(length, dtype=self.inputs.dtype).expand(batch, heads, -1, -1))

    @cached_property
    def difference(self) -> float:
        """Largest difference of the recurrence and of Φ u, with D u, from `direct`, relative to its largest value."""
        passed = 0.0 if self.skip is None else self.skip[:, None, None] * self.inputs
        outputs = torch.stack([self.respond(self.inputs), self.mixing @ self.inputs]) + passed
        largest = self.direct.abs().max().clamp(min=torch.finfo(self.direct.dtype).tiny)
        return ((outputs - self.direct).abs().max() / largest).item()

    @property
    def eigenvalues(self) -> Float[Tensor, "heads 3"]:
        """Least, mean and largest of Λ_i from the second token on; the first meets an empty state."""
        require(self.inputs.shape[2] > 1, _OWNER, "the eigenvalues of one token", "give two or more")
        later = self.transition[:, :, 1:].movedim(1, 0).flatten(1)
        return torch.stack([later.amin(1), later.mean(1), later.amax(1)], -1)

    @cached_property
    def needed(self) -> list[int]:
        """What the expansion of every form of a head's Φ is at least: the largest numerical rank of Φ_ij, j ≤ t ≤ i."""
        tokens = range(self.inputs.shape[2])
        ranks = [torch.linalg.matrix_rank(self.mixing[:, :, t:, : t + 1]).amax(0) for t in tokens]
        return torch.stack(ranks).amax(0).tolist()

    def table(self) -> Table:
        """A row for each head."""
        title = f"{self.kind}: a state of {self.state_size} numbers, {self.difference:.1e} from the direct computation"
        table = Table("head", "expansion", "needed", "least Λ", "mean Λ", "largest Λ", title=title, box=SIMPLE_HEAD)
        for head, (needed, values) in enumerate(zip(self.needed, self.eigenvalues.tolist(), strict=True)):
            table.add_row(str(head), str(self.expansion), str(needed), *(f"{value:.4g}" for value in values))
        return table

    def figure(self, head: int = 0) -> Figure:
        """Φ and the mean of Λ_i, of one head of the first sample."""
        go, make_subplots = plotly("DynamicalForm.figure")
        chart = go.Figure(make_subplots(1, 2, subplot_titles=("Φ", "mean Λ over tokens")))
        chart.add_heatmap(z=self.mixing[0, head].tolist(), colorscale="RdBu", zmid=0, row=1, col=1)
        chart.add_scatter(y=self.transition[0, head].mean(-1).tolist(), row=1, col=2)
        chart.update_yaxes(autorange="reversed", row=1, col=1)
        return chart.update_layout(template="simple_white", title=f"{self.kind}, head {head}")


def _after(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return left[0] * right[0], right[0] * left[1] + right[1]


def softmax_form(
    query: Float[Tensor, "batch heads length head_dim"],
    key: Float[Tensor, "batch key_heads length head_dim"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    *,
    scale: float | None = None,
    mask: Mask | None = None,
    bias: Bias | None = None,
    order: int | None = None,
) -> DynamicalForm:
    """Causal softmax attention: exact at this length, or with `order` its series up to that power.

    `direct` is softmax attention either way, `difference` so the error of the series. Raises ValueError for an odd
    order, whose weights may sum to zero, for one with a mask or bias, and for scores too far apart for float64.
    """
    query, key, value = _precise(query), _precise(key), _precise(value)
    factor = float(query.shape[-1] ** -0.5 if scale is None else scale)
    causal = Causal() if mask is None else Causal() & mask
    causal, bias = causal.to(query.device), None if bias is None else bias.to(query.device)
    direct = attention(query, key, value, mask=causal, bias=bias, scale=factor, backend="reference")
    groups = query.shape[1] // key.shape[1]
    if order is None:
        scores = reference.masked_scores(Call(query, key, value, causal, bias, Softmax(), factor, 0.0, False))
        kernel = (scores - scores.amax((-2, -1), keepdim=True)).exp()
        eta, entry = kernel.sum(-1), torch.eye(scores.shape[2], dtype=scores.dtype).expand_as(scores)
        problem = "a query whose weights are all 0, or all too small beside those of another"
        require(bool((eta > 0).all()), "softmax_form", problem, "let queries attend, and keep scores within 700")
        return _separable("softmax", kernel, entry, value.repeat_interleave(groups, 1), eta, None, direct)
    require(order >= 0 and order % 2 == 0, "softmax_form", f"order {order}", "give an even one")
    require(mask is None and bias is None, "softmax_form", "order with a mask or bias", "leave out one or the other")
    features = linear_form(powers(query * factor, order), powers(key, order), value, normalize=True)
    return replace(features, kind=f"softmax to order {order}", direct=direct)


def linear_form(
    query: Float[Tensor, "batch heads length features"],
    key: Float[Tensor, "batch key_heads length features"],
    value: Float[Tensor, "batch key_heads length value_dim"],
    *,
    log_decay: Float[Tensor, "*batch_heads_length"] | None = None,
    normalize: bool | Float[Tensor, "batch heads length"] = False,
) -> DynamicalForm:
    """Causal linear attention of φ(q) and ψ(k); `normalize` divides by the sum of weights or by an η of one's own.

    `log_decay` is that of `regard.ops.linear_attention`. Raises ValueError for an η of 0.
    """
    query, key, value = _precise(query), _precise(key), _precise(value)
    decay = None if log_decay is None else _precise(log_decay)
    direct = linear_attention(query, key, value, log_decay=decay, normalize=normalize is True)
    eta = None
    if isinstance(normalize, Tensor):
        eta = _precise(normalize)
        direct = direct / eta[..., None]
    elif normalize:
        eta = linear_attention(query, key, torch.ones_like(value[..., :1]), log_decay=decay).squeeze(-1)
    divides = eta is None or bool((eta != 0).all())
    require(divides, "linear_form", "a normaliser of 0", "give features whose sums are not 0")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if decay is not None:
        decay = decay[None, :, None] if decay.ndim == 1 else decay
        decay = decay.exp().repeat_interleave(groups, 1).expand(query.shape[:3])
    return _separable("linear attention", query, key, value, eta, decay, direct)


def selective_form(
    inputs: Float[Tensor, "batch heads length width"],
    step: Float[Tensor, "batch heads length"],
    rate: Float[Tensor, "heads any"],
    entry: Float[Tensor, "batch #heads length expansion"],
    readout: Float[Tensor, "batch #heads length expansion"],
    *,
    skip: Float[Tensor, " heads"] | None = None,
) -> DynamicalForm:
    """A selective state space model with Δ `step`, A `rate`, b `entry` and c `readout`.

    SSD (Mamba-2) has one rate a head, S6 (Mamba) one for each number of the state and channels for heads, of width 1.
    """
    step, rate, entry = _precise(step)[..., None], _precise(rate)[:, None], _precise(entry)
    require(bool((step >= 0).all() and (rate >= 0).all()), "selective_form", "a negative step or rate", "give Δ, A ≥ 0")
    parts = torch.broadcast_tensors(torch.exp(-step * rate), step * entry, _precise(readout))
    return gated_form(inputs, *parts, skip=skip, kind="selective SSM")


def gated_form(
    inputs: Float[Tensor, "batch heads length width"],
    forget: Float[Tensor, "batch heads length expansion"],
    entry: Float[Tensor, "batch heads length expansion"],
    readout: Float[Tensor, "batch heads length expansion"],
    *,
    skip: Float[Tensor, " heads"] | None = None,
    kind: str = "gated RNN",
) -> DynamicalForm:
    """A gated linear RNN with the gates Λ `forget` in [0, 1], B `entry` and C `readout`.

    The channels of a qLSTM or RG-LRU are heads of width 1 with an expansion of 1. `direct` is linear attention with
    the logarithm of the gate for a decay, one number of the state after the other.
    """
    inputs, forget, entry, readout = (_precise(part) for part in (inputs, forget, entry, readout))
    shapes = ", ".join(str(tuple(part.shape)) for part in (inputs, forget, entry, readout))
    fits = inputs.ndim == 4 and forget.shape == entry.shape == readout.shape and forget.shape[:3] == inputs.shape[:3]
    require(
        fits, "gated_form", f"inputs and gates of shapes {shapes}", "give (batch, heads, length, width or expansion)"
    )
    gates = bool(((forget >= 0) & (forget <= 1)).all())
    require(gates, "gated_form", "a forget gate outside [0, 1]", "pass it through a sigmoid")
    count = forget.shape[-1]
    query, key, gate = (part.movedim(-1, 2).flatten(1, 2)[..., None] for part in (readout, entry, forget))
    mixed = linear_attention(query, key, inputs.repeat_interleave(count, 1), log_decay=gate.log().squeeze(-1))
    direct = mixed.unflatten(1, (-1, count)).sum(2)
    if skip is not None:
        skip = _precise(skip)
        direct = direct + skip[:, None, None] * inputs
    return DynamicalForm(kind, forget, entry, readout, inputs, direct, skip)


def powers(x: Float[Tensor, "*batch width"], order: int) -> Float[Tensor, "*batch expansion"]:
    """``[x^⊗m / √m!]`` for m up to `order`: products of two are the exponential's series of the product."""
    parts = [torch.ones_like(x[..., :1])]
    for m in range(1, order + 1):
        parts.append((parts[-1][..., None] * x[..., None, :]).flatten(-2) * m**-0.5)
    return torch.cat(parts, -1)


def _separable(
    kind: str,
    readout: Tensor,
    entry: Tensor,
    value: Tensor,
    eta: Float[Tensor, "batch heads length"] | None,
    decay: Float[Tensor, "batch heads length"] | None,
    direct: Tensor,
) -> DynamicalForm:
    """φ and ψ with their η: Λ has its quotients, 1 for the first."""
    transition = torch.ones_like(readout[..., 0]) if decay is None else decay
    if eta is not None:
        before = torch.cat([eta[..., :1], eta[..., :-1]], -1)
        transition, entry = transition * before / eta, entry / eta[..., None]
    return DynamicalForm(kind, transition[..., None].expand_as(entry), entry, readout, value, direct)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
