"""Masks: small frozen objects that say who may look at whom, combined with ``&``, ``|`` and ``~``."""

from regard.ops.masks.base import Mask, Tiles
from regard.ops.masks.patterns import (
    Blocks,
    Causal,
    Dense,
    Dilated,
    Neighborhood,
    Padding,
    Prefix,
    Segments,
    Sinks,
    Window,
)
from regard.ops.masks.plan import Plan, plan

__all__ = [
    "Blocks",
    "Causal",
    "Dense",
    "Dilated",
    "Mask",
    "Neighborhood",
    "Padding",
    "Plan",
    "Prefix",
    "Segments",
    "Sinks",
    "Tiles",
    "Window",
    "plan",
]
