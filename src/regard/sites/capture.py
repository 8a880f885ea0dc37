"""Looking: an instrument that keeps what was asked of each call, computed in tiles beside the host's own kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from regard.ops.checks import one_of, require
from regard.ops.precision import statistics_dtype, without_autocast
from regard.sites.call import TILE, AttentionCall
from regard.sites.captured import Captured, Record
from regard.sites.reducers import OUTPUT, REDUCERS, Reducer, View
from regard.sites.site import Site
from regard.sites.tokens import Tokens
from regard.sites.where import Numbers, Span, Where

NUMBERS = 2**20
"""How many weights are computed at a time: 4 MiB in float32, and a few times that for what is made of them."""

What = str | Reducer | Sequence[str | Reducer]

Function = TypeVar("Function", bound=Callable[..., None] | Callable[..., Tensor])


def _uncompiled(function: Function) -> Function:
    """What is kept, and which rows were chosen, no graph can know."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType, reportArgumentType]


class Capture:
    """Keeps what was asked of each call of attention; an instrument for `attach` that changes nothing.

        capture = sites.Capture(["received", "entropy"], layers=slice(4))
        with sites.attach(model, capture):
            model(input_ids)
        capture.captured.get("entropy", layer=3)  # (sample, head, query)

    Weights are recomputed from query and key in tiles of rows, never all at once unless ``"map"`` or ``"logits"`` is
    asked for: of N queries and M keys O(N M D) time, and a few tiles of memory beside what is kept. Edits that stand
    before it in `attach` are seen, those after it are not. Masked keys have exactly zero weight, and so have all keys
    of a query that may see none. Results are float32 (float64 of a float64 model) and stay on the model's device until
    they are saved. Under torch.compile reading breaks the graph.

    Args:
        what: names from `REDUCERS`, reducers with options (``LastRows(4)``, ``TopK(16)``, one of your own), and
            ``"output"`` for the heads' outputs (sample, head, query, channel): those after every change of logits and
            weights, and after the changes of outputs that stand before the capture.
        layers, heads, queries, keys, steps, sites, kinds: what is looked at, as in `Where`. A query or key that any
            sample chose has its place in the results; sums over queries count what the sample itself chose, and keys
            that it did not choose have zero weight.
        tokens: labels by pattern over site names, for towers with tokens of their own: ``{"*vision*":
            Tokens.patches((16, 16))}``. Elsewhere those of `attach` label what has as many tokens.
        max_bytes: how much maps and logits may take in all.
        gradients: whether results belong to the graph, for a loss on them.

    Raises ValueError for an unknown name, and for maps beyond `max_bytes` before it computes them.
    """

    def __init__(
        self,
        what: What,
        *,
        layers: Numbers = None,
        heads: Numbers | Mapping[int, Sequence[int]] = None,
        queries: Span = None,
        keys: Span = None,
        steps: Numbers = None,
        sites: str | None = None,
        kinds: str | None = None,
        tokens: Mapping[str, Tokens] | None = None,
        max_bytes: int = 2**28,
        gradients: bool = False,
    ) -> None:
        asked = [what] if isinstance(what, str | Reducer) else list(what)
        require(bool(asked), "Capture", "nothing is asked for", f"name some of {', '.join((*REDUCERS, OUTPUT))}")
        for each in asked:
            if not isinstance(each, Reducer):
                one_of("Capture", "what", each, (*REDUCERS, OUTPUT))
        self._reducers = [REDUCERS[each]() if isinstance(each, str) else each for each in asked if each != OUTPUT]
        names = [name for each in self._reducers for name in each.results]
        require(
            len(set(names)) == len(names),
            "Capture",
            f"what asks for {', '.join(sorted({name for name in names if names.count(name) > 1}))} twice",
            "attach two captures",
        )
        self._keeps_output = OUTPUT in asked
        self._where = Where(layers, heads, queries, keys, steps, sites, kinds)
        self._tokens = dict(tokens or {})
        self.max_bytes, self.gradients = max_bytes, gradients
        self.clear()

    def clear(self) -> None:
        """Forget what was captured."""
        self._records: list[Record] = []
        self._passed: dict[str, Site] = {}
        self._labels: dict[str, tuple[Tokens | None, Tokens | None]] = {}
        self._calls: Counter[tuple[str, str, int]] = Counter()
        self._numbers = 0

    @property
    def captured(self) -> Captured:
        """What was captured so far; ValueError if that is nothing."""
        problem, way_out = "nothing was captured yet", "run the model within `with sites.attach(model, capture):`"
        if self._passed:
            asked = ", ".join(f"{name}={value!r}" for name, value in vars(self._where).items() if value is not None)
            problem = f"nothing was captured: {asked} fits nothing that ran"
            there = sorted(
                {f"layers 0 to {site.depth - 1} of {site.tower} ({site.kind})" for site in self._passed.values()}
            )
            way_out = f"there were {', '.join(there)}"
        require(bool(self._records), "Capture", problem, way_out)
        return Captured(tuple(self._records))

    def __call__(self, call: AttentionCall) -> AttentionCall:
        if not self._where.at(call.site, call.step):
            if not torch.compiler.is_compiling():
                self._note(call)
            return call
        if self._reducers:
            self._read(call)
        if not self._keeps_output:
            return call
        read: list[Tensor] = []

        def once(output: Tensor) -> Tensor:
            # An instrument behind this one may ask for the output, too.
            if not read:
                read.append(self._read_output(call, output))
            return output

        return call.change_output(once)

    def _note(self, call: AttentionCall) -> None:
        """That there was such a call, and the labels of its tokens: the first forward pass shows how many they are."""
        name, kind = call.site.name, call.site.kind
        self._passed[name] = call.site
        if call.step and name in self._labels:
            return
        own = [tokens for pattern, tokens in self._tokens.items() if fnmatchcase(name, pattern)]
        tokens = own[0] if own else call.tokens
        if tokens is not None and not own and int(call.key_start) + call.keys != tokens.length:
            tokens = None
        self._labels[name] = (None if kind == "cross" else tokens, tokens)

    @_uncompiled
    def _read(self, call: AttentionCall) -> None:
        self._note(call)
        gradients = self.gradients and torch.is_grad_enabled()
        with torch.set_grad_enabled(gradients), without_autocast(call.value.device):
            view = self._view(call)
            if view is None:
                return
            self._guard(view)
            for last in dict.fromkeys(each.last for each in self._reducers):
                members = [each for each in self._reducers if each.last == last]
                part = view.newest(last)
                for reducer, found in zip(members, _reduced(members, part), strict=True):
                    for (name, axes), values in zip(reducer.results.items(), found, strict=True):
                        self._keep(name, axes, values, part, reducer.coordinates(part))

    @_uncompiled
    def _read_output(self, call: AttentionCall, output: Tensor) -> Tensor:
        self._note(call)
        view = self._view(call)
        if view is not None:
            heads, rows = (torch.tensor(each, device=output.device) for each in (view.heads, view.rows))
            kept = (output if self.gradients else output.detach())[:, heads[:, None], rows]
            kept = kept.to(statistics_dtype(output.dtype))
            self._keep(OUTPUT, ("sample", "head", "query", "channel"), kept, view, {})
        return output

    def _view(self, call: AttentionCall) -> View | None:
        """What is looked at, or None if nothing of this call is."""
        heads = self._where.head_list(call.site)
        rows: Sequence[int] = range(call.queries)
        counts = chosen = None
        if self._where.queries is not None:
            counts = self._where.query_rows(call)
            rows = counts.any(0).nonzero()[:, 0].tolist()
            counts = counts[:, rows]
        if self._where.keys is not None:
            chosen = self._where.key_columns(call)
        heads = range(call.heads) if heads is None else heads
        view = View(call, heads, rows, counts, chosen, int(call.query_start), int(call.key_start))
        return view if len(heads) and len(rows) and len(view.columns) else None

    def _guard(self, view: View) -> None:
        """Refuse maps that would not fit, before the first of them is computed."""
        site, call = view.call.site, view.call
        numbers = sum(each.numbers(view.newest(each.last)) for each in self._reducers)
        if not numbers:
            return
        size = statistics_dtype(call.value.dtype).itemsize
        if size * (self._numbers + site.depth * numbers) <= self.max_bytes:
            self._numbers += numbers
            return
        later = range(site.layer + 1, site.depth) if self._where.sites is None else ()
        layers = 1 + sum(self._where.at(replace(site, layer=layer), call.step) for layer in later)
        wanted = size * (self._numbers + layers * numbers)
        require(
            wanted <= self.max_bytes,
            "Capture",
            lambda: (
                f"{layers} layers × {len(view.heads)} heads × {len(view.rows)} queries × {len(view.columns)} keys"
                f"{f' × {call.batch} samples' if call.batch > 1 else ''} make {wanted:,} bytes with what is kept "
                f"already, the limit is max_bytes={self.max_bytes:,}"
            ),
            "choose fewer layers, heads, queries or keys, a reducer ('received', 'entropy', 'block_means', …) "
            f"or max_bytes={wanted}",
        )
        self._numbers += numbers

    def _keep(
        self, name: str, axes: tuple[str, ...], values: Tensor, view: View, own: dict[str, Sequence[int]]
    ) -> None:
        queries = _positions(view.rows, view.query_start)
        known = {
            "sample": range(view.call.batch),
            "head": _positions(view.heads, 0),
            "query": queries,
            "last_query": queries,
            "key": _positions(view.columns, view.key_start),
            **own,
        }
        require(
            len(axes) == values.ndim
            and all(len(known.get(axis, range(size))) == size for axis, size in zip(axes, values.shape, strict=False)),
            "Capture",
            f"{name} has axes {', '.join(axes)} and shape {tuple(values.shape)}, but there are "
            + ", ".join(f"{len(known[axis])} of {axis}" for axis in axes if axis in known),
            "finish must return what results says; View.pick takes the chosen keys out of all",
        )
        site, step = view.call.site, view.call.step
        coordinates = {axis: known.get(axis, range(size)) for axis, size in zip(axes, values.shape, strict=True)}
        again = self._calls[name, site.name, step]
        self._calls[name, site.name, step] += 1
        self._records.append(Record(name, site, step, again, values, axes, coordinates, *self._labels[site.name]))


