"""What a `Capture` has seen: tensors by name, layer and step, with the positions and labels of their axes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from regard.ops.checks import one_of, require
from regard.sites.files import replacing
from regard.sites.site import Site
from regard.sites.tokens import GENERATED, Tokens

FORMAT = "regard.captured 1"
"""Written into every file; the number changes when older readers would misread it."""

LABELLED = {"query": "query_tokens", "last_query": "query_tokens", "key": "key_tokens"}
"""The axes of tokens, and which of a record's labels are theirs."""


@dataclass(frozen=True)
class Record:
    """One result of one call of attention.

    Attributes:
        name: what it is (``"entropy"``).
        site, step: where and at which forward pass.
        call: its number among the calls of this site at this step.
        values: the tensor.
        axes: the names of its axes.
        coordinates: per axis the sample, head, sequence position, distance, … of each place.
        query_tokens, key_tokens: labels of queries and keys by position, where they are known.
    """

    name: str
    site: Site
    step: int
    call: int
    values: Tensor
    axes: tuple[str, ...]
    coordinates: dict[str, Sequence[int]]
    query_tokens: Tokens | None = None
    key_tokens: Tokens | None = None

    def labels(self, axis: str, sample: int = 0) -> list[str]:
        """The tokens of an axis of queries or keys; where they are not known, positions."""
        return [label for label, _ in self._described(axis, sample)]

    def kinds(self, axis: str, sample: int = 0) -> list[str]:
        """The kinds of the tokens of an axis of queries or keys; ``""`` where they are not known."""
        return [kind for _, kind in self._described(axis, sample)]

    def _described(self, axis: str, sample: int) -> list[tuple[str, str]]:
        one_of("Captured", "axis of tokens", axis, [each for each in self.axes if each in LABELLED])
        tokens: Tokens | None = getattr(self, LABELLED[axis])
        positions = self.coordinates[axis]
        if tokens is None:
            return [(str(position), "") for position in positions]
        # generate() repeats a prompt for its beams side by side.
        row = sample * len(tokens.labels) // max(self.values.shape[0], len(tokens.labels))
        labels, kinds = tokens.labels[row], tokens.kinds[row]
        return [
            (labels[position], kinds[position]) if position < tokens.length else (str(position), GENERATED)
            for position in positions
        ]


