"""What a host module offers, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from regard.sites.call import AttentionCall
from regard.sites.site import Kind, Site


@dataclass(frozen=True)
class Description:
    """What a host says of one attention module; heads are 0 where only a call will tell."""

    kind: Kind
    heads: int
    key_heads: int
    head_dim: int
    causal: bool


@dataclass(frozen=True)
class Seat:
    """An attention module to route, and its door: a call in, the site's output (B, H, N, Dv) out."""

    site: Site
    module: nn.Module
    door: Callable[[AttentionCall], Tensor]


class Host(Protocol):
    """One way into attention modules. `name` is shown in `Site.host`."""

    name: str

    def describe(self, name: str, module: nn.Module, model: nn.Module) -> Description | str | None:
        """What `module` is, why its attention cannot be reached, or None if it is not this host's."""
        ...

    def route(self, seats: Sequence[Seat]) -> AbstractContextManager[None]:
        """While entered, the calls of these modules go through their doors; after it the model is what it was.

        A host fills in what it knows of a call; its step and tokens are the door's business.
        """
        ...
