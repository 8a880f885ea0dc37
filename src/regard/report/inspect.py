"""The page of ``regard inspect``, one file that holds everything it shows, and the JSON with the same numbers."""

from __future__ import annotations

import base64
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from regard import __version__
from regard.inspect.overview import Overview
from regard.inspect.roles import BROAD, FOCUSED, LEAST, LIFT, NEAR, ROLES, Head
from regard.inspect.tally import LINES
from regard.ops.checks import require
from regard.sites.files import replacing

PAGE, DATA = "report.html", "overview.json"
SCHEMA = 1
MOST_BYTES = 3_500_000
"""What lines between tokens may take, at three bytes each; as base64 in a page, a third more."""
LETTERS = dict(zip(ROLES, "SDPNILBF·", strict=True))


def record(overview: Overview, *, model: str, input: str) -> dict[str, Any]:
    """What ``overview.json`` holds; docs/inspect.md says what its fields mean.

    Of each query up to 8 keys are kept, fewer where there are so many heads and tokens that they would take more than
    `MOST_BYTES`. ValueError if even one of each would.
    """
    queries = sum(len(layer.heads) * layer.top_keys.shape[1] for layer in overview.layers)
    kept = min(LINES, MOST_BYTES // (3 * queries))
    require(
        kept > 0,
        "regard inspect",
        f"{queries} queries in all heads together are too many for a page, which holds {MOST_BYTES // 3}",
        "give a shorter input",
    )
    return {
        "schema_version": SCHEMA,
        "regard": __version__,
        "model": model,
        "input": input,
        "roles": {role: {"letter": LETTERS[role], "meaning": meaning} for role, meaning in ROLES.items()},
        "thresholds": {"least": LEAST, "lift": LIFT, "broad": BROAD, "focused": FOCUSED, "near": NEAR},
        "lines": [asdict(line) for line in overview.lines],
        "layers": [
            {
                "name": layer.name,
                "title": overview.name(index),
                "tower": layer.tower,
                "number": layer.number,
                "kind": layer.kind,
                "causal": layer.causal,
                "queries": layer.queries,
                "keys": layer.keys,
                "windows": layer.windows,
                "heads": [_head(head, overview.says(index, head)) for head in layer.heads],
                "kept": min(kept, layer.top_keys.shape[2]),
                "top_keys": _packed(layer.top_keys[..., :kept].to(torch.uint16)),
                # Of their roots, so that small weights keep their first digits.
                "top_weights": _packed((layer.top_weights[..., :kept].sqrt() * 255).round().to(torch.uint8)),
                "entropy": _packed((layer.entropy.clamp(0, 1) * 255).round().to(torch.uint8)),
                "received": _packed(layer.received),
            }
            for index, layer in enumerate(overview.layers)
        ],
        "notable": [asdict(note) for note in overview.notable()],
        "unreached": [asdict(missed) for missed in overview.unreached],
    }


def _head(head: Head, text: str) -> dict[str, Any]:
    numbers = {name: getattr(head, name) for name in ("entropy", "breadth", "peak", "distance", "first", "strength")}
    return {
        "head": head.number,
        "role": head.role,
        "text": text,
        **{name: value if value is None else round(value, 6) for name, value in numbers.items()},
        "sink_at": head.sink_at,
        "looks": {
            target: {name: round(value, 6) for name, value in asdict(look).items()}
            for target, look in head.looks.items()
        },
    }


def _packed(values: Tensor) -> str:
    """Row by row, little-endian, in base64."""
    array = values.contiguous().numpy()
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def dump(content: dict[str, Any]) -> str:
    """The record as the text of ``overview.json``."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"


def page(content: dict[str, Any], picture: bytes | None = None) -> str:
    """The whole page of a record; `picture` is what the model saw, as JPEG."""
    environment = Environment(
        loader=PackageLoader("regard.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    layers = content["layers"]
    counts = Counter(head["role"] for layer in layers for head in layer["heads"])
    groups: dict[tuple[str, str], list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault((layer["tower"], layer["kind"]), []).append(index)
    return environment.get_template("inspect.html.jinja").render(
        content=content,
        counts=counts,
        groups=[{"name": f"{tower}, {kind}", "layers": numbers} for (tower, kind), numbers in groups.items()],
        curves=[
            _curve(content, [*groups.values()], "entropy", "Entropy", "breadth", "share of the greatest entropy"),
            _curve(content, [*groups.values()], "sinks", "Sinks", "sink", "share of attention on the sink"),
        ],
        picture="" if picture is None else f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}",
        # A tag inside a string of JSON would end the script it stands in.
        data=Markup(dump(content).replace("<", "\\u003c")),
    )


@dataclass(frozen=True)
class Curve:
    """A chart by layer: a point for each head, and the lines of the layers' means; coordinates as in its SVG."""

    name: str
    title: str
    unit: str
    text: str
    points: tuple[tuple[float, float], ...]
    means: tuple[str, ...]
    ticks: tuple[tuple[float, str], ...]


LEFT, RIGHT, TOP, BOTTOM = 38.0, 392.0, 10.0, 200.0


def _curve(content: dict[str, Any], groups: list[list[int]], name: str, title: str, what: str, unit: str) -> Curve:
    layers = content["layers"]
    values = [[_value(head, what) for head in layer["heads"]] for layer in layers]
    order = [index for group in groups for index in group]
    step = (RIGHT - LEFT) / len(order)
    x = {index: round(LEFT + step * (place + 0.5), 1) for place, index in enumerate(order)}

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * min(value, 1.0), 1)

    means = [fmean(row) for row in values]
    every = max(1, len(order) // 12)
    said = ", ".join(f"layer {layers[index]['title']} {means[index]:.0%}" for index in order)
    return Curve(
        name,
        title,
        unit,
        f"Mean over the heads: {said}",
        tuple((x[index], y(value)) for index in order for value in values[index]),
        tuple(" ".join(f"{x[index]},{y(means[index])}" for index in group) for group in groups),
        tuple((x[index], str(layers[index]["number"])) for place, index in enumerate(order) if place % every == 0),
    )


def _value(head: dict[str, Any], what: str) -> float:
    return head["looks"].get("sink", {"share": 0.0})["share"] if what == "sink" else head[what]


def write(folder: Path, name: str, text: str) -> Path:
    """A file of the folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / name) as partial:
        partial.write_text(text, encoding="utf-8")
    return folder / name
