"""Attention sinks, and attention without them. "When Attention Sink Emerges in Language Models: An Empirical View", Gu
et al., 2024, arXiv 2410.10781.

    α_k^{l,h}  = 1 / (T − k + 1) Σ_{i=k}^{T} A_ik^{l,h}             what token k receives from those that may see it
    Sink_k^ε   = 1 / L Σ_l 1 / H Σ_h 1(α_k^{l,h} > ε)                averaged over samples; by default ε = 0.3, k = 1

Norms tell a sink from an important token: its hidden state is large, its key and value are small, so that it takes
weight and adds little. It acts as a bias of the keys does, and is gone where such a bias is given or where weights do
not compete; the instruments here give both:

    K biases    softmax([q_i k*ᵀ, q_i Kᵀ]) [0; V]        `sink_bias(key)`
    KV biases   softmax([q_i k*ᵀ, q_i Kᵀ]) [v*; V]       `sink_bias(key, value)`
    V biases    softmax(q_i Kᵀ) V + v*                   `sink_bias(value=value)`
    sigmoid     σ(q_i Kᵀ) V, without normalisation       `normalized_by(Sigmoid(bias=0.0))`

Weights without normalisation are compared as shares of their row (``proxy=True``), as the authors' code does.

Cost: for T tokens time O(T² D) a head, three times, beside the host's own attention; memory 128 rows of T weights.

Differences: the mean is over the queries that may see token k, whatever the mask: the paper's for causal attention, all
queries for an encoder, those of the window where there is one. Padding is left out, and positions count real tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from torch import Tensor, nn

from regard.inspect.plotting import plotly
from regard.ops.checks import require
from regard.ops.precision import statistics_dtype
from regard.sites import AttentionCall, Site, attach, find
from regard.sites.call import MASKED

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_OWNER = "attention_sinks"
_TINY = 1e-8
"""Added to the sums of rows that are divided by them, as in the authors' code."""


@dataclass(frozen=True, eq=False)
class SinkLayer:
    """What the keys of one site receive, and norms of what stands there; NaN after the end of a shorter sample.

    Attributes:
        site: which.
        received: α_k.
        positions: the column of each real token among the model's keys, −1 after the end.
        key_norm, value_norm: L2 norms, of keys with their positions applied; None where the host shows its scores only.
        hidden_norm: L2 norm of what comes into the layer, the residual stream; None where that is not (samples, T, ·).
        threshold: ε.
    """

    site: Site
    received: Float[Tensor, "samples heads length"]
    positions: Int[Tensor, "samples length"]
    key_norm: Float[Tensor, "samples key_heads length"] | None
    value_norm: Float[Tensor, "samples key_heads length"]
    hidden_norm: Float[Tensor, "samples length"] | None
    threshold: float

    @property
    def sinks(self) -> Bool[Tensor, "samples heads length"]:
        """Which tokens are sinks, 1(α_k > ε)."""
        return self.received > self.threshold

    @property
    def by_position(self) -> Float[Tensor, " length"]:
        """Sink_k^ε of this layer for every k: the share of samples and heads that have a sink there."""
        there = self.positions >= 0
        return self.sinks.double().mean(1).sum(0) / there.sum(0)

    @property
    def by_head(self) -> Float[Tensor, " heads"]:
        """The share of samples in which a head has a sink, wherever it is."""
        return self.sinks.any(2).double().mean(0)

    def peak(self, of: str) -> float:
        """The mean norm (``"key"``, ``"value"`` or ``"hidden"``) of the sinks of any head, by that of the other tokens.

        NaN where there is no sink, nothing else, or no norm.
        """
        norms = {"key": self.key_norm, "value": self.value_norm, "hidden": self.hidden_norm}[of]
        if norms is None:
            return torch.nan
        norms = norms.mean(1) if norms.ndim == 3 else norms
        sinks = self.sinks.any(1)
        return (norms[sinks].mean() / norms[~sinks & (self.positions >= 0)].mean()).item()


