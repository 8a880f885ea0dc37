"""Linear attention: each query reads a decayed sum of key-value products.

With keys ``k_t``, values ``v_t`` and log-decays ``g_t <= 0`` the causal form is

    S_t = exp(g_t) S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t

so a token is not decayed for itself. Recurrence and normaliser: "Transformers are RNNs" (Katharopoulos et al.,
2020, arXiv 2006.16236). Decay, without scale or denominator: "Lightning Attention-2" and "Various Lengths,
Constant Speed" (Qin et al., 2024, arXiv 2401.04658 and 2405.17381). `_linear_chunks` computes the causal form.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from regard.ops._linear_chunks import causal_linear_attention
from regard.ops.checks import require
from regard.ops.precision import exact, statistics_dtype


@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = ...,
    log_decay: Tensor | None = ...,
    normalize: bool = ...,
    chunk_size: int = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = ...,
    log_decay: Tensor | None = ...,
    normalize: bool = ...,
    chunk_size: int = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_attention(
    query: Float[Tensor, "batch query_heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    *,
    causal: bool = True,
    log_decay: Float[Tensor, "*batch_heads_keys"] | None = None,
    normalize: bool = False,
    chunk_size: int = 64,
    initial_state: Float[Tensor, "batch heads head_dim state_dim"] | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose weights are plain products of feature-mapped queries and keys, in linear time.

    Causal: ``o_i = Σ_{j<=i} exp(g_{j+1} + … + g_i) (q_i·k_j) v_j``.
    Not causal: ``o_i = Σ_j exp(g |i-j|) (q_i·k_j) v_j``.

    There is no feature map and no scale. `normalize` divides each output by the sum of its weights; where
    that sum is exactly zero, as with keys that are all zero, output and gradient are zero.

    `query_heads` may be a multiple of `heads`: neighbouring query heads share a key head. `log_decay` is the
    natural logarithm of the decay, at most 0, of shape (heads,) or, if causal, (batch, heads, keys); ``-inf``
    forgets everything before the token. Only a call neither causal nor decayed takes other queries than keys.

    The state is ``S`` after the last token, (batch, heads, head_dim, value_dim), in float32, or float64 for
    float64 inputs. With `normalize` it has one more value column, the sum of keys. `initial_state` continues
    from such a state; a decay without direction has none. Half types are computed in float32 inside.

    Returns (batch, query_heads, queries, value_dim) in the inputs' dtype, and the state if `return_state`.
    `chunk_size` changes speed only. Raises ``ValueError`` for shapes, dtypes and options that do not fit
    together, and ``RuntimeError`` for a second derivative of a causal or decayed call.
    """
    owner = "linear_attention"
    _check_inputs(owner, query, key, value, log_decay, initial_state, normalize)
    _check_options(owner, query, key, log_decay, causal, initial_state is not None or return_state, chunk_size)
    terms = _with_ones(value) if normalize else value
    log_decay = None if log_decay is None else log_decay.to(statistics_dtype(value.dtype))
    if causal:
        out, state = causal_linear_attention(query, key, terms, log_decay, initial_state, chunk_size)
    elif log_decay is None:
        state = _key_values(key, terms, initial_state)
        out = _read(query, state)
    else:
        out, state = _bidirectional(query, key, terms, log_decay, chunk_size), None
    out = (_divided(out) if normalize else out).to(value.dtype)
    return out if state is None or not return_state else (out, state)


def linear_attention_step(
    query: Float[Tensor, "batch query_heads 1 head_dim"],
    key: Float[Tensor, "batch heads 1 head_dim"],
    value: Float[Tensor, "batch heads 1 value_dim"],
    state: Float[Tensor, "batch heads head_dim state_dim"] | None,
    *,
    log_decay: Float[Tensor, "*batch_heads_1"] | None = None,
    normalize: bool = False,
) -> tuple[Tensor, Tensor]:
    """The next token of causal `linear_attention`: its output and the new state, in constant time.

    `state` is what the last step or ``linear_attention(..., return_state=True)`` returned, None before the
    first token; it is not written to. `log_decay` is (heads,) or (batch, heads, 1). All else is as there.
    """
    owner = "linear_attention_step"
    _check_inputs(owner, query, key, value, log_decay, state, normalize)
    require(
        query.shape[2] == key.shape[2] == 1,
        owner,
        f"query has length {query.shape[2]} and key {key.shape[2]}, a step takes one token",
        "give more to linear_attention(..., initial_state=state, return_state=True)",
    )
    if state is not None and log_decay is not None:
        state = state * log_decay.to(state.dtype).exp().reshape(-1, key.shape[1], 1, 1)
    new_state = _key_values(key, _with_ones(value) if normalize else value, state)
    out = _read(query, new_state)
    return (_divided(out) if normalize else out).to(value.dtype), new_state


