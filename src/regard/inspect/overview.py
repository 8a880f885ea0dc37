"""`overview`: what every head of a model does, from one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor, nn

from regard.inspect.plotting import plotly
from regard.inspect.roles import ROLES, Head, Role
from regard.inspect.tally import Line, tally
from regard.ops.checks import require
from regard.sites import AttentionCall, Tokens, Unreached, attach
from regard.sites.site import Kind

if TYPE_CHECKING:
    import plotly.graph_objects as go

MOST_PREFIXES = 16
"""Tokens before the patches of an image: class tokens and registers."""


@dataclass(frozen=True)
class Layer:
    """The heads of one call of attention, and what is drawn of them.

    Attributes:
        queries, keys: the numbers of its sequences in `Overview.lines`.
        windows: into how many windows, attended to one by one, its tokens were cut. Numbers are means over windows,
            and what is drawn is the first.
        top_keys, top_weights: (H, N, k), the keys of each query's largest weights, largest first, and these weights.
        entropy: (H, N), of each query's row, over its greatest.
        received: (H, M), the mean weight that a key gets from the queries that see it.
    """

    name: str
    tower: str
    number: int
    kind: Kind
    causal: bool
    queries: int
    keys: int
    windows: int
    heads: tuple[Head, ...]
    top_keys: Int[Tensor, "heads queries k"]
    top_weights: Float[Tensor, "heads queries k"]
    entropy: Float[Tensor, "heads queries"]
    received: Float[Tensor, "heads keys"]


@dataclass(frozen=True)
class Note:
    """A notable head: the number of its layer in `Overview.layers`, its own, and what it does."""

    layer: int
    head: int
    role: Role
    text: str


@dataclass(frozen=True)
class Overview:
    """What the heads of a model did with one input."""

    layers: tuple[Layer, ...]
    lines: tuple[Line, ...]
    unreached: tuple[Unreached, ...]

    def notable(self, each: int = 2) -> tuple[Note, ...]:
        """Of every role but *mixed* the `each` clearest heads, in the order of `ROLES`."""
        heads = [(index, head) for index, layer in enumerate(self.layers) for head in layer.heads]
        notes = []
        for role in ROLES:
            found = sorted(
                (pair for pair in heads if pair[1].role == role != "mixed"), key=lambda pair: -pair[1].strength
            )
            notes += [Note(index, head.number, role, self.says(index, head)) for index, head in found[:each]]
        return tuple(notes)

    def says(self, index: int, head: Head) -> str:
        """What a head of layer `index` does, as a sentence without a subject."""
        keys, at = self.lines[self.layers[index].keys], head.sink_at
        label = keys.labels[at]
        return head.says(
            f"patch {label}" if keys.kinds[at] == "patch" else f"“{label}” (position {at})", keys.dimensions
        )

    def name(self, index: int) -> str:
        """How a layer is called: by its number, with its tower and kind where the model has several."""
        layer = self.layers[index]
        several = len({(each.tower, each.kind) for each in self.layers}) > 1
        return f"{layer.tower} {layer.kind} {layer.number}" if several else f"{layer.number}"

    def table(self) -> Table:
        """The notable heads, to print with Rich."""
        table = Table("layer", "head", "role", "what it does")
        for note in self.notable():
            table.add_row(self.name(note.layer), f"{note.head}", note.role, note.text)
        return table

    def figure(self) -> go.Figure:
        """The role of every head, as a grid of layers and heads with the sentence at each.

        ModuleNotFoundError without plotly, which comes with the extra ``inspect``.
        """
        graph_objects, _ = plotly("Overview")
        chart = graph_objects.Figure()
        for role in ROLES:
            found = [(i, head) for i, layer in enumerate(self.layers) for head in layer.heads if head.role == role]
            if found:
                chart.add_scatter(
                    x=[head.number for _, head in found],
                    y=[self.name(i) for i, _ in found],
                    text=[self.says(i, head) for i, head in found],
                    mode="markers",
                    marker={"symbol": list(ROLES).index(role), "size": 16},
                    name=role,
                )
        chart.update_xaxes(title="head", dtick=1)
        chart.update_yaxes(title="layer", type="category", autorange="reversed")
        return chart


def overview(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    *,
    tokens: Tokens | None = None,
    target_tokens: Tokens | None = None,
    watch: Callable[[object, str], None] | None = None,
) -> Overview:
    """What every head does, from one forward pass over one sample.

    Definitions stand in `regard.inspect.roles`. Weights are computed beside the host's kernel, in tiles of rows.
    Cost: time of the forward pass plus O(H N M (D + 10)) for each layer; memory O(H M) for a tile of rows, and 8 keys
    for each query.

    Args:
        inputs: what the model is called with, of batch 1: arguments by name, or its one tensor. The model runs as it
            stands: call ``model.eval()`` before.
        tokens: labels and kinds; with `Tokens.patches` distances are those in the plane, and up to 16 tokens more than
            there are patches are taken for class tokens and registers before them. Left out, tokens are numbered.
        target_tokens: those of the decoder of an encoder–decoder.
        watch: told of each site's name when it is ``"done"``.

    Raises ValueError for a model without attention that can be reached, tokens of more than one sample, a batch of more
    than one, and a sequence of which no query sees two keys.
    """
    for given in (tokens, target_tokens):
        count = 1 if given is None else len(given.labels)
        require(count == 1, "overview", f"tokens of {count} samples", "look at one sample at a time")
    given = inputs.values() if isinstance(inputs, Mapping) else (inputs,)
    batch = max((value.shape[0] for value in given if isinstance(value, Tensor) and value.ndim > 1), default=1)
    require(batch == 1, "overview", f"a batch of {batch}", "look at one sample at a time")
    reader = _Reader(tokens, target_tokens, watch)
    with torch.no_grad(), attach(model, reader) as door:
        reader.targets = frozenset(site.tower for site in door.sites if site.kind == "cross")
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(inputs)
    require(
        bool(reader.layers), "overview", "no call of attention came through the door", "see sites.find(model).table()"
    )
    return Overview(tuple(reader.layers), tuple(reader.lines), door.sites.unreached)


class _Reader:
    """The instrument: turns each call into a `Layer` and leaves it as it is."""

    def __init__(
        self, tokens: Tokens | None, target_tokens: Tokens | None, watch: Callable[[object, str], None] | None
    ) -> None:
        self.layers: list[Layer] = []
        self.lines: list[Line] = []
        self.targets: frozenset[str] = frozenset()
        self._tokens, self._target_tokens, self._watch = tokens, target_tokens, watch

    def __call__(self, call: AttentionCall) -> AttentionCall:
        site = call.site
        # The tower of a cross-attending site is the decoder: its own tokens are the target's.
        decodes = self._target_tokens is not None and site.tower in self.targets
        own = self._target_tokens if decodes else self._tokens
        queries = self._line(own, call.queries)
        keys = self._line(self._tokens if site.kind == "cross" else own, call.keys)
        number = sum((layer.tower, layer.kind) == (site.tower, site.kind) for layer in self.layers)
        found = tally(call, self.lines[queries], self.lines[keys])
        self.layers.append(
            Layer(
                site.name,
                site.tower,
                number,
                site.kind,
                site.causal,
                queries,
                keys,
                call.batch,
                found.heads,
                found.top_keys,
                found.top_weights,
                found.entropy,
                found.received,
            )
        )
        if self._watch is not None:
            self._watch(site.name, "done")
        return call

    def _line(self, tokens: Tokens | None, length: int) -> int:
        line = _line_of(tokens, length)
        if line not in self.lines:
            self.lines.append(line)
        return self.lines.index(line)


def _line_of(tokens: Tokens | None, length: int) -> Line:
    """The labelled tokens if there are as many, with class tokens before patches; else a window, else numbers."""
    patches = 0 if tokens is None else tokens.kinds[0].count("patch")
    if tokens is not None and patches:
        before = length - tokens.length
        if 0 <= before <= MOST_PREFIXES:
            extra = ("[CLS]", *(f"[REG {number}]" for number in range(1, before)))[:before]
            row, column = map(int, tokens.labels[0][-1].split(","))
            return Line((*extra, *tokens.labels[0]), (*("special",) * before, *tokens.kinds[0]), (row + 1, column + 1))
        side = math.isqrt(length)
        if side * side == length:
            window = Tokens.patches((side, side))
            return Line(window.labels[0], window.kinds[0], (side, side))
    if tokens is not None and tokens.length == length:
        return Line(tokens.labels[0], tokens.kinds[0])
    return Line(tuple(map(str, range(length))), ("text",) * length)
