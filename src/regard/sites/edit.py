"""The editing language: where, on what, and what is done to it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from regard.ops.checks import one_of, require
from regard.sites.call import AttentionCall, Change, Heads, RowChange, part
from regard.sites.spelling import packed, path_of, resolved, shown, unpacked
from regard.sites.where import Span, Where

Stage = Literal["logits", "weights", "output"]
Op = Literal["add", "scale", "set", "mask", "move", "swap"]
Function = Callable[[Tensor], Tensor]

VALUED = {"add": "a number or tensor", "scale": "a factor", "set": "a number", "move": "a share"}
"""Ops that take a value, and what it is."""

EVERYWHERE = Where()


class Run(Protocol):
    """A captured run: what `Capture("map")`, `Capture("logits")` or `Capture("output")` saw at a site and step."""

    def get(self, what: str, *, site: str, step: int) -> Tensor: ...


@dataclass(frozen=True)
class Edit:
    """One change of a model's attention, an instrument for `attach`. Several compose in the order they are given.

    Args:
        where: the part it is about (`Where`); ``keys`` mean nothing to outputs.
        site: what is changed: ``"logits"`` (B, H, N, M), before the softmax; ``"weights"``, after it; or ``"output"``
            (B, H, N, Dv), per head, before the output projection. Whatever the order of the edits, logits are changed
            before weights and weights before outputs.
        op: ``"add"``, ``"scale"`` and ``"set"`` take `value`. ``"mask"`` forbids logits (other keys share the mass),
            empties weights (the mass is lost) and zeroes outputs. ``"move"`` takes the share `value` (1 by default) of
            the weights on `where.keys` and gives it to the keys `to` in proportion to their weights; mass that nothing
            could take stays. ``"swap"`` puts in what `run` saw at the same site and step. A function gets the values of
            some rows and returns changed ones.
        value: a number, or a tensor that broadcasts to the values: ``torch.rand(heads, 1, 1)`` is one gate per head,
            through which gradients flow.
        to: where ``"move"`` moves.
        run: what ``"swap"`` swaps in.

    A scaled weight is renormalised over its row: it becomes a bias of ``log value`` on the logits ("Tell Your Model
    Where to Attend", 2023, arXiv 2311.02262, up to its constant). ``"set"``, ``"add"``, ``"swap"`` and functions on
    weights are taken as they are. See `Edit.fused` for what the fused kernel can carry.

    Raises ValueError for a value that is missing or does not fit, an unknown op, and keys with ``site="output"``.
    """

    where: Where = EVERYWHERE
    site: Stage = "logits"
    op: Op | Function = "mask"
    value: float | Tensor | None = None
    to: Span = None
    run: Run | None = None

    def __post_init__(self) -> None:
        one_of("Edit", "site", self.site, get_args(Stage))
        if not callable(self.op):
            one_of("Edit", "op", self.op, get_args(Op))
        require(
            self.site != "output" or self.where.keys is None,
            "Edit",
            f"keys {self.where.keys!r} with site='output', which has no keys",
            "edit weights, or leave keys out",
        )
        wanted = VALUED.get(self._name)
        require(
            self.value is not None or wanted is None or self.op == "move",
            "Edit",
            f"op {self._name!r} without a value",
            f"give value={wanted}",
        )
        require(self.value is None or wanted is not None, "Edit", f"value with op {self._name!r}", "leave it out")
        require(
            self.op != "move" or (self.site == "weights" and self.to is not None),
            "Edit",
            f"op 'move' with site={self.site!r} and to={self.to!r}",
            "mass moves between weights: give site='weights' and the keys it goes to",
        )
        require(self.to is None or self.op == "move", "Edit", f"to={self.to!r} with op {self._name!r}", "leave it out")
        require(
            (self.run is not None) == (self.op == "swap"),
            "Edit",
            f"op {self._name!r} {'with' if self.run is not None else 'without'} a run",
            "op='swap' and run=capture.captured belong together",
        )
        limits = {"scale": (0.0, math.inf), "move": (0.0, 1.0)}
        if self.site == "weights" and self._name in limits and isinstance(self.value, (int, float)):
            low, high = limits[self._name]
            require(
                low <= self.value <= high,
                "Edit",
                f"weights {self._name} {self.value}",
                f"give a number from {low:g} to {high:g}, or a function",
            )

    @property
    def _name(self) -> str:
        return self.op if isinstance(self.op, str) else path_of(self.op)

    @property
    def fused(self) -> bool:
        """Whether the host's fused kernel still computes the attention, with a bias at most.

        True for ``add`` and ``mask`` on logits, ``scale`` on weights, and everything on outputs. The others compute the
        weights of the rows they touch, `TILE` rows at a time.
        """
        return self.site == "output" or (self.site, self.op) in _AS_BIAS

    def __call__(self, call: AttentionCall) -> AttentionCall:
        """The call with this change, if it is meant."""
        if not self.where.at(call.site, call.step):
            return call
        if self.site == "output":
            return call.change_output(
                lambda out: self._changed(out, self._hits(call, keys=False), call, slice(None), None)
            )
        as_bias = _AS_BIAS.get((self.site, self.op))
        if as_bias is not None and not call.weight_changes:
            value = torch.as_tensor(as_bias(self.value), device=call.value.device)
            value = value.to(torch.promote_types(call.value.dtype, torch.float32))
            return call.add(torch.where(self._hits(call), value, 0.0))
        touched = RowChange(self.where.query_rows(call).any(0), self._change(call))
        return call.change_logits(touched) if self.site == "logits" else call.change_weights(touched)

    def _change(self, call: AttentionCall) -> Change:
        hits = self._hits(call)

        def change(values: Tensor, rows: slice, heads: Heads) -> Tensor:
            return self._changed(values, part(hits, rows, heads), call, rows, heads)

        return change

    def _changed(self, values: Tensor, hits: Tensor, call: AttentionCall, rows: slice, heads: Heads) -> Tensor:
        value = part(self.value.to(values), rows, heads) if isinstance(self.value, Tensor) else self.value
        if callable(self.op):
            return torch.where(hits, self.op(values), values)
        if self.op == "mask":
            return values.masked_fill(hits, -torch.inf if self.site == "logits" else 0.0)
        if self.op == "move":
            return _moved(values, hits, Where(keys=self.to).key_columns(call)[:, None, None], value)
        if self.op == "swap":
            return torch.where(hits, self._from_run(call, rows, heads).to(values), values)
        assert value is not None
        if self.op == "set":
            return torch.where(hits, value, values)
        changed = torch.where(hits, values + value if self.op == "add" else values * value, values)
        if self.op == "scale" and self.site == "weights":
            before, after = values.sum(-1, keepdim=True), changed.sum(-1, keepdim=True)
            return changed * (before / after.clamp_min(torch.finfo(after.dtype).tiny))
        return changed

    def _hits(self, call: AttentionCall, *, keys: bool = True) -> Bool[Tensor, "#batch #heads #queries #keys"]:
        """Which values of a call are meant; axes along which all are have size 1."""
        device = call.value.device
        hits = torch.ones(1, 1, 1, 1 if not keys else call.keys, dtype=torch.bool, device=device)
        heads = self.where.head_list(call.site)
        if heads is not None:
            chosen = torch.zeros(call.site.heads, dtype=torch.bool, device=device)
            chosen[heads] = True
            hits = hits & chosen[:, None, None]
        if self.where.queries is not None:
            hits = hits & self.where.query_rows(call)[:, None, :, None]
        if self.where.keys is not None:
            hits = hits & self.where.key_columns(call)[:, None, None]
        return hits

    def _from_run(self, call: AttentionCall, rows: slice, heads: Heads) -> Tensor:
        assert self.run is not None
        what = {"weights": "map"}.get(self.site, self.site)
        seen = self.run.get(what, site=call.site.name, step=call.step)
        width = call.value.shape[-1] if self.site == "output" else call.keys
        expected = (call.batch, call.site.heads, call.queries, width)
        require(
            tuple(seen.shape) == expected,
            "Edit",
            f"the run has {what} of shape {tuple(seen.shape)} at {call.site.name}, this call {expected}",
            "capture a run with as many samples and tokens, all heads and all queries",
        )
        return part(seen.to(call.value.device), rows, heads)

    def __str__(self) -> str:
        """One line: ``weights scale 0.5 at layers 3, heads (1, 4), keys 'image'``."""
        said = [f"{self.site} {self._name}"]
        if self.value is not None:
            said.append(f"tensor{tuple(self.value.shape)}" if isinstance(self.value, Tensor) else f"{self.value:g}")
        if self.to is not None:
            said.append(f"to {shown(self.to)}")
        chosen = [
            f"{each.name} {shown(part)}"
            for each in fields(Where)
            if (part := getattr(self.where, each.name)) is not None
        ]
        return f"{' '.join(said)} at {', '.join(chosen) or 'everything'}"

    def to_json(self) -> str:
        """The edit as JSON; functions by their import path. ValueError for a swap or a function without a path."""
        require(
            self.run is None,
            "Edit",
            "a swap holds a captured run, which JSON does not",
            "save the run, and give it to a new Edit",
        )
        if callable(self.op):
            require(
                resolved(path_of(self.op)) is self.op,
                "Edit",
                f"function {path_of(self.op)} cannot be imported by that path",
                "define it at the top of a module",
            )
        where = {each.name: packed(getattr(self.where, each.name)) for each in fields(Where)}
        edit = {"site": self.site, "op": self._name, "value": packed(self.value), "to": packed(self.to)}
        return json.dumps({"where": {name: said for name, said in where.items() if said is not None}, **edit})

    @classmethod
    def from_json(cls, text: str) -> Edit:
        """The edit that `to_json` wrote. Imports the module of a function: read files you trust only."""
        read = json.loads(text)
        op = read["op"]
        return cls(
            Where(**{name: unpacked(said) for name, said in read["where"].items()}),
            read["site"],
            resolved(op) if ":" in op else op,
            unpacked(read["value"]),
            unpacked(read["to"]),
        )


_AS_BIAS: dict[tuple[str, Any], Callable[[Any], Any]] = {
    ("logits", "add"): lambda value: value,
    ("logits", "mask"): lambda value: -math.inf,
    ("weights", "scale"): lambda value: torch.as_tensor(value, dtype=torch.get_default_dtype()).log(),
}
"""Edits that are a bias on the logits."""


def _moved(weights: Tensor, taken_from: Tensor, given_to: Tensor, share: Any) -> Tensor:
    share = 1.0 if share is None else share
    given_to = given_to & ~taken_from
    taken = torch.where(taken_from, weights * share, 0.0)
    held = torch.where(given_to, weights, 0.0)
    total = held.sum(-1, keepdim=True)
    gain = taken.sum(-1, keepdim=True) / total.clamp_min(torch.finfo(weights.dtype).tiny)
    return torch.where(total > 0, weights - taken + held * gain, weights)