@dataclass(frozen=True)
class Captured:
    """Everything that was captured, in the order of the calls."""

    records: tuple[Record, ...]

    def __repr__(self) -> str:
        return f"Captured({', '.join(self.names)}; {len(self.sites)} sites, {len(self.steps)} steps)"

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that were seen."""
        return tuple({each.site: None for each in self.records})

    @property
    def names(self) -> tuple[str, ...]:
        """What can be got."""
        return tuple({each.name: None for each in self.records})

    @property
    def steps(self) -> tuple[int, ...]:
        """The forward passes that were seen."""
        return tuple(sorted({each.step for each in self.records}))

    def get(
        self,
        name: str,
        *,
        layer: int | None = None,
        site: str | None = None,
        step: int | None = None,
        call: int | None = None,
    ) -> Tensor:
        """One result as a tensor; of several layers stacked as its first axis, in the order of the model.

        ``step`` may be left out where one step was captured, ``call`` where each site was called once in it. Raises
        ValueError for what was not captured, for a choice that leaves several sites of one layer, steps or calls, and
        for layers whose shapes differ.
        """
        found = self.find(name, layer=layer, site=site, step=step, call=call)
        if len(found) == 1 and (layer is not None or site is not None):
            return found[0].values
        places = [each.site.name for each in found]
        require(
            layer is None,
            "Captured",
            f"layer {layer} is that of {', '.join(places)}",
            "say which with site=…",
        )
        shapes = {tuple(each.values.shape): each.site.name for each in found}
        require(
            len(shapes) == 1,
            "Captured",
            f"{name} differs in shape: " + ", ".join(f"{shape} at {place}" for shape, place in shapes.items()),
            "give a layer or a site",
        )
        return torch.stack([each.values for each in found])

    def find(
        self,
        name: str,
        *,
        layer: int | None = None,
        site: str | None = None,
        step: int | None = None,
        call: int | None = None,
    ) -> list[Record]:
        """The records that `get` makes a tensor of, with their axes and labels: one per site."""
        require(bool(self.records), "Captured", "nothing was captured", "run the model within attach")
        one_of("Captured", "name", name, self.names)
        found = [each for each in self.records if each.name == name]
        if site is not None:
            one_of("Captured", "site", site, dict.fromkeys(each.site.name for each in found))
        found = [each for each in found if site in (None, each.site.name)]
        found = _chosen(found, "layer", layer, lambda each: each.site.layer, several=True)
        found = _chosen(found, "step", step, lambda each: each.step)
        return _chosen(found, "call", call, lambda each: each.call)

    def table(self) -> Table:
        """What there is, to print with Rich."""
        table = Table("name", "axes", "shape", "sites", "steps", "bytes")
        for name in self.names:
            found = [each for each in self.records if each.name == name]
            shapes = {tuple(each.values.shape) for each in found}
            table.add_row(
                name,
                ", ".join(found[0].axes),
                str(shapes.pop()) if len(shapes) == 1 else f"{len(shapes)} shapes",
                str(len({each.site.name for each in found})),
                str(len({each.step for each in found})),
                f"{sum(each.values.nbytes for each in found):,}",
            )
        return table

    def to_xarray(self) -> Any:
        """An `xarray.DataTree` with a node ``/site/step`` per call, its axes named, with positions and labels.

        Axes of tokens have the coordinates ``key_label`` and ``key_kind`` (sample, key) beside their positions. Raises
        ModuleNotFoundError without xarray, which the extra ``inspect`` brings.
        """
        try:
            import xarray  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("to_xarray needs xarray: pip install 'regard[inspect]'") from error
        nodes: dict[str, dict[str, Any]] = {}
        for each in self.records:
            again = f"_call{each.call}" if each.call else ""
            node = nodes.setdefault(f"/{each.site.name}/step{each.step}{again}", {"data": {}, "coords": {}})
            node["data"][each.name] = (each.axes, each.values.detach().cpu().numpy())
            node["coords"] |= {axis: list(places) for axis, places in each.coordinates.items()}
            samples = each.coordinates["sample"]
            for axis in set(each.axes) & set(LABELLED):
                node["coords"][f"{axis}_label"] = ("sample", axis), [each.labels(axis, i) for i in range(len(samples))]
                node["coords"][f"{axis}_kind"] = ("sample", axis), [each.kinds(axis, i) for i in range(len(samples))]
            node["attrs"] = {**asdict(each.site), "step": each.step, "call": each.call}
        return xarray.DataTree.from_dict(
            {path: xarray.Dataset(node["data"], node["coords"], node["attrs"]) for path, node in nodes.items()}
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all: tensors by number, the rest as JSON in its metadata."""
        from safetensors.torch import save_file

        target = Path(path)
        require(target.parent.is_dir(), "Captured", f"there is no folder {target.parent}", "make it first")
        sites = list(self.sites)
        tokens = list({each: None for record in self.records for each in (record.query_tokens, record.key_tokens)})
        records = [
            {
                "name": each.name,
                "site": sites.index(each.site),
                "step": each.step,
                "call": each.call,
                "axes": each.axes,
                "coordinates": {axis: _packed(places) for axis, places in each.coordinates.items()},
                "query_tokens": tokens.index(each.query_tokens),
                "key_tokens": tokens.index(each.key_tokens),
            }
            for each in self.records
        ]
        metadata = {
            "format": FORMAT,
            "sites": json.dumps([asdict(each) for each in sites]),
            "tokens": json.dumps([each and asdict(each) for each in tokens]),
            "records": json.dumps(records),
        }
        tensors = {str(number): each.values.detach().cpu().contiguous() for number, each in enumerate(self.records)}
        with replacing(target) as partial:
            save_file(tensors, partial, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Captured:
        """What `save` wrote, on the CPU. ValueError for a file that is not of this kind."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is not a mapping
        except SafetensorError as error:
            raise ValueError(
                f"Captured: {path} cannot be read ({error}); give a file written by Captured.save"
            ) from None
        require(
            metadata.get("format") == FORMAT,
            "Captured",
            f"{path} has format {metadata.get('format')!r}, not {FORMAT!r}",
            "give a file written by Captured.save of this version",
        )
        sites = [Site(**each) for each in json.loads(metadata["sites"])]
        tokens = [
            each and Tokens(*(tuple(map(tuple, each[part])) for part in ("labels", "kinds")))
            for each in json.loads(metadata["tokens"])
        ]
        records = [
            Record(
                each["name"],
                sites[each["site"]],
                each["step"],
                each["call"],
                tensors[str(number)],
                tuple(each["axes"]),
                {axis: _unpacked(places) for axis, places in each["coordinates"].items()},
                tokens[each["query_tokens"]],
                tokens[each["key_tokens"]],
            )
            for number, each in enumerate(json.loads(metadata["records"]))
        ]
        return cls(tuple(records))


def _chosen(
    records: list[Record], axis: str, wanted: int | None, of: Callable[[Record], int], several: bool = False
) -> list[Record]:
    there = sorted({of(each) for each in records})
    listed = ", ".join(map(str, there[:20])) + (", …" if len(there) > 20 else "")
    if wanted is None:
        require(
            several or len(there) == 1,
            "Captured",
            f"{records[0].name} was captured at {axis}s {listed}",
            f"say which with {axis}=…",
        )
        return records
    require(wanted in there, "Captured", f"{axis} {wanted} was not captured", f"there are {axis}s {listed}")
    return [each for each in records if of(each) == wanted]


def _packed(places: Sequence[int]) -> list[int] | dict[str, int]:
    """Neighbours as their ends: a long sequence has thousands of positions in every record."""
    if isinstance(places, range):
        return {"start": places.start, "stop": places.stop, "step": places.step}
    return list(places)


def _unpacked(places: list[int] | dict[str, int]) -> Sequence[int]:
    return range(places["start"], places["stop"], places["step"]) if isinstance(places, dict) else places
