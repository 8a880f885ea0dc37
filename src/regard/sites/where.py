"""Which layers, heads, queries and keys an instrument is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Bool
from torch import Tensor

from regard.ops.checks import require
from regard.sites.call import AttentionCall
from regard.sites.site import Site
from regard.sites.tokens import Tokens

Numbers = int | slice | range | Sequence[int] | None
"""Layers, heads or steps: one, several, a slice, or None for all; negative numbers count from the end."""

Span = int | slice | range | Sequence[int] | str | Tensor | None
"""Tokens by position, by kind (``"image"``) or by a boolean tensor (length,) or (batch, length); None for all."""


@dataclass(frozen=True)
class Where:
    """A part of a model's attention. Everything left out means all of it.

    Args:
        layers: layer numbers within a tower.
        heads: query heads, or a mapping from layer to heads.
        queries, keys: tokens, counted over the whole sequence so far: position 5 stays position 5 while keys are cached
            or forgotten by a sliding window, −1 is the newest token, ``slice(5, None)`` grows with what is generated.
            A boolean tensor does not hold for tokens after its end.
        steps: forward passes of the model since the door was attached: 0 is a prompt, 1, 2, … the decoded tokens; or
            the steps of a diffusion model.
        sites: pattern over site names as in a shell (``"*decoder*"``).
        kinds: ``"self"``, ``"cross"`` or ``"joint"``.
    """

    layers: Numbers = None
    heads: Numbers | Mapping[int, Sequence[int]] = None
    queries: Span = None
    keys: Span = None
    steps: Numbers = None
    sites: str | None = None
    kinds: str | None = None

    def at(self, site: Site, step: int) -> bool:
        """Whether anything at this site and step is meant."""
        if self.sites is not None and not fnmatchcase(site.name, self.sites):
            return False
        if self.kinds is not None and site.kind != self.kinds:
            return False
        if isinstance(self.heads, Mapping) and not len(self.heads.get(site.layer, ())):
            return False
        return _within(site.layer, self.layers, site.depth) and _within(step, self.steps, None)

    def head_list(self, site: Site) -> list[int] | None:
        """The heads meant at a site, or None for all; ValueError for one it does not have."""
        heads = self.heads.get(site.layer, ()) if isinstance(self.heads, Mapping) else self.heads
        if heads is None:
            return None
        if isinstance(heads, slice):
            return list(range(*heads.indices(site.heads)))
        listed = [heads] if isinstance(heads, int) else list(heads)
        for head in listed:
            require(
                -site.heads <= head < site.heads,
                "Where",
                f"head {head} at {site.name}, which has {site.heads}",
                f"give heads from 0 to {site.heads - 1}",
            )
        return [head % site.heads for head in listed]

    def query_rows(self, call: AttentionCall) -> Bool[Tensor, "batch_or_1 queries"]:
        """Which queries of a call are meant."""
        return _tokens("queries", self.queries, call.query_start, call.queries, call.tokens, call.value.device)

    def key_columns(self, call: AttentionCall) -> Bool[Tensor, "batch_or_1 keys"]:
        """Which keys of a call are meant."""
        return _tokens("keys", self.keys, call.key_start, call.keys, call.tokens, call.value.device)


def _within(number: int, chosen: Numbers, total: int | None) -> bool:
    if chosen is None:
        return True
    if isinstance(chosen, slice):
        return number in range(number + 1 if total is None else total)[chosen]
    listed = [chosen] if isinstance(chosen, int) else chosen
    return number in listed or (total is not None and number - total in listed)


def _tokens(
    name: str, chosen: Span, start: int | Tensor, length: int, tokens: Tokens | None, device: torch.device
) -> Tensor:
    positions = torch.arange(length, device=device) + start
    if chosen is None:
        return torch.ones(1, length, dtype=torch.bool, device=device)
    if isinstance(chosen, str):
        require(
            tokens is not None,
            "Where",
            f"{name} {chosen!r} without knowing which tokens these are",
            "attach(model, ..., tokens=Tokens.of(model, input_ids))",
        )
        assert tokens is not None
        return tokens.are(chosen, positions)
    if isinstance(chosen, Tensor):
        require(
            chosen.dtype == torch.bool and chosen.ndim in (1, 2),
            "Where",
            f"{name} of shape {tuple(chosen.shape)} and dtype {chosen.dtype}",
            "give booleans (length,) or (batch, length)",
        )
        rows = torch.nn.functional.pad(chosen.to(device).reshape(-1, chosen.shape[-1]), (0, 1))
        return rows[:, positions.clamp(max=chosen.shape[-1])]
    end = start + length
    if isinstance(chosen, slice):
        require(chosen.step in (None, 1), "Where", f"{name} {chosen} with a step", "give range(start, stop, step)")
        first, last = (
            default if edge is None else edge + end if edge < 0 else edge
            for edge, default in ((chosen.start, 0), (chosen.stop, end))
        )
        return ((positions >= first) & (positions < last))[None]
    listed = [chosen] if isinstance(chosen, int) else list(chosen)
    hits = [positions == (number + end if number < 0 else number) for number in listed]
    return torch.stack(hits).any(0)[None] if hits else torch.zeros(1, length, dtype=torch.bool, device=device)
