"""The definition of correct: dense scores, whole rows, any dtype, differentiable any number of times."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from regard.ops.dropout import draw_seed, keep_tile
from regard.ops.engines.call import Call
from regard.ops.indices import index_grid
from regard.ops.precision import statistics_dtype, without_autocast


def refuses(call: Call) -> str | None:
    """Takes every call."""
    return None


def run(
    call: Call,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Output and log-sum-exp (meaningful for softmax only)."""
    with without_autocast(call.query.device):
        scores = masked_scores(call)
        weights = call.normalizer.weights(scores, counts(call))
        if call.dropout > 0:
            weights = weights * _keep(call, weights)
        value = call.value.to(weights.dtype).repeat_interleave(call.heads // call.key_heads, dim=1)
        return (weights @ value).to(call.query.dtype), _log_sum_exp(scores)


def weights(call: Call) -> Float[Tensor, "batch heads queries keys"]:
    """The weights themselves, in the statistics' dtype."""
    with without_autocast(call.query.device):
        return call.normalizer.weights(masked_scores(call), counts(call))


def masked_scores(call: Call) -> Float[Tensor, "batch heads queries keys"]:
    """``scale · q kᵀ + bias``, −inf where the mask forbids."""
    dtype = statistics_dtype(call.query.dtype)
    key = call.key.to(dtype).repeat_interleave(call.heads // call.key_heads, dim=1)
    scores = (call.query.to(dtype) * call.scale) @ key.mT
    bias, allowed = call.dense_bias(), call.dense_mask()
    if bias is not None:
        scores = scores + bias
    return scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)


def counts(call: Call) -> Tensor:
    """How many keys each query may attend (B or 1, H or 1, Nq, 1)."""
    allowed = call.dense_mask()
    if allowed is None:
        return torch.full((1, 1, call.queries, 1), call.keys, device=call.query.device)
    return allowed.sum(-1, keepdim=True)


def _log_sum_exp(scores: Tensor) -> Tensor:
    empty = ~(scores > -torch.inf).any(-1)
    total = scores.masked_fill(empty[..., None], 0.0).logsumexp(-1)
    return total.masked_fill(empty, -torch.inf)


def _keep(call: Call, weights: Tensor) -> Tensor:
    batch, heads, queries, keys = weights.shape
    grid = index_grid((0, batch), (0, heads), (keys - queries, keys), (0, keys), weights.device)
    return keep_tile(draw_seed(weights.device), call.dropout, *grid)
