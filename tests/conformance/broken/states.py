"""Decoding that differs from forward, and states that are not values or do not grow as declared."""

from __future__ import annotations

from typing import Any

import torch
from correct import Correct
from torch import Tensor

from broken.declaring import caught_by

State = tuple[Tensor, Tensor]


@caught_by("step_equals_forward", "segments_equal_forward")
class StepsOneTokenShort(Correct):
    """Loses its oldest key at every step."""

    def step(self, x: Tensor, state: State) -> Any:
        out, (key, value) = super().step(x, state)
        return out, (key[:, :, 1:], value[:, :, 1:])


@caught_by("segments_equal_forward")
class SegmentsSeeThemselvesWhole(Correct):
    """Right token by token, but a segment sees its own future."""

    def step(self, x: Tensor, state: State) -> Any:
        query, key, value = self.heads_of(x, None, None)
        key, value = torch.cat([state[0], key], 2), torch.cat([state[1], value], 2)
        return self.combine(self.mix(query, key, value, None)), (key, value)


@caught_by("states_are_values")
class WritesIntoItsState(Correct):
    """Appends to the list it was given."""

    def init_state(self, batch: int) -> Any:
        return [super().init_state(batch)]

    def step(self, x: Tensor, state: list[State]) -> Any:
        out, state[0] = super().step(x, state[0])
        return out, state


@caught_by("states_are_values", "step_equals_forward")
class CountsInTheModule(Correct):
    """Counts its steps in the module instead of the state."""

    seen = 0

    def step(self, x: Tensor, state: State) -> Any:
        self.seen += x.shape[1]
        out, state = super().step(x, state)
        return out * (1 + (self.seen > 20)), state


@caught_by("samples_step_independently")
class StepsMixTheBatch(Correct):
    """Right for the whole batch from the start; a single sample of it is centred differently."""

    def step(self, x: Tensor, state: State) -> Any:
        out, state = super().step(x, state)
        return out - out.mean(0, keepdim=True), state


@caught_by("state_grows_as_declared", state="constant")
class GrowsUnderAConstantClaim(Correct):
    """Keeps every key and declares that it does not."""


@caught_by("state_grows_as_declared")
class KeepsEveryState(Correct):
    """Keeps all earlier states too: bytes grow with the square of the tokens."""

    def init_state(self, batch: int) -> Any:
        return (super().init_state(batch),)

    def step(self, x: Tensor, state: tuple[State, ...]) -> Any:
        out, latest = super().step(x, state[-1])
        return out, (*state, latest)


@caught_by("state_grows_as_declared")
class ConstantUnderALinearClaim(Correct):
    """Keeps a running sum: nothing grows."""

    def init_state(self, batch: int) -> Any:
        return self.qkv.weight.new_zeros(batch, 1, self.dim)

    def step(self, x: Tensor, state: Tensor) -> Any:
        total = state + x.cumsum(1)
        return self.output(total), total[:, -1:].clone()


@caught_by("state_grows_as_declared", state="constant")
class KeepsAViewOfEverything(Correct):
    """A window of 4 keys, as a view that keeps all of them alive."""

    def step(self, x: Tensor, state: State) -> Any:
        out, (key, value) = super().step(x, state)
        return out, (key[:, :, -4:], value[:, :, -4:])


@caught_by("misfit_steps_are_refused")
class DropsSamplesOfItsState(Correct):
    """Cuts the state to the batch of the tokens it is given."""

    def step(self, x: Tensor, state: State) -> Any:
        key, value = state
        return super().step(x, (key[: x.shape[0]], value[: x.shape[0]]))
