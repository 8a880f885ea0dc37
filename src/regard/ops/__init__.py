"""Floor 0: tensors in, tensors out; no modules, no parameters."""

from regard.ops import biases, masks, normalizers, positions
from regard.ops.attention import Explanation, attention, attention_weights, attention_with_lse, explain
from regard.ops.cache import KeyValueCache
from regard.ops.linear import linear_attention, linear_attention_step
from regard.ops.neighborhood import neighborhood_attention

__all__ = [
    "Explanation",
    "KeyValueCache",
    "attention",
    "attention_weights",
    "attention_with_lse",
    "biases",
    "explain",
    "linear_attention",
    "linear_attention_step",
    "masks",
    "neighborhood_attention",
    "normalizers",
    "positions",
]
