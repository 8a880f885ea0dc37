"""Which attention heads a model needs. "Are Sixteen Heads Really Better than One?", Michel et al., 2019, arXiv
1905.10650.

    MHAtt(x) = Σ_h ξ_h Att_h(x),     I_h = E_x |∂L(x) / ∂ξ_h| = E_x |Att_h(x)ᵀ ∂L(x) / ∂Att_h(x)|     at ξ = 1
    I_h of a layer divided by √(Σ_h I_h²), so that layers compare; heads are pruned from the least I_h on

To first order I_h is how much the loss of a sample changes when head h is left out. `head_importance` gives it, and on
request that change itself, one head at a time; `prune_heads` leaves out growing shares of all heads; `remove_heads` of
`regard.sites.hosts.surgery` takes them out of a transformers model for good.

Cost: the gradient takes one forward and one backward pass per batch, each head's ablation a forward pass, a share of
pruning a forward pass (and another gradient with ``reestimate=True``); memory one number per sample and head.

Differences: none. With a loss per sample all samples of a batch have gates of their own, so that a batch gives the mean
of absolute values over its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from torch import Tensor, nn

from regard.inspect.plotting import plotly
from regard.ops.checks import require
from regard.sites import AttentionCall, Instrument, Site, attach, find
from regard.sites.hosts.surgery import remove_heads

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["HeadImportance", "HeadPruning", "Pruned", "head_importance", "prune_heads", "remove_heads", "without_heads"]

_OWNER = "head_importance"
_SHOWN = 3

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) → the loss of the batch, or the losses (samples,) of its samples."""

Heads = Mapping[str, Sequence[int]]
"""Query heads by the name of their site."""


@dataclass(frozen=True, eq=False)
class HeadImportance:
    """I_h of every head of every site.

    Attributes:
        sites: where the heads are.
        scores: I_h (heads,) of each site, divided by their L2 norm if so asked.
        loss: the mean loss of the whole model.
        ablation: the mean loss without each head less that of the whole model, where asked for.
    """

    sites: tuple[Site, ...]
    scores: tuple[Float[Tensor, " heads"], ...]
    loss: float
    ablation: tuple[Float[Tensor, " heads"], ...] | None = None

    def ranking(self) -> list[tuple[str, int]]:
        """All heads, the least important first; of equal ones the first in the model."""
        order = torch.cat(self.scores).argsort(stable=True).tolist()
        every = [
            (site.name, head)
            for site, scores in zip(self.sites, self.scores, strict=True)
            for head in range(len(scores))
        ]
        return [every[place] for place in order]

    def least(self, share: float) -> dict[str, list[int]]:
        """The least important `share` of all heads, rounded down, by site."""
        require(0 <= share <= 1, _OWNER, f"share {share}", "give a number from 0 to 1")
        ranking = self.ranking()
        chosen = sorted(ranking[: int(share * len(ranking) + 1e-9)])
        return {name: [head for _, head in heads] for name, heads in groupby(chosen, lambda each: each[0])}

    def table(self) -> Table:
        """A row for each site, with its least and its most important heads."""
        title = f"head importance, loss {self.loss:.4g}"
        table = Table(
            Column("site", overflow="fold"), "least", "most", title=title, title_justify="left", box=SIMPLE_HEAD
        )
        for place, (site, scores) in enumerate(zip(self.sites, self.scores, strict=True)):
            order = scores.argsort(stable=True).tolist()

            def shown(heads: list[int], scores: Tensor = scores, place: int = place) -> str:
                change = None if self.ablation is None else self.ablation[place]
                ablated = ["" if change is None else f" ({change[head]:+.2g})" for head in heads]
                return ", ".join(f"{head}: {scores[head]:.2g}{more}" for head, more in zip(heads, ablated, strict=True))

            table.add_row(site.name, shown(order[:_SHOWN]), shown(order[::-1][:_SHOWN]))
        return table

    def figure(self) -> Figure:
        """I_h as a map of sites and heads; with ablation beside it."""
        maps = {"importance": self.scores} | ({} if self.ablation is None else {"change of loss": self.ablation})
        _, make_subplots = plotly("HeadImportance.figure")
        chart = make_subplots(1, len(maps), subplot_titles=list(maps), shared_yaxes=True)
        for column, values in enumerate(maps.values(), 1):
            names = [site.name for site in self.sites]
            chart.add_heatmap(
                z=[each.tolist() for each in values], y=names, coloraxis=f"coloraxis{column}", row=1, col=column
            )
        chart.update_yaxes(autorange="reversed")
        return chart.update_layout(template="simple_white", coloraxis2={"colorbar": {"x": 1.12}})


