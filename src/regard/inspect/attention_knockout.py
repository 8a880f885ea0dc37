"""Which tokens tell which, and where. "Cross-modal Information Flow in Multimodal Large Language Models", Zhang et al.,
2024, arXiv 2411.18620; the cut is that of "Dissecting Recall of Factual Associations in Auto-Regressive Language
Models", Geva et al., 2023, arXiv 2304.14767.

An edge leads from source tokens S to target tokens T. Around layer l it is cut in a window of k layers, clipped to the
layers there are, and the answer's probability is compared:

    logits_ts = −∞   for t ∈ T, s ∈ S, in the layers l − ⌊k/2⌋ … l + ⌈k/2⌉ − 1
    change_l  = (p2 − p1) / p1     p1, p2 the probability of the answer's first token, plain and cut

A large drop says that T reads from S in these layers. The paper asks with image → question, image → last,
question → last and last → last, over questions that the model answers rightly, with k = 9 of 32 or 40 layers.

Cost: 1 + edges × layers forward passes, each on the host's own kernel with a bias of (batch, N, N) per layer cut.

Differences: a cut logit is −∞, where the authors' code has the type's least number; a token with nothing left to attend
is refused, not made to attend to all tokens alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from regard.inspect.plotting import plotly
from regard.ops.checks import one_of, require
from regard.sites import AttentionCall, Edit, Instrument, Tokens, Where, attach, find
from regard.sites.call import MASKED
from regard.sites.where import Span

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_OWNER = "attention_knockout"


@dataclass(frozen=True)
class Knockout:
    """What cutting each edge around each layer does to the answer.

    Attributes:
        edges: their names.
        tower: the name of the stack of layers.
        windows: for each layer the layers cut.
        answer: the answer's first token, per sample.
        before: its probability in the model as it is, p1.
        after: its probability with an edge cut, p2.
    """

    edges: tuple[str, ...]
    tower: str
    windows: tuple[range, ...]
    answer: Int[Tensor, " batch"]
    before: Float[Tensor, " batch"]
    after: Float[Tensor, "edges layers batch"]

    @property
    def change(self) -> Float[Tensor, "edges layers batch"]:
        """(p2 − p1) / p1: −1 where the answer is lost."""
        return (self.after - self.before) / self.before

    def table(self) -> Table:
        """Changes in per cent, layer × edge; means over samples."""
        title = f"{self.tower}: change of the answer's probability, {self.before.mean():.3f} uncut"
        table = Table("layer", "cut", *self.edges, title=title, title_justify="left", box=SIMPLE_HEAD)
        for layer, window in enumerate(self.windows):
            cells = (f"{change:+.1%}" for change in self.change[:, layer].mean(-1).tolist())
            table.add_row(f"{layer}", f"{window[0]} … {window[-1]}", *cells)
        return table

    def figure(self) -> Figure:
        """Change in per cent over layers, a line per edge; means over samples."""
        go, _ = plotly(_OWNER)
        chart = go.Figure()
        for edge, changes in zip(self.edges, (100 * self.change.mean(-1)).tolist(), strict=True):
            chart.add_scatter(x=list(range(len(self.windows))), y=changes, name=edge, mode="lines+markers")
        return chart.update_layout(
            template="simple_white", xaxis_title="layer", yaxis_title="change of the answer's probability, %"
        )


def attention_knockout(
    model: nn.Module,
    inputs: Mapping[str, Any],
    edges: Mapping[str, tuple[Span, Span]],
    *,
    answer: Int[Tensor, " batch"] | int | None = None,
    window: int = 9,
    tower: str | None = None,
    tokens: Tokens | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Knockout:
    """The change of the answer's probability with each edge cut around each layer.

    Args:
        model: gives logits of the next token, as a tensor or as ``.logits``; the last position answers, so that shorter
            samples are padded on the left.
        inputs: its arguments.
        edges: by name the sources and the targets: a kind of token (``"image"``), a position (−1 is the last), a slice,
            positions, or booleans (length,) or (batch, length): ``{"image → last": ("image", -1)}``.
        answer: the first token of the answer; what the model itself would say by default.
        window: k, the layers cut at a time.
        tower: the stack of layers; by default the only one with causal self-attention.
        tokens: which token is which; by default that of ``inputs["input_ids"]``.
        progress: told (forward passes done, forward passes).

    Raises ValueError for a window below 1, no edges, a tower that is not there or not the only one, an answer of
    probability zero, and a cut that leaves a token nothing to attend.
    """
    require(window > 0, _OWNER, f"window {window}", "give a positive number of layers")
    require(len(edges) > 0, _OWNER, "no edges", 'give some, say {"image → last": ("image", -1)}')
    tower, depth = causal_tower(model, tower, _OWNER)
    if tokens is None and "input_ids" in inputs:
        tokens = Tokens.of(model, inputs["input_ids"])
    windows = tuple(range(max(0, at - window // 2), min(depth, at + (window + 1) // 2)) for at in range(depth))
    total = 1 + len(edges) * depth

    def last(*cuts: Instrument) -> Tensor:
        with torch.no_grad(), attach(model, *cuts, tokens=tokens):
            return next_logits(model(**inputs))[:, -1].double().softmax(-1)

    plain = last()
    asked = plain.argmax(-1) if answer is None else torch.as_tensor(answer, device=plain.device).expand(len(plain))
    before = plain.gather(-1, asked[:, None])[:, 0]
    require(bool((before > 0).all()), _OWNER, "an answer of probability 0", "give one that the model may say")
    after = torch.empty(len(edges), depth, len(plain), dtype=before.dtype, device=before.device)
    for number, (name, (sources, targets)) in enumerate(edges.items()):
        for layer, cut in enumerate(windows):
            where = Where(layers=cut, queries=targets, keys=sources, sites=f"{tower}.*", kinds="self")
            after[number, layer] = last(_cut(name, where)).gather(-1, asked[:, None])[:, 0]
            if progress is not None:
                progress(2 + number * depth + layer, total)
    return Knockout(tuple(edges), tower, windows, asked, before, after)


def _cut(name: str, where: Where) -> Instrument:
    """The edit, after a look at whether it leaves its tokens anything: kernels differ in what they do with nothing."""
    edit = Edit(where)

    def instrument(call: AttentionCall) -> AttentionCall:
        edited = edit(call)
        if edited is not call:
            targets = where.query_rows(call)
            for rows in (rows for rows in call.tiles() if bool(targets[:, rows].any())):
                had, has = (each.logits(rows, [0])[:, 0].amax(-1) > MASKED for each in (call, edited))
                emptied = bool((targets[:, rows] & had & ~has).any())
                problem = f"edge {name!r} cut at {call.site.name} leaves a token nothing to attend"
                require(not emptied, _OWNER, problem, "leave it one key, its own say")
        return edited

    return instrument


def causal_tower(model: nn.Module, tower: str | None, owner: str) -> tuple[str, int]:
    """The name and the number of layers of a stack with causal self-attention: `tower`, or the only one."""
    depths = {site.tower: site.depth for site in find(model) if site.kind == "self" and site.causal}
    if tower is None:
        listed = ", ".join(map(repr, depths)) or "none"
        require(len(depths) == 1, owner, f"towers with causal self-attention: {listed}", "name one as tower=")
        return next(iter(depths.items()))
    one_of(owner, "tower", tower, depths)
    return tower, depths[tower]


def next_logits(output: Any) -> Float[Tensor, "batch length vocabulary"]:
    """The logits in what a model answers."""
    return output if isinstance(output, Tensor) else output.logits
