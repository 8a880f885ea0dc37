"""Floor 0: tensors in, tensors out; no modules, no parameters."""

from regard.ops import biases, masks, normalizers, positions
from regard.ops.attention import Explanation, attention, attention_weights, attention_with_lse, explain
from regard.ops.cache import KeyValueCache
from regard.ops.linear import linear_attention, linear_attention_step
from regard.ops.long_convolution import long_convolution, toeplitz_product
from regard.ops.neighborhood import neighborhood_attention
from regard.ops.scan import associative_scan
from regard.ops.spikes import leaky_integrate_and_fire

__all__ = [
    "Explanation",
    "KeyValueCache",
    "associative_scan",
    "attention",
    "attention_weights",
    "attention_with_lse",
    "biases",
    "explain",
    "leaky_integrate_and_fire",
    "linear_attention",
    "linear_attention_step",
    "long_convolution",
    "masks",
    "neighborhood_attention",
    "normalizers",
    "positions",
    "toeplitz_product",
]