def _reduced(reducers: Sequence[Reducer], view: View) -> list[tuple[Tensor, ...]]:
    """What each reducer makes of a view, read some heads and rows at a time."""
    row = view.call.batch * view.call.keys
    size = max(1, min(TILE, len(view.rows), NUMBERS // row))
    groups = []
    for heads in _chunks(view.heads, max(1, NUMBERS // (row * size)), view.call.heads // view.call.value.shape[1]):
        part = view if len(heads) == len(view.heads) else replace(view, heads=heads)
        states = [each.start(part) for each in reducers]
        for rows in _tiles(view.rows, size):
            logits, weights = _tile(part, slice(view.rows[rows.start], view.rows[rows.stop - 1] + 1), reducers)
            states = [
                each.tile(state, logits if each.logits else weights, rows, part)
                for each, state in zip(reducers, states, strict=True)
            ]
        groups.append([each.finish(state, part) for each, state in zip(reducers, states, strict=True)])
    if len(groups) == 1:
        return groups[0]
    return [
        tuple(
            torch.cat(pieces, axes.index("head")) for axes, *pieces in zip(each.results.values(), *parts, strict=True)
        )
        for each, *parts in zip(reducers, *groups, strict=True)
    ]


def _tile(view: View, rows: slice, reducers: Sequence[Reducer]) -> tuple[Tensor, Tensor]:
    """The logits and the weights of some rows; not what no reducer reads."""
    call, heads = view.call, None if len(view.heads) == view.call.heads else view.heads
    reach = call.reach(rows) if view.chosen is None else call.keys
    weights = logits = call.logits(rows, heads, reach)
    hidden = None if view.chosen is None else ~view.chosen[:, None, None]
    if not all(each.logits for each in reducers):
        weights = call.normalize(logits, heads)
        if not call.causal:
            # Some hosts spread the row of a query that may see nothing, of lowest numbers only, over all keys.
            empty = logits.amax(-1, keepdim=True) <= torch.finfo(call.value.dtype).min / 2
            weights = weights.masked_fill(empty, 0.0)
        for each in call.weight_changes:
            weights = each.change(weights, rows, heads)
        weights = weights if hidden is None else weights.masked_fill(hidden, 0.0)
    if hidden is not None and any(each.logits for each in reducers):
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits, weights


def _chunks(heads: Sequence[int], most: int, group: int) -> Iterator[Sequence[int]]:
    """Heads in pieces, where possible of whole groups that share a key head."""
    size = most - most % group if most > group else most
    return (heads[start : start + size] for start in range(0, len(heads), size))


def _tiles(rows: Sequence[int], size: int) -> Iterator[slice]:
    """Pieces of neighbouring rows, as places in `rows`."""
    breaks = [] if isinstance(rows, range) else [at for at, (a, b) in enumerate(pairwise(rows), 1) if b != a + 1]
    for first, last in pairwise([0, *breaks, len(rows)]):
        yield from (slice(start, min(start + size, last)) for start in range(first, last, size))


def _positions(numbers: Sequence[int], start: int) -> Sequence[int]:
    """The numbers from a start on; a range where they have no gaps."""
    first, last = numbers[0] + start, numbers[-1] + start
    if last - first + 1 == len(numbers) and (isinstance(numbers, range) or numbers == sorted(set(numbers))):
        return range(first, last + 1)
    return [number + start for number in numbers]
