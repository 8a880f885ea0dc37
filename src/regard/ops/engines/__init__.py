"""The engines behind the door. Each module has ``refuses(call) -> reason or None`` and ``run(call) -> (out, lse)``."""

from regard.ops.engines import flex, fused, reference, tiled
from regard.ops.engines.call import Call

ENGINES = {"fused": fused, "tiled": tiled, "flex": flex, "reference": reference}

COMPILED = ("flex",)
"""Engines that ``backend="auto"`` leaves alone: a new shape or mask costs them seconds of compiling, and a compiler."""

SMALL = 256 * 256
"""Scores a head below which a dense mask costs less than a loop over tiles."""


def choose(call: Call) -> tuple[str, str]:
    """The rule of ``backend="auto"``: the engine and why."""
    if fused.refuses(call) is None:
        if fused.needs_no_dense(call):
            return "fused", "scaled_dot_product_attention takes this mask without a tensor"
        if call.queries * call.keys <= SMALL:
            return "fused", f"{call.queries}×{call.keys} scores are few enough for a dense mask"
    if tiled.refuses(call) is None:
        return "tiled", "any mask, bias and tileable normalizer, forward and backward, in O(N) memory"
    return "reference", f"no tiled engine takes it: {tiled.refuses(call)}"


__all__ = ["COMPILED", "ENGINES", "Call", "choose"]
