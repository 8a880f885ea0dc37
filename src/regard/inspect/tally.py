"""The numbers of one call of attention, for `regard.inspect.overview`, gathered in tiles of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.inspect.roles import NEAR, Head, Look, Target
from regard.ops.checks import require
from regard.sites import AttentionCall
from regard.sites.call import MASKED

LINES = 8
"""Keys kept for each query."""


@dataclass(frozen=True)
class Line:
    """The tokens of one sequence; `grid` are the rows and columns of its patches, if it has any."""

    labels: tuple[str, ...]
    kinds: tuple[str, ...]
    grid: tuple[int, int] | None = None

    @property
    def dimensions(self) -> int:
        return 1 if self.grid is None else 2

    def places(self) -> Float[Tensor, "length dimensions"]:
        """Where each token stands: its position, or the row and column of its patch; NaN for class tokens."""
        if self.grid is None:
            return torch.arange(len(self.labels), dtype=torch.float32)[:, None]
        rows = [
            [*map(float, label.split(","))] if kind == "patch" else [math.nan, math.nan]
            for label, kind in zip(self.labels, self.kinds, strict=True)
        ]
        return torch.tensor(rows)


@dataclass(frozen=True)
class Tally:
    """What `regard.inspect.overview.Layer` holds of a call."""

    heads: tuple[Head, ...]
    top_keys: Int[Tensor, "heads queries k"]
    top_weights: Float[Tensor, "heads queries k"]
    entropy: Float[Tensor, "heads queries"]
    received: Float[Tensor, "heads keys"]


def tally(call: AttentionCall, queries: Line, keys: Line) -> Tally:
    """All heads of a call; means over its batch, what is drawn from the first of it."""
    sums: dict[str, Tensor] = {}
    drawn: dict[str, list[Tensor]] = {"keys": [], "weights": [], "entropy": []}
    for rows in call.tiles():
        weights = call.weights(rows)
        # What a query sees is no matter of its head: one is enough.
        seen = (call.logits(rows, [0]) > MASKED)[:, 0]
        targets, distance = _targets(call, queries, keys, rows)
        for name, value in _sums(weights, seen, targets, distance).items():
            sums[name] = sums[name] + value if name in sums else value
        top = weights[0].topk(min(LINES, call.keys), dim=-1)
        drawn["keys"].append(top.indices.cpu())
        drawn["weights"].append(top.values.float().cpu())
        drawn["entropy"].append(_entropy(weights[:1], seen[:1])[1][0].float().cpu())
    sums = {name: value.double().cpu() for name, value in sums.items()}
    require(
        bool(sums["counted"] > 0),
        "overview",
        f"no query of {call.site.name} sees two keys or more: {call.queries} queries, {call.keys} keys",
        "give a longer input",
    )
    received = sums["received"] / sums["others"].clamp_min(1)
    top_keys, top_weights, entropy = (torch.cat(parts, dim=1) for parts in drawn.values())
    return Tally(_heads(sums, received), top_keys, top_weights, entropy, received.float())


def _targets(
    call: AttentionCall, queries: Line, keys: Line, rows: slice
) -> tuple[dict[Target, Bool[Tensor, "rows keys"]], Float[Tensor, "rows keys"]]:
    """Which keys are which target of each row, and how far away they are; NaN where that cannot be said."""
    device = call.value.device
    special = torch.tensor([kind == "special" for kind in keys.kinds], device=device)
    count = rows.stop - rows.start
    found: dict[Target, Tensor] = {"special": special.expand(count, -1)}
    if call.site.kind == "cross" or queries.dimensions != keys.dimensions:
        return found, torch.full((count, call.keys), math.nan, device=device)
    shift = int(call.query_start - call.key_start)
    places = queries.places().to(device)[rows], keys.places().to(device)
    offset = places[0][:, None] - places[1]
    numbers = torch.arange(call.keys, device=device)
    if keys.grid is None:
        offset = offset + shift
    distance = offset.norm(dim=-1)
    beside = (offset[..., :-1] == 0).all(-1)
    found["previous"] = beside & (offset[..., -1] == 1)
    found["next"] = beside & (offset[..., -1] == -1)
    found["self"] = torch.arange(rows.start, rows.stop, device=device)[:, None] + shift == numbers
    found["local"] = distance <= NEAR[keys.dimensions]
    return found, distance


def _entropy(
    weights: Float[Tensor, "batch heads rows keys"], seen: Bool[Tensor, "batch rows keys"]
) -> tuple[Float[Tensor, "batch heads rows"], Float[Tensor, "batch heads rows"]]:
    """Of each row in nats, and over its greatest; a row with less than two keys has none."""
    shares = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    entropy = -torch.xlogy(shares, shares).sum(-1)
    return entropy, entropy / seen.sum(-1).clamp_min(2).log()[:, None]


def _sums(
    weights: Float[Tensor, "batch heads rows keys"],
    seen: Bool[Tensor, "batch rows keys"],
    targets: Mapping[Target, Bool[Tensor, "rows keys"]],
    distance: Float[Tensor, "rows keys"],
) -> dict[str, Tensor]:
    """What a tile adds to the totals."""
    sight = seen.sum(-1)
    counted = (sight >= 2) & (weights[:, 0].sum(-1) > 0)
    most = weights.argmax(-1)
    entropy, breadth = _entropy(weights, seen)
    placed = ~distance.isnan()

    def over_rows(values: Tensor, valid: Tensor) -> Tensor:
        return torch.where(valid[:, None], values, 0.0).double().sum((0, 2))

    def share(target: Tensor) -> Tensor:
        return torch.einsum("bhnm,nm->bhn", weights, target.to(weights.dtype))

    sums = {
        "counted": counted.sum(),
        "entropy": over_rows(entropy, counted),
        "breadth": over_rows(breadth, counted),
        "peak": over_rows(weights.amax(-1), counted),
        "distance": over_rows(share(distance.nan_to_num(0.0)), counted),
        "placed": over_rows(share(placed), counted),
    }
    rows = torch.arange(most.shape[-1], device=most.device)
    for name, target in targets.items():
        in_sight = seen & target
        valid = counted & in_sight.any(-1)
        sums[f"{name} share"] = over_rows(share(target), valid)
        sums[f"{name} most"] = over_rows(target[rows, most].to(weights.dtype), valid)
        sums[f"{name} chance"] = torch.where(valid, in_sight.sum(-1) / sight.clamp_min(1), 0.0).double().sum()
        sums[f"{name} valid"] = valid.sum()
    others = seen & counted[..., None]
    if "self" in targets:
        others = others & ~targets["self"]
    by_key = others.to(weights.dtype)
    hits = others[:, None].expand_as(weights).gather(-1, most[..., None])[..., 0].double()
    empty = weights.new_zeros(weights.shape[1], weights.shape[3], dtype=torch.float64)
    sums["received"] = torch.einsum("bhnm,bnm->hm", weights, by_key).double()
    sums["others"] = others.sum((0, 1))
    sums["others most"] = empty.scatter_add(1, most.transpose(0, 1).flatten(1), hits.transpose(0, 1).flatten(1))
    sums["others chance"] = (by_key / sight.clamp_min(1)[..., None]).double().sum((0, 1))
    return sums


def _heads(sums: Mapping[str, Tensor], received: Float[Tensor, "heads keys"]) -> tuple[Head, ...]:
    counted = float(sums["counted"])
    eligible = sums["others"] >= counted / 2
    heads = []
    for number, row in enumerate(received):
        looks: dict[Target, Look] = {}
        for name in ("previous", "next", "self", "special", "local"):
            valid = float(sums.get(f"{name} valid", 0))
            if valid:
                share, most = (float(sums[f"{name} {what}"][number]) / valid for what in ("share", "most"))
                looks[name] = Look(share, most, float(sums[f"{name} chance"]) / valid)
        at = int(torch.where(eligible, row, -1.0).argmax())
        if eligible.any():
            seers = float(sums["others"][at])
            most, chance = float(sums["others most"][number, at]) / seers, float(sums["others chance"][at]) / seers
            looks["sink"] = Look(float(row[at]), most, chance)
        placed = float(sums["placed"][number])
        heads.append(
            Head(
                number=number,
                entropy=float(sums["entropy"][number]) / counted,
                breadth=float(sums["breadth"][number]) / counted,
                peak=float(sums["peak"][number]) / counted,
                distance=float(sums["distance"][number]) / placed if placed else None,
                first=float(row[0]),
                sink_at=at,
                looks=looks,
            )
        )
    return tuple(heads)