@dataclass(frozen=True)
class Pruned:
    """What is left of a model without a share of its heads."""

    share: float
    heads: dict[str, list[int]]
    value: float


@dataclass(frozen=True)
class HeadPruning:
    """A model with fewer and fewer heads; `value` is its loss, or what was measured instead."""

    whole: float
    steps: tuple[Pruned, ...]

    def table(self) -> Table:
        """A row for each share."""
        table = Table("heads removed", "value", title="head pruning", title_justify="left", box=SIMPLE_HEAD)
        for share, value in self._points():
            table.add_row(f"{share:.0%}", f"{value:.4g}")
        return table

    def figure(self) -> Figure:
        """The value over the share of heads removed."""
        _, make_subplots = plotly("HeadPruning.figure")
        chart = make_subplots(1, 1)
        shares, values = zip(*self._points(), strict=True)
        chart.add_scatter(x=shares, y=values, mode="lines+markers")
        return chart.update_layout(template="simple_white", xaxis_title="share of heads removed")

    def _points(self) -> list[tuple[float, float]]:
        return [(0.0, self.whole), *((step.share, step.value) for step in self.steps)]


def head_importance(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss,
    *,
    normalize: bool = True,
    ablate: bool = False,
    without: Heads | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeadImportance:
    """I_h of every head that can be reached, from the gradient of a loss by a gate on each head's output.

    Args:
        model: any model that `sites.attach` reaches, in eval mode. Its parameters' gradients are left alone.
        data: batches, whatever `loss` takes.
        loss: ``loss(model, batch)`` runs the model and returns the loss (), which makes the batch one sample, or one of
            each sample (samples,), which stand one after the other in all tensors: two sequences of a pair together.
        normalize: divide the scores of each site by their L2 norm.
        ablate: measure the loss without each head, too.
        without: heads that are left out from the start, whose importance is 0.
        progress: called with (done, total) passes.

    Raises ValueError for a model in training mode, for no data and for losses that do not fit the batch.
    """
    batches = list(data)
    require(not model.training, _OWNER, "the model is in training mode", "call model.eval(): dropout is noise")
    require(bool(batches), _OWNER, "data is empty", "give at least one batch")
    sites = tuple(find(model))
    sums: dict[str, Tensor] = {}
    samples, total = 0, 0.0
    heads = sum(site.heads for site in sites) if ablate else 0
    report = progress or (lambda done, total: None)
    for place, batch in enumerate(batches):
        losses, gradients = _gradients(model, batch, loss, without)
        for name, gradient in gradients.items():
            sums[name] = sums.get(name, 0.0) + gradient.abs().sum(0)
        samples, total = samples + losses.numel(), total + losses.sum().item()
        report(place + 1, len(batches) * (1 + heads))
    sites = tuple(site for site in sites if site.name in sums)
    scores = [sums[site.name] / samples for site in sites]
    if normalize:
        scores = [score / torch.linalg.vector_norm(score).clamp(min=torch.finfo(score.dtype).tiny) for score in scores]
    whole, changes = total / samples, None
    if ablate:
        changes = []
        for site, score in zip(sites, scores, strict=True):
            values = []
            for head in range(len(score)):
                gone = {**(without or {}), site.name: [*(without or {}).get(site.name, ()), head]}
                values.append(_mean_loss(model, batches, loss, gone) - whole)
                report(len(batches) * (1 + sum(map(len, changes)) + len(values)), len(batches) * (1 + heads))
            changes.append(torch.tensor(values, dtype=torch.float64))
        changes = tuple(changes)
    return HeadImportance(sites, tuple(scores), whole, changes)


def prune_heads(
    model: nn.Module,
    data: Iterable[Any],
    loss: Loss,
    shares: Sequence[float] = tuple(step / 10 for step in range(1, 10)),
    *,
    normalize: bool = True,
    reestimate: bool = False,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeadPruning:
    """A model without growing shares of its heads, the least important first.

    Args:
        model, data, loss, normalize: as of `head_importance`.
        shares: of all heads, in increasing order.
        reestimate: measure the importance of those left before every share, and not only once.
        evaluate: what is measured of the model while its heads are masked, in place of the mean loss.
        progress: called with (done, total) shares.

    The model stays whole: heads are masked through the door, which `remove_heads` makes final. Raises ValueError for
    shares out of order.
    """
    batches = list(data)
    increasing = all(0 < low < high for low, high in pairwise(shares)) and max(shares, default=0) <= 1
    require(increasing, "prune_heads", f"shares {tuple(shares)}", "give increasing numbers up to 1")

    def measured(heads: Heads) -> float:
        if evaluate is None:
            return _mean_loss(model, batches, loss, heads)
        with torch.no_grad(), attach(model, without_heads(heads)):
            return evaluate(model)

    importance = head_importance(model, batches, loss, normalize=normalize)
    ranking, gone, steps = importance.ranking(), [], []
    for place, share in enumerate(shares):
        if reestimate and gone:
            again = head_importance(model, batches, loss, normalize=normalize, without=_by_site(gone))
            ranking = [*gone, *(head for head in again.ranking() if head not in gone)]
        gone = ranking[: int(share * len(ranking) + 1e-9)]
        steps.append(Pruned(share, _by_site(gone), measured(_by_site(gone))))
        if progress is not None:
            progress(place + 1, len(shares))
    return HeadPruning(measured({}), tuple(steps))


def without_heads(heads: Heads) -> Instrument:
    """An instrument that sets the outputs of these heads to 0, which stays on the fused kernel."""

    def instrument(call: AttentionCall) -> AttentionCall:
        gone = list(heads.get(call.site.name, ()))
        if not gone:
            return call

        def mask(output: Tensor) -> Tensor:
            return output.index_fill(1, torch.tensor(gone, device=output.device), 0.0)

        return call.change_output(mask)

    return instrument


def _gradients(model: nn.Module, batch: Any, loss: Loss, without: Heads | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses (samples,) and their derivatives (samples, heads) by the gates of each site."""
    gates: list[tuple[str, Tensor]] = []

    def instrument(call: AttentionCall) -> AttentionCall:
        def gated(output: Tensor) -> Tensor:
            gone = (without or {}).get(call.site.name, ())
            gate = output.new_ones(output.shape[:2])
            gate[:, list(gone)] = 0.0
            gates.append((call.site.name, gate.requires_grad_()))
            return output * gate[:, :, None, None]

        return call.change_output(gated)

    with torch.enable_grad(), attach(model, instrument):
        losses = loss(model, batch).reshape(-1)
    found = torch.autograd.grad(losses.sum(), [gate for _, gate in gates], materialize_grads=True)
    gradients: dict[str, Tensor] = {}
    for (name, gate), gradient in zip(gates, found, strict=True):
        rows, count = gate.shape[0], losses.numel()
        require(
            rows % count == 0,
            _OWNER,
            f"{count} losses of a batch of {rows} at {name}",
            "give one, or one of each sample",
        )
        summed = (gradient * gate.detach()).unflatten(0, (count, -1)).sum(1)
        gradients[name] = gradients.get(name, 0.0) + summed
    return losses.detach(), gradients


def _mean_loss(model: nn.Module, batches: list[Any], loss: Loss, heads: Heads) -> float:
    with torch.no_grad(), attach(model, without_heads(heads)):
        return torch.cat([loss(model, batch).reshape(-1) for batch in batches]).mean().item()


def _by_site(heads: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    return {name: [head for _, head in group] for name, group in groupby(sorted(heads), lambda each: each[0])}
