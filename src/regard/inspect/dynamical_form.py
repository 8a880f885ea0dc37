"""Attention, state space models and gated RNNs as one linear system. "Understanding the differences in Foundation
Models: Attention, State Space Models, and Recurrent Neural Networks", Sieber et al., 2024, arXiv 2405.15731.

    h_i = Λ_i h_{i−1} + B_i u_i,   y_i = C_i h_i + D_i u_i            Λ_i diagonal, h of n d numbers, n the expansion
    y   = Φ u + D u,   Φ_ij = C_i Λ_i … Λ_{j+1} B_j for j ≤ i        the same for each of the d channels of u

                          Λ_i                  B_i           C_i          n
    separable attention   η_{i−1} / η_i        ψ(k_i) / η_i  φ(q_i)       width of φ     weights φ(q)·ψ(k) / η
    softmax, as a series  η_{i−1} / η_i        ψ(k_i) / η_i  φ(q_i)       Σ_{m≤p} d^m    φ = ψ = [x^⊗m / √m!]_{m≤p}
    softmax, n tokens     η_{i−1} / η_i        e_i / η_i     exp(q_i·k)   n              the cache: exact at this length
    S6, SSD               exp(−Δ_i A)          Δ_i b_i       c_i          width of b     S6: channels are heads, d = 1
    qLSTM                 σ(f_i)               σ(i_i)        σ(o_i)       1              channels are heads, d = 1
    RG-LRU                a_i                  √(1 − a_i²) σ(·)  1        1              channels are heads, d = 1

u are the values. η_i is Σ_j φ(q_i)·ψ(k_j), a function of token i or 1. Softmax is separable with p = ∞ only; a larger n
holds every smaller one (zeros beside φ and ψ). What sets the classes apart is how Λ and B depend on one another: by η
in attention and by Δ in a state space model, so that SSD is attention with η_i = 1 / Δ_i where exp(−Δ_i A) =
Δ_i / Δ_{i−1}; not at all in a qLSTM, whose Λ is that of S6 where Δ = softplus(−f) and A = 1.

Cost: time and memory O(L² n) a head for Φ, O(L n d) for outputs, in float64 on the CPU; `needed` takes time O(L⁴).

Differences: none in the forms. `needed`, below which no n can give this Φ, is realisation theory and not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.inspect.state_space import (
    DynamicalForm,
    gated_form,
    linear_form,
    powers,
    selective_form,
    softmax_form,
)
from regard.nn.attention import Attention
from regard.nn.linear.fast_attention import FastMaxAttention, factors
from regard.nn.linear.hedgehog import HedgehogAttention
from regard.nn.linear.lightning import LightningAttention
from regard.nn.linear.transnormer import TransNormerAttention
from regard.ops.checks import require
from regard.ops.normalizers import Softmax, normalizer_of

__all__ = [
    "DynamicalForm",
    "dynamical_form",
    "gated_form",
    "linear_form",
    "powers",
    "selective_form",
    "softmax_form",
]

_OWNER = "dynamical_form"


def dynamical_form(module: nn.Module, x: Float[Tensor, "batch length dim"]) -> DynamicalForm:
    """The form of a causal layer of `regard.nn` on the tokens `x`, before its gate and output projection.

    Known are softmax attention, any `Attention` that does not change its forward pass, and the linear attentions
    `FastMaxAttention`, `HedgehogAttention`, `LightningAttention` and `TransNormerAttention`. Raises ValueError for
    others, and for layers that see later tokens.
    """
    kind = type(module)
    build = _builder(kind)
    if build is None:
        known = ", ".join(each.__name__ for each in _BUILDERS)
        raise ValueError(f"{_OWNER}: no form of {kind.__name__} is known; give softmax attention, {known}, or tensors")
    causal = getattr(module, "causal", True)
    require(causal, _OWNER, f"{kind.__name__} with causal=False is no recurrence", "build with causal=True")
    with torch.no_grad():
        return build(module, x)


def _softmax(module: Attention, x: Tensor) -> DynamicalForm:
    normalizer = normalizer_of(module.normalizer)
    problem = f"{type(module).__name__} has the normalizer {normalizer!r}"
    require(isinstance(normalizer, Softmax), _OWNER, problem, "give attention with softmax")
    return softmax_form(*module.project(x, None, None, None), mask=module.full_mask(None), bias=module.score_bias())


def _fast_max(module: FastMaxAttention, x: Tensor) -> DynamicalForm:
    query, key, value = module.project(x, None, None, None)
    return linear_form(factors(query, module.order), factors(key, module.order), value, normalize=True)


def _hedgehog(module: HedgehogAttention, x: Tensor) -> DynamicalForm:
    query, key, value = module.project(x, None, None, None)
    keys = module.key_map(key)
    keys = keys.over(keys.size.amax(-1, keepdim=True))
    return linear_form(module.query_map(query).scaled, keys, value, normalize=True)


def _lightning(module: LightningAttention, x: Tensor) -> DynamicalForm:
    module.check_tokens(x, None, None, None, takes_positions=False)
    module.check_width(x, module.dim)
    query, key, value = module._project(x)
    if isinstance(module, TransNormerAttention):
        query, key = module._turn(query, key, torch.arange(x.shape[1], device=x.device))
    return linear_form(query, key, value, log_decay=module.log_decay)


_Builder = Callable[[Any, Tensor], DynamicalForm]
_BUILDERS: dict[type[nn.Module], _Builder] = {
    FastMaxAttention: _fast_max,
    HedgehogAttention: _hedgehog,
    LightningAttention: _lightning,
    TransNormerAttention: _lightning,
}


def _builder(kind: type[nn.Module]) -> _Builder | None:
    of_softmax = issubclass(kind, Attention) and kind.forward is Attention.forward
    return _softmax if of_softmax else _BUILDERS.get(kind)
