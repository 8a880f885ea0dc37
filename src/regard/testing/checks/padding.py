"""Padding: what stands beyond a length does not exist."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.ops.masks import Padding
from regard.testing.cases import LONG, Case, Inputs
from regard.testing.compare import assert_same, assert_zero, gradients, weighted_sum
from regard.testing.outcome import assert_finite_outcome, outcome
from regard.testing.proof import proves, told_apart


def _padded(case: Case) -> bool:
    return case.takes_padding


def _padded_like_alone(case: Case) -> bool:
    return case.takes_padding and not case.aligned


@proves(_padded)
def padding_is_invisible(case: Case) -> None:
    """What stands beyond a length changes no output before it, by value and by gradient."""
    inputs = case.inputs().with_gradients()
    lengths = _lengths(inputs)
    mask, beyond = Padding(lengths), _beyond(lengths, inputs.source)
    for mode, module in case.modes().items():
        out = _real_outputs(inputs, lengths, case.run(module, inputs, mask=mask))
        (gradient,) = gradients(weighted_sum(out), [inputs.source])
        assert_zero(gradient * beyond, f"{mode}: gradient beyond the lengths")
    module = case.build()
    out = _real_outputs(inputs, lengths, case.run(module, inputs, mask=mask))
    # The larger one shows a mask that adds a constant instead of minus infinity.
    for size in (1.0, 1e12):
        garbage = torch.where(beyond, size * torch.randn_like(inputs.source), inputs.source).detach()
        changed = case.run(module, inputs.with_source(garbage), mask=mask)
        what = f"output before the lengths with values of {size:g} beyond them"
        assert_same(_real_outputs(inputs, lengths, changed), out, what)


@proves(_padded_like_alone)
def padded_equals_alone(case: Case) -> None:
    """A padded batch gives for each sequence what that sequence alone gives."""
    module = case.build()
    for inputs in (case.inputs(), case.inputs(LONG)):
        lengths = _lengths(inputs)
        out = case.run(module, inputs, mask=Padding(lengths))
        for sample, length in enumerate(lengths.tolist()):
            one = inputs.select(slice(sample, sample + 1))
            alone = case.run(module, one.with_source(one.source[:, :length]))
            what = f"sample {sample} of lengths {lengths.tolist()}"
            assert_same(out[sample : sample + 1, : alone.shape[1]], alone, what)


@proves(_padded)
def full_padding_mask_is_no_mask(case: Case) -> None:
    """Lengths that leave nothing out change nothing."""
    module, inputs = case.build(), case.inputs()
    batch, _, keys = case.sizes(inputs)
    out = case.run(module, inputs, mask=Padding(torch.full((batch,), keys)))
    assert_same(out, case.run(module, inputs), "output with full lengths")


@proves(_padded)
def empty_sample_stays_finite(case: Case) -> None:
    """A sample that is nothing but padding gives finite outputs and gradients and disturbs no other sample."""
    inputs = case.inputs()
    keys = case.sizes(inputs).keys
    mask = Padding(torch.tensor([keys, 0, keys]))
    for mode, module in case.modes().items():
        with told_apart(mode):
            assert_finite_outcome(outcome(case, module, {"mask": mask}), "with a sample of length 0")
    module = case.build()
    full = case.run(module, inputs)
    assert_same(case.run(module, inputs, mask=mask)[::2], full[::2], "output of full samples beside an empty one")


def _lengths(inputs: Inputs) -> Tensor:
    keys = inputs.source.shape[1]
    return torch.tensor([2 * keys // 3, keys, 1])


def _beyond(lengths: Tensor, source: Tensor) -> Tensor:
    return (torch.arange(source.shape[1]) >= lengths[:, None])[..., None]


def _real_outputs(inputs: Inputs, lengths: Tensor, out: Tensor) -> Tensor:
    """Zero where an output stands for padding."""
    return out if inputs.context is not None else out.masked_fill(_beyond(lengths, out), 0.0)