def _with_ones(value: Tensor) -> Tensor:
    """A last column of ones makes the normaliser one more value; state and gradients need nothing else."""
    return F.pad(value.to(statistics_dtype(value.dtype)), (0, 1), value=1.0)


def _divided(out: Tensor) -> Tensor:
    """Values over the normaliser; dividing by infinity for zero gives zero, to the gradient as well."""
    weight = out[..., -1:]
    return out[..., :-1] / weight.masked_fill(weight == 0, torch.inf)


@exact
def _key_values(key: Tensor, value: Tensor, state: Tensor | None) -> Tensor:
    precise = statistics_dtype(value.dtype)
    products = key.to(precise).mT @ value.to(precise)
    return products if state is None else state + products


@exact
def _read(query: Tensor, state: Tensor) -> Tensor:
    """What queries see of the state of their key head: one product per key head, over all its queries."""
    heads = state.shape[1]
    groups = query.shape[1] // heads
    grouped = query.to(state.dtype).unflatten(1, (heads, groups)).flatten(2, 3)
    return (grouped @ state).unflatten(2, (groups, -1)).flatten(1, 2)


def _bidirectional(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, chunk_size: int) -> Tensor:
    """A causal pass each way; both count the token itself, so it is taken off once."""
    query, key, value = (tensor.to(statistics_dtype(value.dtype)) for tensor in (query, key, value))
    past, _ = causal_linear_attention(query, key, value, log_decay, None, chunk_size)
    future, _ = causal_linear_attention(query.flip(2), key.flip(2), value.flip(2), log_decay, None, chunk_size)
    weight = (query.unflatten(1, (key.shape[1], query.shape[1] // key.shape[1])) * key.unsqueeze(2)).sum(
        -1, keepdim=True
    )
    return past + future.flip(2) - (weight * value.unsqueeze(2)).flatten(1, 2)


def _check_inputs(
    owner: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    normalize: bool,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        axes, dtype = tensor.dim(), tensor.dtype
        require(axes == 4, owner, f"{name} has {axes} axes", "give (batch, heads, length, width)")
        fits = tensor.is_floating_point() and dtype == query.dtype
        require(fits, owner, f"{name} is {dtype}, query {query.dtype}", "use one floating dtype for all")
    batch, heads, length, head_dim = key.shape
    shapes = f"query has shape {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    same = key.shape[:3] == value.shape[:3]
    require(same, owner, shapes, "give key and value the same batch, heads and length")
    same = query.shape[0] == batch and query.shape[3] == head_dim
    require(same, owner, shapes, "give query and key the same batch and width")
    require(heads > 0 and query.shape[1] % heads == 0, owner, shapes, "give query a multiple of key's heads")
    require(query.shape[2] > 0 and length > 0, owner, shapes, "give at least one token")
    if log_decay is not None:
        fits = log_decay.is_floating_point() and log_decay.shape in ((heads,), (batch, heads, length))
        given = f"log_decay is {log_decay.dtype} of shape {tuple(log_decay.shape)}"
        require(fits, owner, given, f"give floats of shape {(heads,)} or {(batch, heads, length)}")
    if state is not None:
        shape, dtype = (batch, heads, head_dim, value.shape[3] + normalize), statistics_dtype(value.dtype)
        given = f"the state is {state.dtype} of shape {tuple(state.shape)} with normalize={normalize}"
        require(state.shape == shape and state.dtype == dtype, owner, given, f"give {dtype} of shape {shape}")


def _check_options(
    owner: str,
    query: Tensor,
    key: Tensor,
    log_decay: Tensor | None,
    causal: bool,
    uses_state: bool,
    chunk_size: int,
) -> None:
    require(chunk_size >= 1, owner, f"chunk_size {chunk_size} is below 1", "use 64 if unsure")
    if not causal and log_decay is None:
        return
    require(
        query.shape[2] == key.shape[2],
        owner,
        lambda: f"query has length {query.shape[2]} and key {key.shape[2]}, but causal or decayed tokens are both",
        "make the lengths equal; earlier keys can be an initial_state",
    )
    if causal or log_decay is None:
        return
    given = f"log_decay of shape {tuple(log_decay.shape)}, one per token, with causal=False"
    way_out = f"give one decay per head, shape {(key.shape[1],)}, or causal=True"
    require(log_decay.dim() == 1, owner, given, way_out)
    given = "initial_state or return_state with log_decay and causal=False, which leaves no state"
    require(not uses_state, owner, given, "drop them, or use causal=True")
