"""Softmax attention made linear, as in "The Hedgehog & the Porcupine: Expressive Linear Attentions with Softmax
Mimicry", Zhang et al., 2024, arXiv 2402.04347: copy the projections, distil the feature maps, then fine-tune it all.

    layer = hedgehog_from(pretrained)        # a softmax layer of ours, or an attention module of `transformers`
    report = distill(layer, inputs)          # fits φ_q and φ_k; how near the map was before, and is after

`linearize` does both for every plain softmax layer in a model of ours, on what each layer is given when the model runs.
Fine-tuning is ordinary training of what comes out.

Differences: the paper distils all layers at once while the model runs; as no loss reaches another layer, one after the
other gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from regard.nn.attention import Attention
from regard.nn.linear.hedgehog import HedgehogAttention, cross_entropy
from regard.ops.checks import require
from regard.ops.masks import Mask

OWNER = "hedgehog_from"


class Batch(NamedTuple):
    """Inputs of an attention layer."""

    x: Float[Tensor, "batch length dim"]
    mask: Mask | None = None
    positions: Tensor | None = None


class MapReport(NamedTuple):
    """The linear map â beside the softmax map a of the same queries and keys, per head, averaged over tokens.

    Fields:
        softmax_entropy, entropy: of a and of â, in nats; near each other when â is as spiky as a.
        divergence: ``KL(a ‖ â)`` in nats: `distillation_loss` less what no map can take off it.
        distance: total variation ``½ Σ_j |a_ij − â_ij|``, from 0 to 1.
        order: Spearman's rank correlation of q·k and â over the keys of a query; 1 where â is monotone in q·k.
    """

    softmax_entropy: Float[Tensor, "heads"]
    entropy: Float[Tensor, "heads"]
    divergence: Float[Tensor, "heads"]
    distance: Float[Tensor, "heads"]
    order: Float[Tensor, "heads"]


class Distillation(NamedTuple):
    """The map before and after `distill`, and the loss of every step."""

    before: MapReport
    after: MapReport
    losses: tuple[float, ...]


def distill(
    layer: HedgehogAttention,
    batches: Sequence[Tensor | Batch],
    *,
    steps: int = 200,
    learning_rate: float = 1e-2,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Distillation:
    """Fit the feature maps of `layer`, in place, to the softmax weights of its queries and keys; all else stays.

    Step s takes batch ``s % len(batches)``. The optimizer is AdamW without weight decay unless `optimizer` makes
    another of the parameters. `progress` is told the step and its loss. Maps are dense: keep batches short.
    """
    require(len(batches) > 0 and steps >= 0, "distill", f"{len(batches)} batches, {steps} steps", "give some batches")
    given = [batch if isinstance(batch, Batch) else Batch(batch) for batch in batches]
    parameters = [*layer.query_map.parameters(), *layer.key_map.parameters()]
    update = AdamW(parameters, lr=learning_rate, weight_decay=0.0) if optimizer is None else optimizer(parameters)
    before, losses = compare_maps(layer, given), []
    with torch.enable_grad():
        for step in range(steps):
            batch = given[step % len(given)]
            update.zero_grad()
            loss = layer.distillation_loss(batch.x, mask=batch.mask, positions=batch.positions)
            loss.backward()
            update.step()
            losses.append(float(loss.detach()))
            if progress is not None:
                progress(step, losses[-1])
    update.zero_grad()
    return Distillation(before, compare_maps(layer, given), tuple(losses))


@torch.no_grad()
def compare_maps(layer: HedgehogAttention, batches: Sequence[Tensor | Batch]) -> MapReport:
    """How near the map of `layer` is to the softmax map, over all tokens of `batches`."""
    rows = []
    for batch in (batch if isinstance(batch, Batch) else Batch(batch) for batch in batches):
        target, log_weights, counted = layer.both_maps(batch.x, mask=batch.mask, positions=batch.positions)
        found = torch.stack(_of_rows(target.to(log_weights.dtype), log_weights), -1)
        rows.append(found.transpose(0, 1)[:, counted[:, 0]])
    return MapReport(*torch.cat(rows, 1).mean(1).unbind(-1))


def _of_rows(target: Tensor, log_weights: Tensor) -> list[Tensor]:
    weights = log_weights.exp()
    entropy, own = cross_entropy(target, target.log()), cross_entropy(weights, log_weights)
    # What may not be attended stands first in both orders, and in the same place.
    moved = (_ranks(target) - _ranks(weights)).to(target.dtype).square().sum(-1)
    count = (log_weights > -torch.inf).sum(-1).to(target.dtype)
    order = 1 - 6 * moved / (count * (count.square() - 1)).clamp(min=1)
    distance = (target - weights).abs().sum(-1) / 2
    return [entropy, own, cross_entropy(target, log_weights) - entropy, distance, order]


def _ranks(weights: Tensor) -> Tensor:
    return weights.argsort(dim=-1, stable=True).argsort(-1)


def linearize(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    feature_map: Literal["exp", "softmax"] = "exp",
    fit: Callable[[HedgehogAttention, Sequence[Batch]], Distillation] = distill,
) -> dict[str, Distillation]:
    """Replace, in place, every plain softmax layer of ours inside `model` by a distilled linear one; reports by name.

    ``model(item)`` is run for each of `inputs`, in eval mode, and what the layers are given is kept until they are
    fitted by `fit` (``functools.partial(distill, steps=…)``). Layers that `hedgehog_from` refuses stay as they are.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, Attention) and not _unlike(part)}
    require(bool(layers), "linearize", "no plain softmax layer in the model", "give a model that holds one")
    require("" not in layers, "linearize", "the model is itself a layer", "use hedgehog_from and distill")
    seen: dict[str, list[Batch]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            context = given[1] if len(given) > 1 else named.get("context")
            require(context is None, "linearize", f"{name} is given a context", "it makes self-attention linear only")
            x = given[0] if given else named["x"]
            seen[name].append(Batch(x.detach(), named.get("mask"), named.get("positions")))

        return hook

    hooks = [layer.register_forward_pre_hook(keep(name), with_kwargs=True) for name, layer in layers.items()]
    training = [part for part in model.modules() if part.training]
    try:
        model.eval()
        with torch.no_grad():
            for item in inputs:
                model(item)
    finally:
        for hook in hooks:
            hook.remove()
        for part in training:
            part.training = True
    reports = {}
    for name, layer in layers.items():
        linear = hedgehog_from(layer, feature_map=feature_map)
        reports[name] = fit(linear, seen.pop(name))
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, linear.train(layer.training))
    return reports


