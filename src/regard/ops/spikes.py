"""Spiking neurons: leaky integrate-and-fire, with a surrogate for the gradient of a spike.

    h_t = v_{t−1} + (x_t − v_{t−1}) / τ        the membrane potential leaks and takes in x
    s_t = 1 if h_t ≥ θ else 0                  it fires above the threshold
    v_t = h_t (1 − s_t)                        and is reset

A reset depends on all before it, so that the spikes are found token by token. Once they are known, the potentials are a
linear recurrence, v_t = (1 − s_t) ((1 − 1/τ) v_{t−1} + x_t / τ), and its gradients a scan. The step function has the
gradient of σ(4 (h − θ)), and none goes through the reset: "Surrogate Gradient Learning in Spiking Neural Networks",
Neftci et al., 2019, arXiv 1901.09948, with the constants of SpikingJelly, Fang et al., 2023, arXiv 2310.16620.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from regard.ops.checks import require
from regard.ops.precision import exact, statistics_dtype
from regard.ops.scan import associative_scan

_STEEPNESS = 4.0


def leaky_integrate_and_fire(
    x: Float[Tensor, "batch length width"],
    *,
    tau: float = 2.0,
    threshold: float = 1.0,
    state: Float[Tensor, "batch width"] | None = None,
) -> tuple[Float[Tensor, "batch length width"], Float[Tensor, "batch width"]]:
    """Spikes, zeros and ones in the dtype of `x`, and the potential after the last token, at least float32.

    `state` is the potential that an earlier call returned, zero by default. Half types are computed in float32.
    """
    owner = "leaky_integrate_and_fire"
    require(
        x.ndim == 3 and x.shape[1] > 0 and x.is_floating_point(),
        owner,
        lambda: f"x of shape {tuple(x.shape)} and dtype {x.dtype}",
        "give floats of shape (batch, length, width), at least one token",
    )
    require(tau > 1, owner, f"tau {tau}", "give a time constant above 1")
    precise = statistics_dtype(x.dtype)
    before = x.new_zeros(x.shape[0], x.shape[2], dtype=precise) if state is None else state
    require(
        before.shape == (x.shape[0], x.shape[2]) and before.dtype == precise,
        owner,
        lambda: f"state of shape {tuple(before.shape)} and dtype {before.dtype}, x {tuple(x.shape)}",
        lambda: f"give {precise} of shape {(x.shape[0], x.shape[2])}",
    )
    spikes, after = _fired(x.to(precise) / tau, before, 1 - 1 / tau, threshold)
    return spikes.to(x.dtype), after


@exact
def _fired(taken: Tensor, state: Tensor, leak: float, threshold: float) -> tuple[Tensor, Tensor]:
    spikes = _spikes(taken.detach(), state.detach(), leak, threshold)
    kept = 1 - spikes
    leaks, charges = associative_scan(_then, (leak * kept, kept * taken), dim=1)
    after = leaks * state.unsqueeze(1) + charges
    before = torch.cat([state.unsqueeze(1), after[:, :-1]], 1)
    soft = (_STEEPNESS * (leak * before + taken - threshold)).sigmoid()
    return spikes + (soft - soft.detach()), after[:, -1].clone()


def _then(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """v → a v + b, one after the other."""
    return left[0] * right[0], right[0] * left[1] + right[1]


@torch.library.custom_op("regard::spikes", mutates_args=())
def _spikes(taken: Tensor, state: Tensor, leak: float, threshold: float) -> Tensor:
    """The one loop over tokens, without gradients."""
    spikes, potential = torch.empty_like(taken), state.clone()
    for now, fired in zip(taken.unbind(1), spikes.unbind(1), strict=True):
        torch.add(now, potential, alpha=leak, out=potential)
        torch.ge(potential, threshold, out=fired)
        potential.masked_fill_(fired.bool(), 0)
    return spikes


@_spikes.register_fake
def _like(taken, state, leak, threshold):
    return torch.empty_like(taken)
