"""How selective attention can be. "Limitations of Normalization in Attention Mechanism", Mudarisov et al., 2025, arXiv
2508.17821.

A query has weights α_i = normalizer(l / T)_i on L tokens x_i. I are the N tokens of the largest weights, and what they
add to the output is s = Σ_{i∈I} α_i x_i.

    distance      d̃ = Σ_{i∉I} ‖s − α_i x_i‖ ≤ ā d_1 + ((L − N) α̂ − ā) max_{i∈I} ‖x_i‖
                  α̂ = Σ_{i∈I} α_i,  ā = Σ_{i∉I} α_i,  d_1 = max_{i∉I, j∈I} ‖x_i − x_j‖
    at random     E d̃ over all sets I of N tokens ≤ (L − N) / L Σ_i √(‖N μ_i − y_i‖² + N (L − 1 − N) / (L − 2) σ_i²)
                  y_i = α_i x_i, μ_i and σ_i² mean and variance of the other y; without σ a lower bound
    separability  N_s = number of i ∈ I with α_i x_i in a ball about s of radius r = min_{i∉I} ‖s − α_i x_i‖
                  N_s / N ≥ 1 − Σ_{i∈I} ξ_i / (N r),   ξ_i² = M² Σ_j α_j² + (M² − δ² / 2) Σ_{j≠k} α_j α_k
                  j, k ∈ I without i, M the largest norm and δ the least distance among the x of I
                  ≤ mean_{i∈I} exp(−2 ((m_i − r)₊ / w_i)²) on average,   w_i = Σ_j α_j ‖x_j‖,  m_i w_i = Σ_j α_j² ‖x_j‖²
                  over directions uniform on the sphere, for an r given beforehand
    gradient      ‖∂α / ∂l‖ ≤ 1 / 2T and |∂α_i / ∂l_j| ≤ 1 / 4T for softmax

Selection no longer tells tokens apart where d̃ is that of a random set, or where few of the selected are separable: the
paper finds 70–85 % of them for larger N. A lower T sharpens it, and the gradient grows as 1 / T.

Cost: for R rows of a head time O(R L (N L + L² + D)), which is R singular values of L × L, memory O(R L (N + L + D)).

Differences: the bounds are proved anew from the paper's terms, for non-negative weights of any sum (ā is its 1 − α̂).
For a random set the paper gives one value and an error. Its upper bound of N_s has ξ_i, which is no less than the mean
distance, where Hoeffding's inequality needs what is no more, as m_i is. Its ‖∂α / ∂l‖ ≤ 1 / 4T holds for the entries of
the Jacobian; two equal logits have the norm 1 / 2T.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isnan
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from regard.inspect.plotting import plotly
from regard.inspect.selection import measured, spread
from regard.ops.checks import require
from regard.ops.normalizers import Normalizer, ReversedSoftmax, normalizer_of
from regard.sites import AttentionCall, attach
from regard.sites.call import MASKED

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_OWNER = "selectivity"


@dataclass(frozen=True)
class Selection:
    """What one head selects, on average over rows; NaN where a bound is not defined.

    Attributes:
        site, head: where; the site of plain tensors is "".
        normalizer, temperature: how logits became weights.
        keys: how many keys a query may attend, L.
        top: how many of them count as selected, N.
        distance, distance_most: d̃ and its bound. Undefined where weights may be negative.
        random_least, random_most: bounds of the distance of a random set.
        separable, separable_least, separable_most: N_s / N and its bounds. Undefined where weights may be negative.
        slope, slope_most: largest singular value of ∂α / ∂l and its bound, which softmax, sigmoid and relu have.
        entry, entry_most: largest entry of ∂α / ∂l and its bound. Undefined where other queries share in a weight.
    """

    site: str
    head: int
    normalizer: str
    temperature: float
    keys: float
    top: int
    distance: float
    distance_most: float
    random_least: float
    random_most: float
    separable: float
    separable_least: float
    separable_most: float
    slope: float
    slope_most: float
    entry: float
    entry_most: float


_SETTING = ("site", "normalizer", "temperature", "top")
_BOUNDED = (
    ("distance", "distance_most"),
    ("random_least", "random_most"),
    ("separable_least", "separable", "separable_most"),
    ("slope", "slope_most"),
    ("entry", "entry_most"),
)
_MEASURED = tuple(field.name for field in fields(Selection) if field.name not in (*_SETTING, "head"))


@dataclass(frozen=True)
class Selectivity:
    """A `Selection` for every site, normalizer, temperature, number of tokens and head."""

    selections: tuple[Selection, ...]

    def mean(self, *over: str) -> dict[tuple[Any, ...], dict[str, float]]:
        """Means of what was measured for each value of the fields `over`."""
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for selection in self.selections:
            row = asdict(selection)
            groups.setdefault(tuple(row[name] for name in over), []).append(row)
        return {at: {name: fmean(row[name] for row in rows) for name in _MEASURED} for at, rows in groups.items()}

    def table(self) -> Table:
        """Means over heads."""
        columns = ("site", "normalizer", "T", "N", "keys", "distance", "random set", "separable", "slope", "entry")
        table = Table(*columns, title="selectivity", title_justify="left", box=SIMPLE_HEAD)
        for (site, normalizer, temperature, top), row in self.mean(*_SETTING).items():
            table.add_row(
                *(site, normalizer, f"{temperature:g}", str(top), f"{row['keys']:.3g}"),
                *(" ≤ ".join(_number(row[name]) for name in names) for names in _BOUNDED),
            )
        return table

    def figure(self) -> Figure:
        """Distance and separable share over N, and slope over T, with their bounds; means over sites and heads."""
        go, make_subplots = plotly("Selectivity.figure")
        chart = go.Figure(make_subplots(1, 3, subplot_titles=("distance over N", "separable over N", "slope over T")))
        panels = (
            ("top", ("distance", "distance_most", "random_most")),
            ("top", _BOUNDED[2]),
            ("temperature", _BOUNDED[3]),
        )
        for column, (axis, names) in enumerate(panels, 1):
            keep = "temperature" if axis == "top" else "top"
            means = self.mean("normalizer", keep, axis)
            for normalizer, kept in dict.fromkeys(at[:2] for at in means):
                points = sorted((at[2], row) for at, row in means.items() if at[:2] == (normalizer, kept))
                for place, name in enumerate(names):
                    chart.add_scatter(
                        x=[x for x, _ in points],
                        y=[row[name] for _, row in points],
                        name=f"{name.replace('_', ', ')}: {normalizer}, {keep} {kept:g}",
                        mode="lines+markers",
                        line={"dash": ("solid", "dash", "dot")[place]},
                        row=1,
                        col=column,
                    )
        chart.update_xaxes(type="log")
        return chart.update_layout(template="simple_white")


def selectivity(
    source: nn.Module | Float[Tensor, "batch heads queries keys"],
    data: Mapping[str, Any] | Float[Tensor, "batch key_heads keys width"],
    *,
    top: Sequence[int] = (1, 5),
    normalizers: Iterable[str | Normalizer] = ("softmax",),
    temperatures: Sequence[float] = (1.0,),
    radius: float | None = None,
    rows: int = 8,
) -> Selectivity:
    """How far, how separately and how steeply attention selects the `top` tokens, with the bounds of what it can.

    Args:
        source: logits l, −inf where a key is masked; or a model, whose logits and values at every site are measured.
        data: the token vectors x (values, say) for logits, the arguments of the forward pass for a model.
        top: the N. Rows that may attend N keys or fewer have nothing left to be told apart from, and do not count.
        normalizers: how logits become weights: names or `Normalizer`.
        temperatures: the T, by which logits are divided; 1 leaves them as they are, with the scale they have.
        radius: of the ball about s; by default that of the nearest token not selected.
        rows: at most so many queries are measured, evenly spread.

    Longer contexts are longer `data`. Raises ValueError for tensors that do not fit, for settings out of range and if
    no row has more than N keys.
    """
    balls = () if radius is None else (radius,)
    for name, values in (("top", top), ("temperatures", temperatures), ("radius", balls), ("rows", (rows,))):
        require(all(value > 0 for value in values), _OWNER, f"{name} {list(values)}", "give positive numbers")
    settings = [(name, normalizer_of(name), temperature) for name in normalizers for temperature in temperatures]
    found: list[Selection] = []

    def measure(site: str, scores: Tensor, tokens: Tensor) -> None:
        tokens = tokens.repeat_interleave(scores.shape[1] // tokens.shape[1], dim=1)
        scores, tokens = (tensor.detach().to("cpu", torch.float64) for tensor in (scores, tokens))
        for name, normalizer, temperature in settings:
            label = name if isinstance(name, str) else repr(name)
            for number, head, values in measured(scores, tokens, normalizer, temperature, top, radius, rows):
                found.append(Selection(site, head, label, temperature, top=number, **values))

    if isinstance(source, nn.Module):
        require(isinstance(data, Mapping), _OWNER, f"data is a {type(data).__name__}", "give a model its arguments")
        whole = any(isinstance(normalizer, ReversedSoftmax) for _, normalizer, _ in settings)

        def instrument(call: AttentionCall) -> AttentionCall:
            places = range(call.queries) if whole else spread(call.queries, rows).tolist()
            logits = torch.cat([call.logits(slice(place, place + 1)) for place in places], dim=2)
            measure(call.site.name, logits.masked_fill(logits < MASKED, -torch.inf), call.value)
            return call

        with torch.no_grad(), attach(source, instrument):
            source(**cast(Mapping[str, Any], data))
    else:
        tokens = data if isinstance(data, Tensor) else torch.empty(0)
        fits = source.ndim == tokens.ndim == 4 and source.is_floating_point() and source.shape[1] % tokens.shape[1] == 0
        fits = fits and (source.shape[0], source.shape[3]) == (tokens.shape[0], tokens.shape[2])
        shapes = f"scores of shape {tuple(source.shape)} and tokens of shape {tuple(tokens.shape)}"
        require(fits, _OWNER, shapes, "give (batch, heads, queries, keys) and (batch, heads, keys, width)")
        measure("", source, tokens)
    return Selectivity(tuple(found))


def _number(value: float) -> str:
    return "—" if isnan(value) else f"{value:.3g}"