def hedgehog_from(
    layer: nn.Module, *, causal: bool | None = None, feature_map: Literal["exp", "softmax"] = "exp"
) -> HedgehogAttention:
    """A linear layer with the projections of a softmax one and feature maps to be distilled.

    `layer` is a `MultiHeadAttention` or another plain softmax layer of ours (any `kv_heads`; no position or rotary), or
    a self-attention module of `transformers`, known by its projections:

    - ``query``, ``key``, ``value`` and ``dense`` (BERT, RoBERTa, ViT): ``BertAttention``, whose residual and LayerNorm
      stay with the host, or ``BertSelfAttention``, which has no output projection: it becomes the identity;
    - ``c_attn`` and ``c_proj`` (GPT-2);
    - ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` or ``out_proj`` (Llama, Mistral, Qwen2, OPT, CLIP), with the
      default rotary positions of its config where that has any.

    `causal` is needed where the module does not say so itself. A scale of scores other than ``head_dim ** −0.5`` goes
    into the query projection. The result takes and returns tensors as ours do. Raises ValueError for what a linear
    layer cannot take over: relative positions and biases, windows, norms of queries and keys, scaled rotary positions.
    """
    if isinstance(layer, Attention):
        unlike = _unlike(layer)
        require(not unlike, OWNER, f"{type(layer).__name__} {unlike}", "give a plain softmax self-attention")
        require(causal in (None, layer.causal), OWNER, f"causal={causal} for causal={layer.causal}", "leave it out")
        base = 10000.0 if layer.position == "rotary" else None
        query, key, value, output = (_affine(part) for part in (layer.query, layer.key, layer.value, layer.output))
        found = _Softmax(query, key, value, output, layer.head_dim, layer.causal, base)
    else:
        found = _of_host(layer, causal)
    return found.linear(feature_map).train(layer.training)


def _unlike(layer: Attention) -> str:
    """What makes `layer` other than plain softmax self-attention; empty if nothing does."""
    allowed = {f"{name}.{kind}" for name in ("query", "key", "value", "output") for kind in ("weight", "bias")}
    kind = type(layer)
    stages = ("forward", "project", "split", "full_mask", "own_mask", "score_bias", "combine")
    for differs, what in (
        (layer.normalizer != "softmax", f"normalizes by {layer.normalizer}"),
        (layer.position not in (None, "rotary"), f"has position {layer.position!r}"),
        (not set(layer.state_dict()) <= allowed, "has parameters beside its projections"),
        (layer.context_dim != layer.dim, f"has context_dim {layer.context_dim} beside dim {layer.dim}"),
        (any(getattr(kind, stage) is not getattr(Attention, stage) for stage in stages), "has stages of its own"),
    ):
        if differs:
            return what
    return ""


Affine = tuple[Tensor, Tensor | None]
"""Weight (outputs, inputs) and bias."""