@dataclass(frozen=True, eq=False)
class AttentionSinks:
    """A `SinkLayer` for every site, in the order of the model's modules; `labels` are the tokens of each sample."""

    layers: tuple[SinkLayer, ...]
    labels: tuple[tuple[str, ...], ...] | None = None

    def metric(self, position: int = 0) -> float:
        """Sink_k^ε for k = position + 1, over all layers, heads and samples."""
        longest = max(layer.received.shape[2] for layer in self.layers)
        way_out = f"give 0 to {longest - 1}"
        require(0 <= position < longest, _OWNER, f"position {position} of {longest}", way_out)
        found = [layer.by_position[position] for layer in self.layers if layer.received.shape[2] > position]
        return torch.stack(found).mean().item()

    def tokens(self) -> dict[str, float]:
        """The share of samples, layers and heads in which a token of each label is a sink, the largest first."""
        require(self.labels is not None, _OWNER, "no labels of the tokens", "give attention_sinks labels=...")
        counts: Counter[str] = Counter()
        heads = sum(layer.received.shape[0] * layer.received.shape[1] for layer in self.layers)
        for layer in self.layers:
            for sample, _, place in layer.sinks.nonzero().tolist():
                counts[self._label(layer, sample, place)] += 1
        return {label: count / heads for label, count in counts.most_common()}

    def _label(self, layer: SinkLayer, sample: int, place: int) -> str:
        column = int(layer.positions[sample, place])
        labels = self.labels[sample] if self.labels and sample < len(self.labels) else ()
        return labels[column] if column < len(labels) else str(column)

    def table(self) -> Table:
        """A row for each layer."""
        columns = ("heads with sinks", "first token", "strongest", "receives", "hidden", "key", "value")
        first = self.layers[0]
        title = f"attention sinks, ε = {first.threshold:g}: {self.metric():.1%} of heads on the first token"
        named = Column("layer", overflow="fold")
        table = Table(named, *columns, title=title, title_justify="left", box=SIMPLE_HEAD)
        for layer in self.layers:
            place = int(layer.received.nan_to_num(-1.0).argmax())
            sample, _, token = torch.unravel_index(torch.tensor(place), layer.received.shape)
            peaks = (layer.peak(of) for of in ("hidden", "key", "value"))
            table.add_row(
                layer.site.name,
                f"{layer.by_head.mean():.0%}",
                f"{layer.by_position[0]:.0%}",
                self._label(layer, int(sample), int(token)),
                f"{layer.received.flatten()[place]:.2f}",
                *("–" if peak != peak else f"{peak:.2f} ×" for peak in peaks),
            )
        return table

    def figure(self) -> Figure:
        """Sink_k^ε of every layer and position, and the norms of sinks by those of other tokens."""
        go, make_subplots = plotly("AttentionSinks.figure")
        names = [layer.site.name for layer in self.layers]
        titles = ("share of heads with a sink", "norm of sinks / of others")
        chart = go.Figure(make_subplots(1, 2, subplot_titles=titles))
        chart.add_heatmap(z=[layer.by_position.tolist() for layer in self.layers], y=names, zmin=0, row=1, col=1)
        for of in ("hidden", "key", "value"):
            chart.add_scatter(x=names, y=[layer.peak(of) for layer in self.layers], name=of, row=1, col=2)
        chart.update_yaxes(type="log", row=1, col=2)
        return chart.update_layout(template="simple_white")


def attention_sinks(
    model: nn.Module,
    data: Mapping[str, Any],
    *,
    threshold: float = 0.3,
    proxy: bool = False,
    labels: Sequence[Sequence[str]] | None = None,
) -> AttentionSinks:
    """Which tokens are attention sinks, in every head of every site of one forward pass.

    Args:
        model: any model that `sites.attach` reaches, decoder or encoder.
        data: the arguments of its forward pass. The authors take 100 samples of 64 tokens.
        threshold: ε, between 0 and 1.
        proxy: whether weights count as shares of their row, for attention without normalisation.
        labels: what the tokens are called, per sample: ``tokenizer.convert_ids_to_tokens(ids)``.

    Instruments of doors that are open around this call have changed what is measured. Raises ValueError for a
    threshold out of range and a model without attention that can be reached.
    """
    require(0 < threshold < 1, _OWNER, f"threshold {threshold}", "give a share of the attention, such as 0.3")
    layers: list[SinkLayer] = []
    hidden: dict[str, Tensor] = {}

    def measure(call: AttentionCall) -> AttentionCall:
        layers.append(_measure(call, hidden.get(call.site.name), threshold, proxy))
        return call

    with ExitStack() as stack, torch.no_grad():
        for site in find(model):
            stack.callback(_watch(model, site, hidden).remove)
        stack.enter_context(attach(model, measure))
        model(**data)
    require(bool(layers), _OWNER, "no attention came through the door", "see sites.find(model).table()")
    return AttentionSinks(tuple(layers), None if labels is None else tuple(map(tuple, labels)))


def _watch(model: nn.Module, site: Site, hidden: dict[str, Tensor]) -> Any:
    """Keep what comes into the layer of a site: the innermost module around it that has a number."""
    layer = re.sub(r"(?<=\d)(\.[^.\d][^.]*)+$", "", site.name)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 3)
        hidden[site.name] = next(given, torch.empty(0, 0, 0))

    return model.get_submodule(layer).register_forward_pre_hook(keep, with_kwargs=True)


def real_keys(call: AttentionCall) -> Bool[Tensor, "batch keys"]:
    """The keys that some query may attend to: all but padding."""
    return torch.stack([(call.logits(rows) > MASKED).any(2).any(1) for rows in call.tiles()]).any(0)


def _measure(call: AttentionCall, hidden: Tensor | None, threshold: float, proxy: bool) -> SinkLayer:
    real = real_keys(call)
    # The queries of self-attention are the last of its tokens, and padding is no query either.
    asks = real[:, -call.queries :] if call.site.kind == "self" else real.new_ones(call.batch, call.queries)
    total = seen = torch.zeros((), device=real.device)
    for rows in call.tiles():
        weights = call.weights(rows)
        if proxy:
            weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        asking = asks[:, None, rows, None]
        total = total + (weights * asking).sum(2)
        seen = seen + ((call.logits(rows) > MASKED) & asking).sum(2)
    received = total / seen

    order = (~real).int().argsort(dim=1, stable=True)
    after = ~real.gather(1, order)

    def real_first(values: Tensor) -> Tensor:
        index, gone = (each if values.ndim == 2 else each[:, None] for each in (order, after))
        return values.gather(-1, index.expand_as(values)).masked_fill(gone, torch.nan).cpu().double()

    def norm(vectors: Tensor) -> Tensor:
        return real_first(torch.linalg.vector_norm(vectors.to(statistics_dtype(vectors.dtype)), dim=-1))

    fits = hidden is not None and hidden.shape[:2] == real.shape and call.site.kind == "self"
    return SinkLayer(
        call.site,
        real_first(received),
        order.masked_fill(after, -1).cpu(),
        None if call.key is None else norm(call.key),
        norm(call.value),
        norm(hidden) if fits and hidden is not None else None,
        threshold,
    )
