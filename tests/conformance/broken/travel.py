"""What does not travel: through copies, devices, seeds and compilers."""

from __future__ import annotations

from typing import Any

import torch
from correct import Correct
from torch import Tensor

from broken.declaring import caught_by


@caught_by("seed_determines_everything")
class SetsItsOwnSeed(Correct):
    """Makes itself reproducible at the cost of everybody else."""

    def extend(self, **factory: Any) -> None:
        torch.manual_seed(0)


@caught_by("eval_leaves_global_state")
class TurnsGradientsOff(Correct):
    """Changes a global setting and leaves it so."""

    def combine(self, mixed: Tensor) -> Tensor:
        torch.set_float32_matmul_precision("medium")
        return super().combine(mixed)


@caught_by("copies_are_equal_and_independent")
class CannotBePickled(Correct):
    """Holds a lambda."""

    def extend(self, **factory: Any) -> None:
        self.activation = lambda x: x


@caught_by("compiled_equals_eager")
class LooksAtANumber(Correct):
    """Takes a decision by a value, in the middle of the graph."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x * 2 if float(x.sum()) > 1e9 else x)


@caught_by("exported_equals_eager")
class GoesThroughNumpy(Correct):
    """Leaves torch for a moment."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x + 0 * torch.from_numpy(x.detach().numpy()))


@caught_by("constructor_takes_device_and_dtype")
class IgnoresTheDevice(Correct):
    """Makes a buffer where it likes."""

    def extend(self, **factory: Any) -> None:
        self.register_buffer("steps", torch.zeros(3))
