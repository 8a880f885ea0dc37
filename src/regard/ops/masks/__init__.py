"""Masks: small frozen objects that say who may look at whom, combined with ``&``, ``|`` and ``~``."""

from regard.ops.masks.base import And, Mask, Not, Or, Tiles
from regard.ops.masks.patterns import Blocks, Causal, Dilated, Padding, Prefix, Sinks, Window
from regard.ops.masks.plan import Plan, plan
from regard.ops.masks.tensors import Dense, Keys, Neighborhood, Segments

__all__ = [
    "And",
    "Blocks",
    "Causal",
    "Dense",
    "Dilated",
    "Keys",
    "Mask",
    "Neighborhood",
    "Not",
    "Or",
    "Padding",
    "Plan",
    "Prefix",
    "Segments",
    "Sinks",
    "Tiles",
    "Window",
    "plan",
]
