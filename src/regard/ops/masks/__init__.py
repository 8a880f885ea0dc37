"""Masks: small frozen objects that say who may look at whom, combined with ``&``, ``|`` and ``~``."""

from regard.ops.masks.base import And, Mask, Not, Or, Tiles
from regard.ops.masks.candidates import CandidateIsolation
from regard.ops.masks.groups import GlobalTokens, ShiftedBlocks
from regard.ops.masks.modality import CausalCross, CompositeModality, MixedBidirectionalVision, ModalityMutual
from regard.ops.masks.patterns import Blocks, Causal, Dilated, Padding, Prefix, Sinks, Window
from regard.ops.masks.plan import Plan, plan
from regard.ops.masks.sharding import LocalBlocks, Sharded
from regard.ops.masks.tensors import Dense, Keys, Neighborhood, Ordered, Segments, segments_of

__all__ = [
    "And",
    "Blocks",
    "CandidateIsolation",
    "Causal",
    "CausalCross",
    "CompositeModality",
    "Dense",
    "Dilated",
    "GlobalTokens",
    "Keys",
    "LocalBlocks",
    "Mask",
    "MixedBidirectionalVision",
    "ModalityMutual",
    "Neighborhood",
    "Not",
    "Or",
    "Ordered",
    "Padding",
    "Plan",
    "Prefix",
    "Segments",
    "Sharded",
    "ShiftedBlocks",
    "Sinks",
    "Tiles",
    "Window",
    "plan",
    "segments_of",
]
