"""What attention does in a model: functions that take a model and data and return a small result.

Every result prints as a table (`.table()`, to print with Rich) and plots itself (`.figure()`, with plotly). They read
through the door of `regard.sites`, beside the model's own fused kernels.
"""

from regard.inspect.attention_knockout import attention_knockout
from regard.inspect.attention_sinks import attention_sinks
from regard.inspect.dynamical_form import dynamical_form
from regard.inspect.head_importance import head_importance, prune_heads
from regard.inspect.head_profile import attention_patterns, head_profile
from regard.inspect.needles import Needle, needle_prompts
from regard.inspect.overview import overview
from regard.inspect.query_knockout import query_knockout
from regard.inspect.retrieval_heads import mask_retrieval_heads, retrieval_heads
from regard.inspect.selectivity import selectivity
from regard.inspect.sink_bias import normalized_by, sink_bias

__all__ = [
    "Needle",
    "attention_knockout",
    "attention_patterns",
    "attention_sinks",
    "dynamical_form",
    "head_importance",
    "head_profile",
    "mask_retrieval_heads",
    "needle_prompts",
    "normalized_by",
    "overview",
    "prune_heads",
    "query_knockout",
    "retrieval_heads",
    "selectivity",
    "sink_bias",
]