class _Softmax(NamedTuple):
    """Projections (`output` None: the identity) and what else makes up a softmax layer."""

    query: Affine
    key: Affine
    value: Affine
    output: Affine | None
    head_dim: int
    causal: bool
    rotary_base: float | None = None
    scale: float | None = None

    def linear(self, feature_map: Literal["exp", "softmax"]) -> HedgehogAttention:
        """The linear layer of these projections."""
        weight, vector = self.query
        width, dim = weight.shape
        factor = 1.0 if self.scale is None else self.scale * self.head_dim**0.5
        copied = {
            "query": (weight * factor, None if vector is None else vector * factor),
            "key": self.key,
            "value": self.value,
            "output": self.output or (torch.eye(width, device=weight.device, dtype=weight.dtype), None),
        }
        bias = any(vector is not None for _, vector in copied.values())
        layer = HedgehogAttention(
            dim,
            heads=width // self.head_dim,
            kv_heads=self.key[0].shape[0] // self.head_dim,
            head_dim=self.head_dim,
            causal=self.causal,
            feature_map=feature_map,
            position=None if self.rotary_base is None else "rotary",
            rotary_base=self.rotary_base or 10000.0,
            bias=bias,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            for name, (matrix, vector) in copied.items():
                projection = getattr(layer, name)
                projection.weight.copy_(matrix)
                if bias:
                    projection.bias.zero_() if vector is None else projection.bias.copy_(vector)
        return layer


def _affine(projection: nn.Module) -> Affine:
    """What a projection holds; the Conv1D of `transformers` has its weight the other way round."""
    weight: Any = projection.weight
    bias: Any = projection.bias
    weight = weight if isinstance(projection, nn.Linear) else weight.mT
    return weight.detach(), None if bias is None else bias.detach()


HOSTS_CANNOT = (
    "q_norm",
    "k_norm",
    "q_layernorm",
    "k_layernorm",
    "distance_embedding",
    "relative_attention_bias",
    "sinks",
    "sliding_window",
    "attn_logit_softcapping",
    "rotary_dim",
    "is_cross_attention",
)
"""Attributes of attention modules of `transformers` that, unless None or False, change the scores in ways φ cannot."""


def _of_host(layer: nn.Module, causal: bool | None) -> _Softmax:
    """What an attention module of `transformers` holds."""
    outer: Any = layer
    inner: Any = next((part for name, part in layer.named_children() if name in ("self", "attention")), layer)
    kind = type(inner).__name__
    for name in HOSTS_CANNOT:
        value = getattr(inner, name, None)
        require(value is None or value is False, OWNER, f"{kind} has {name}", "a linear layer cannot take it over")
    says = getattr(inner, "is_causal", getattr(inner, "is_decoder", True if hasattr(inner, "c_attn") else None))
    causal = says if causal is None else causal
    require(causal is not None, OWNER, f"{kind} does not say whether it is causal", "pass causal=True or False")
    scale = getattr(inner, "scaling", getattr(inner, "scale", None))
    if hasattr(inner, "c_attn"):
        return _of_gpt2(inner, bool(causal), scale)
    if hasattr(inner, "q_proj"):
        output: Any = getattr(inner, "o_proj", getattr(inner, "out_proj", None))
        require(output is not None, OWNER, f"{kind} has q_proj but no o_proj or out_proj", "give one that has")
        query, key, value, output = (_affine(part) for part in (inner.q_proj, inner.k_proj, inner.v_proj, output))
        return _Softmax(query, key, value, output, _head_dim(inner), bool(causal), _rotary_base(inner), scale)
    known = all(hasattr(inner, name) for name in ("query", "key", "value"))
    require(known, OWNER, f"{kind} has no projections known here", "give one with q_proj, query or c_attn")
    holder = getattr(outer, "output", outer)
    output = getattr(holder, "dense", None)
    require(output is not None or inner is outer, OWNER, f"{type(outer).__name__} has no output.dense", f"give {kind}")
    query, key, value = (_affine(part) for part in (inner.query, inner.key, inner.value))
    out = None if output is None else _affine(output)
    return _Softmax(query, key, value, out, _head_dim(inner), bool(causal), None, scale)


def _of_gpt2(layer: Any, causal: bool, scale: float | None) -> _Softmax:
    """Query, key and value stand one after the other in `c_attn`."""
    weight, bias = _affine(layer.c_attn)
    vectors = (None, None, None) if bias is None else bias.chunk(3)
    query, key, value = zip(weight.chunk(3), vectors, strict=True)
    if scale is None:
        scale = layer.head_dim**-0.5 if getattr(layer, "scale_attn_weights", True) else 1.0
        if getattr(layer, "scale_attn_by_inverse_layer_idx", False):
            scale = scale / (layer.layer_idx + 1)
    return _Softmax(query, key, value, _affine(layer.c_proj), layer.head_dim, causal, None, scale)


def _head_dim(layer: Any) -> int:
    for name in ("head_dim", "attention_head_size"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise ValueError(f"{OWNER}: {type(layer).__name__} has no head_dim or attention_head_size; give one that has")


def _rotary_base(layer: Any) -> float | None:
    """Of the layer's config: `rope_parameters` since version 5 of `transformers`, `rope_theta` before; else None."""
    config = getattr(layer, "config", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    base = rope.get("rope_theta", getattr(config, "rope_theta", getattr(layer, "rope_theta", None)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    part = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    plain = kind == "default" and part in (None, 1.0) and (base is not None or not rope)
    require(
        plain, OWNER, f"rotary positions {rope}, turning {part} of a head", "only the default ones can be taken over"
    )
    return base
