"""Attention heads taken out of transformers models for good: rows and columns of their projections are removed.

transformers 5 has no `prune_heads` any more, but its attention modules tell heads by their width alone, so that smaller
projections are all it takes, with the few numbers that some modules keep. Known are modules with projections named
query, key, value (BERT and its kin), q_proj, k_proj, v_proj with o_proj or out_proj (Llama, Mistral, Qwen, Gemma, ViT,
BART, CLIP and their kin), and GPT-2's c_attn and c_proj.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.ops.checks import require
from regard.sites.attach import find
from regard.sites.site import Site

_OWNER = "remove_heads"


@dataclass(frozen=True)
class _Layout:
    """The projections of a module, and the axis of their weights that counts outputs (0 in a Linear)."""

    queries: nn.Module
    keys: nn.Module
    values: nn.Module
    output: nn.Module
    axis: int = 0


def remove_heads(model: nn.Module, heads: Mapping[str, Sequence[int]]) -> int:
    """Remove heads from a transformers model, in place, and return how many parameters it has less.

    The outputs are those with the heads' outputs set to 0. Where query heads share a key head and unequal numbers of
    them are left, key heads are repeated until all are shared by as many, which may take back what is saved. A site
    that loses all its heads keeps the first, with an output of 0. The configuration still has the old numbers: to load
    the weights again, remove the same heads from a fresh model, then `load_state_dict`.

    Args:
        model: a transformers model.
        heads: the query heads to remove at each site, by its name in ``sites.find(model)``.

    Raises ValueError, with the model as it was, for a site or head that is not there and a module it does not know.
    """
    sites, planned = find(model), []
    for name, listed in heads.items():
        site, module = sites.named(name), model.get_submodule(name)
        wrong = [head for head in listed if not 0 <= head < site.heads]
        way_out = f"give 0 to {site.heads - 1}"
        require(not wrong, _OWNER, f"heads {wrong} of {name}, which has {site.heads}", way_out)
        planned.append((site, module, _layout(model, site, module), set(listed)))
    before = sum(weight.numel() for weight in model.parameters())
    for site, module, layout, gone in planned:
        if gone:
            _cut(site, module, layout, [head for head in range(site.heads) if head not in gone])
    return before - sum(weight.numel() for weight in model.parameters())


def _layout(model: nn.Module, site: Site, module: Any) -> _Layout:
    parts = dict(module.named_children())
    parent = model.get_submodule(site.name.rpartition(".")[0])
    around = getattr(getattr(parent, "output", None), "dense", None)
    layout = None
    if {"query", "key", "value"} <= set(parts) and around is not None:
        layout = _Layout(parts["query"], parts["key"], parts["value"], around)
    elif {"q_proj", "k_proj", "v_proj"} <= set(parts) and ("o_proj" in parts or "out_proj" in parts):
        output = parts.get("o_proj", parts.get("out_proj"))
        assert output is not None
        layout = _Layout(parts["q_proj"], parts["k_proj"], parts["v_proj"], output)
    elif {"c_attn", "c_proj"} <= set(parts) and hasattr(module, "split_size") and "q_attn" not in parts:
        layout = _Layout(parts["c_attn"], parts["c_attn"], parts["c_attn"], parts["c_proj"], axis=1)
    known = "known are modules with query/key/value, q_proj/k_proj/v_proj or c_attn projections"
    require(layout is not None, _OWNER, f"{site.name} is a {type(module).__name__}", known)
    assert layout is not None

    projections = (layout.queries, layout.keys, layout.values, layout.output)
    plain = all(type(part).__name__ == ("Linear", "Conv1D")[layout.axis] for part in projections)
    require(
        plain, _OWNER, f"{site.name} has projections of another kind", "give a model without adapters or quantization"
    )
    # A weight that is not a projection's must be the same for all heads, as the norms of queries and keys are.
    own = {id(weight) for part in projections for weight in part.parameters()}
    other = [name for name, weight in module.named_parameters() if id(weight) not in own]
    per_head = [name for name in other if module.get_parameter(name).shape != (site.head_dim,)]
    require(not per_head, _OWNER, f"{site.name} has weights that may belong to heads: {', '.join(per_head)}", known)
    return layout


def _cut(site: Site, module: Any, layout: _Layout, kept: list[int]) -> None:
    emptied = not kept
    kept = kept or [0]
    group = site.heads // site.key_heads
    counts = [sum(head // group == shared for head in kept) for shared in range(site.key_heads)]
    share = math.gcd(*counts)
    keys = [shared for shared, count in enumerate(counts) for _ in range(count // share)]
    queries, shared = _features(kept, site.head_dim), _features(keys, site.head_dim)
    if layout.queries is layout.keys:
        width = site.heads * site.head_dim
        _keep(layout.queries, layout.axis, torch.cat([queries + place * width for place in range(3)]))
    else:
        _keep(layout.queries, layout.axis, queries)
        _keep(layout.keys, layout.axis, shared)
        _keep(layout.values, layout.axis, shared)
    _keep(layout.output, 1 - layout.axis, queries, biased=False)
    if emptied:
        nn.init.zeros_(layout.output.get_parameter("weight"))
    numbers = {
        "num_attention_heads": len(kept),
        "num_heads": len(kept),
        "num_key_value_heads": len(keys),
        "num_key_value_groups": share,
        "all_head_size": len(queries),
        "split_size": len(queries),
    }
    for name, number in numbers.items():
        if hasattr(module, name):
            setattr(module, name, number)
    if not hasattr(module, "num_heads"):
        # What `sites.find` asks before the configuration, which still has the old number.
        module.num_attention_heads = len(kept)


def _features(heads: list[int], width: int) -> Tensor:
    return (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()


def _keep(projection: Any, axis: int, index: Tensor, *, biased: bool = True) -> None:
    def kept(weight: nn.Parameter, axis: int) -> nn.Parameter:
        values = weight.detach().index_select(axis, index.to(weight.device))
        return nn.Parameter(values, requires_grad=weight.requires_grad)

    projection.weight = kept(projection.weight, axis)
    if biased and projection.bias is not None:
        projection.bias = kept(projection.bias, 0)
    if isinstance(projection, nn.Linear):
        projection.out_features, projection.in_features = projection.weight.shape
    else:
        projection.nx, projection.nf = projection.weight.shape
