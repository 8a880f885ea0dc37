"""The one door: every softmax-like attention, whatever its mask, bias, normalizer or engine, is a call of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from regard.ops.biases import Bias
from regard.ops.checks import one_of, require
from regard.ops.engines import ENGINES, Call, choose, reference
from regard.ops.masks import Mask
from regard.ops.normalizers import Normalizer, normalizer_of

Backend = Literal["auto", "reference", "tiled", "fused", "flex"]


def attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    normalizer: str | Normalizer = "softmax",
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> Float[Tensor, "batch heads queries value_dim"]:
    """``out_i = Σ_j w_ij v_j`` with ``w_i = normalizer(scale · q_i kᵀ + bias)`` over the keys the mask allows.

    Args:
        query, key, value: floating tensors of one dtype and device. The number of query heads is a multiple of the
            number of key heads; query head h uses key head ``h // (heads // key_heads)``.
        mask: who may look at whom (`regard.ops.masks`); None allows all. With unequal lengths query i stands at key
            ``keys − queries + i``. A query that may look at nothing gets zeros and no gradient.
        bias: what is added to the scaled scores (`regard.ops.biases`).
        normalizer: ``"softmax"``, ``"sigmoid"``, ``"relu"``, ``"softplus_l1"``, ``"layer_norm_scores"``, ``"reversed"``
            or a `Normalizer`. The last two need whole rows (columns), which only the reference engine has.
        scale: factor on ``q kᵀ``; ``head_dim ** −0.5`` by default.
        dropout: probability of dropping a weight, in [0, 1). The pattern follows torch's seed and is the same in every
            engine that takes dropout. Nothing here knows of train and eval: pass 0 when evaluating.
        backend: ``"auto"`` (see `explain`) or an engine by name, which raises if it cannot take the call.

    Returns the output in the query's dtype; scores and their statistics are at least float32.

    Raises ValueError for shapes, dtypes, masks or biases that do not fit and for an engine that refuses the call.
    """
    if has_torch_function((query, key, value)):
        options = {"mask": mask, "bias": bias, "normalizer": normalizer, "scale": scale, "dropout": dropout}
        given = (query, key, value)
        return handle_torch_function(attention, given, *given, **options, backend=backend)
    call = _call(query, key, value, mask, bias, normalizer, scale, dropout, needs_lse=False)
    return ENGINES[_engine(call, backend)].run(call)[0]


def attention_with_lse(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    normalizer: str | Normalizer = "softmax",
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """`attention`, and per query the log-sum-exp of its scores (float32 or float64; −inf for an empty row).

    Two results over disjoint keys combine with the weights ``softmax([lse_1, lse_2])``. Gradients flow through both
    outputs. Raises ValueError for a normalizer other than softmax, which has no log-sum-exp.
    """
    if has_torch_function((query, key, value)):
        options = {"mask": mask, "bias": bias, "normalizer": normalizer, "scale": scale, "dropout": dropout}
        given = (query, key, value)
        return handle_torch_function(attention_with_lse, given, *given, **options, backend=backend)
    call = _call(query, key, value, mask, bias, normalizer, scale, dropout, needs_lse=True)
    require(
        call.is_softmax,
        "attention_with_lse",
        f"normalizer {call.normalizer!r} has no log-sum-exp",
        "use normalizer='softmax', or attention(...)",
    )
    out, lse = ENGINES[_engine(call, backend)].run(call)
    assert lse is not None
    return out, lse


def attention_weights(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    normalizer: str | Normalizer = "softmax",
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries keys"]:
    """The weights of `attention` themselves, in at least float32. Builds the N×N tensor: that is its purpose."""
    call = _call(query, key, key, mask, bias, normalizer, scale, 0.0, needs_lse=False)
    return reference.weights(call)


@dataclass(frozen=True)
class Explanation:
    """Which engine a call takes, why, and what the others say."""

    engine: str
    reason: str
    refusals: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.engine}: {self.reason}"]
        return "\n".join(lines + [f"not {name}: {reason}" for name, reason in self.refusals.items()])


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    normalizer: str | Normalizer = "softmax",
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "auto",
    needs_lse: bool = False,
) -> Explanation:
    """What `attention` (with `needs_lse`, `attention_with_lse`) would do with these arguments, without doing it."""
    call = _call(query, key, value, mask, bias, normalizer, scale, dropout, needs_lse)
    reasons = {name: engine.refuses(call) for name, engine in ENGINES.items()}
    refusals = {name: reason for name, reason in reasons.items() if reason is not None}
    if backend == "auto":
        return Explanation(*choose(call), refusals)
    return Explanation(_engine(call, backend), "named by the caller", refusals)


def _engine(call: Call, backend: str) -> str:
    if backend == "auto":
        return choose(call)[0]
    one_of("attention", "backend", backend, ("auto", *ENGINES))
    reason = ENGINES[backend].refuses(call)
    require(
        reason is None,
        "attention",
        f"backend {backend!r} cannot take this call: {reason}",
        "use backend='auto'",
    )
    return backend


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None,
    bias: Bias | None,
    normalizer: str | Normalizer,
    scale: float | None,
    dropout: float,
    needs_lse: bool,
) -> Call:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require(
            tensor.ndim == 4 and tensor.is_floating_point(),
            "attention",
            f"{name} of shape {tuple(tensor.shape)} and dtype {tensor.dtype}",
            "give a floating tensor (batch, heads, length, head_dim)",
        )
        require(
            tensor.dtype == query.dtype and tensor.device == query.device,
            "attention",
            f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}",
            "bring all three to one dtype and device",
        )
    batch, heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1:3]
    require(
        key.shape[0] == batch and key.shape[3] == head_dim,
        "attention",
        f"key of shape {tuple(key.shape)} for a query of shape {tuple(query.shape)}",
        "batch and head_dim must agree",
    )
    require(
        value.shape[:3] == key.shape[:3],
        "attention",
        f"value of shape {tuple(value.shape)} for a key of shape {tuple(key.shape)}",
        "batch, heads and length must agree",
    )
    require(
        key_heads > 0 and heads % key_heads == 0,
        "attention",
        f"{heads} query heads for {key_heads} key heads",
        "the first must be a multiple of the second",
    )
    require(0.0 <= dropout < 1.0, "attention", f"dropout {dropout}", "give a probability in [0, 1)")
    for name, given, kind in (("mask", mask, Mask), ("bias", bias, Bias)):
        if given is None:
            continue
        require(
            isinstance(given, kind),
            "attention",
            f"{name} is a {type(given).__name__}",
            "wrap a boolean tensor as masks.Dense(tensor)" if name == "mask" else "give a Bias from regard.ops.biases",
        )
        given.validate(batch, heads, queries, keys)
    return Call(
        query,
        key,
        value,
        mask.to(query.device) if mask is not None else None,
        bias.to(query.device) if bias is not None else None,
        normalizer_of(normalizer),
        float(head_dim**-0.5 if scale is None else scale),
        float(dropout),
        needs_lse,
    )
