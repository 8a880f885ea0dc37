"""Attention in which no token has to be the sink: biases of keys and values, and weights that do not compete.

See `regard.inspect.attention_sinks` for the equations and their source.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.ops.checks import require
from regard.ops.normalizers import Normalizer, normalizer_of
from regard.sites import AttentionCall, Instrument
from regard.sites.call import MASKED, Heads, RowChange


def sink_bias(
    key: Float[Tensor, "#heads head_dim"] | None = None,
    value: Float[Tensor, "#heads value_dim"] | None = None,
    *,
    scale: float | None = None,
) -> Instrument:
    """An instrument that gives every softmax of a model the paper's K, V or KV biases.

    Args:
        key: k*, a further key of each head, or one for all, that every query may attend; after positions are applied.
        value: v*, what it adds to the output, 0 if None; without `key` it is added to every output whole.
        scale: of the product of query and `key`, head_dim^−½ by default.

    Both may need gradients. The weights of the other keys sum to what the bias leaves them. With a key the weights are
    computed beside the fused kernel. Raises ValueError if both are None.
    """
    require(key is not None or value is not None, "sink_bias", "neither key nor value", "give at least one")
    added = torch.zeros(1, 1) if value is None else value

    def instrument(call: AttentionCall) -> AttentionCall:
        if key is None:
            return call.change_output(lambda output: output + added[:, None].to(output.dtype))
        require(call.query is not None, "sink_bias", f"{call.site.name} shows its scores only", "leave key out")
        assert call.query is not None
        factor = call.query.shape[-1] ** -0.5 if scale is None else scale
        logits = factor * (call.query * key[:, None].to(call.query.dtype)).sum(-1)

        def share(rows: slice, heads: Heads) -> Tensor:
            """The weight of the bias itself."""
            own = logits if heads is None else logits[:, list(heads)]
            return torch.sigmoid(own[:, :, rows] - call.logits(rows, heads).logsumexp(-1))

        def leave(weights: Tensor, rows: slice, heads: Heads) -> Tensor:
            return weights * (1 - share(rows, heads))[..., None]

        def add(output: Tensor) -> Tensor:
            shares = torch.cat([share(rows, None) for rows in call.tiles()], 2)
            return output + (shares[..., None] * added[:, None]).to(output.dtype)

        changed = call.change_weights(RowChange(_every(call), leave))
        return changed if value is None else changed.change_output(add)

    return instrument


def normalized_by(normalizer: str | Normalizer) -> Instrument:
    """An instrument that has another normalizer take the place of a model's softmax, off the fused kernel.

    ``Sigmoid(bias=0.0)`` of `regard.ops.normalizers` is the paper's sigmoid attention without normalisation.
    """
    chosen = normalizer_of(normalizer)

    def instrument(call: AttentionCall) -> AttentionCall:
        def change(weights: Tensor, rows: slice, heads: Heads) -> Tensor:
            logits = call.logits(rows, heads)
            logits = logits.masked_fill(logits <= MASKED, -torch.inf)
            return chosen.weights(logits, (logits > -torch.inf).sum(-1, keepdim=True))

        return call.change_weights(RowChange(_every(call), change))

    return instrument


def _every(call: AttentionCall) -> Bool[Tensor, " queries"]:
    return torch.ones(call.queries, dtype=torch.bool, device=call.value.device)
