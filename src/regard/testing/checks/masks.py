"""Packed sequences and mask expressions."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.masks import Causal, Dense, Padding, Segments, Sinks, Window
from regard.testing.cases import LONG, Case, Inputs
from regard.testing.compare import assert_same, assert_zero, gradients, weighted_sum
from regard.testing.outcome import assert_finite_outcome, outcome
from regard.testing.proof import proves, told_apart


def _packed(case: Case) -> bool:
    return case.takes_packed


def _packed_like_alone(case: Case) -> bool:
    return case.takes_packed and not case.aligned


def _any_mask(case: Case) -> bool:
    return case.contract.any_mask


class Split(NamedTuple):
    """Lengths of the sequences packed in one row, as queries and as keys."""

    queries: list[int]
    keys: list[int]

    @classmethod
    def of(cls, inputs: Inputs, first: int) -> Split:
        """Three sequences, one of them a single token."""
        return cls(*([first, 1, total - first - 1] for total in (inputs.x.shape[1], inputs.source.shape[1])))


@proves(_packed)
def packed_sequences_are_isolated(case: Case) -> None:
    """No output has a gradient for another sequence packed in its row."""
    inputs = case.inputs(batch=2).with_gradients()
    split = Split.of(inputs, 4)
    starts = [0, *accumulate(split.keys)]
    for mode, module in case.modes().items():
        out = case.run(module, inputs, mask=_segments(inputs, [split, split]))
        for index, piece in enumerate(out.split(split.queries, dim=1)):
            (gradient,) = gradients(weighted_sum(piece), [inputs.source])
            gradient[:, starts[index] : starts[index + 1]] = 0.0
            what = f"{mode}: gradient of other sequences in sequence {index} of lengths {split.keys}"
            assert_zero(gradient, what)


@proves(_packed_like_alone)
def packed_equals_alone(case: Case) -> None:
    """Several sequences packed in one row give what each gives alone."""
    module = case.build()
    for inputs in (case.inputs(batch=2), case.inputs(LONG, batch=2)):
        one, other = Split.of(inputs, 3), Split.of(inputs, 7)
        for splits in ([one], [one, other]):
            out = case.run(module, inputs, mask=_segments(inputs, splits))
            for sample in range(2):
                split = splits[sample % len(splits)]
                pieces = _pieces(inputs.select(slice(sample, sample + 1)), split)
                alone = torch.cat([case.run(module, piece) for piece in pieces], dim=1)
                assert_same(out[sample : sample + 1], alone, f"sample {sample}, packed with {split}")


@proves(_any_mask)
def mask_is_obeyed(case: Case) -> None:
    """No output depends on a token its query may not look at; exact mechanisms lose no other token either."""
    inputs = case.inputs(7).with_gradients()
    batch, queries, keys = case.sizes(inputs)
    allowed = torch.rand(batch, 1, queries, keys) < 0.5
    allowed[:, :, 0], allowed[:, :, -1] = False, True
    mask = Dense(allowed)
    # A query is made of its own token, whatever it may look at.
    others = torch.ones(queries, keys, dtype=torch.bool) if case.cross else ~torch.eye(queries, dtype=torch.bool)
    for mode, module in case.modes().items():
        with told_apart(mode):
            full = outcome(case, module, {"mask": mask}, inputs=inputs)
            assert_finite_outcome(full, "with a row that may look at nothing")
            found = _dependence(case.run(module, inputs, mask=mask), inputs.source)
            assert_zero(found * (~allowed[:, 0] & others), "dependence (sample, query, key) on forbidden tokens")
    if case.contract.exact:
        module = case.build()
        found, free = (_dependence(case.run(module, inputs, mask=given), inputs.source) for given in (mask, None))
        lost = (free > 1e-6) & allowed[:, 0] & others & (found == 0)
        assert not lost.any(), f"{int(lost.sum())} allowed pairs (sample, query, key) are lost"


@proves(_any_mask)
def mask_expressions_equal_dense_masks(case: Case) -> None:
    """An expression gives what the dense tensor of the same pairs gives, and a mask of ones what no mask gives."""
    module = case.build()
    for inputs in (case.inputs(), case.inputs(LONG)):
        batch, queries, keys = case.sizes(inputs)
        padding = Padding(torch.tensor([keys, 2 * keys // 3, 1]))
        for mask in (Causal() & (Window(2) | Sinks(1)), ~Window(1, 2), Window(4) & padding | Sinks(1)):
            dense = Dense(mask.dense(queries, keys, batch=batch).contiguous())
            out = case.run(module, inputs, mask=mask)
            assert_same(out, case.run(module, inputs, mask=dense), f"output under {mask!r}")
        ones = Dense(torch.ones(queries, keys, dtype=torch.bool))
        assert_same(case.run(module, inputs, mask=ones), case.run(module, inputs), "output under a mask of ones")


def _segments(inputs: Inputs, splits: list[Split]) -> Segments:
    """The mask for one split of all samples, or one per sample."""

    def ids(lengths: list[list[int]]) -> Tensor:
        rows = torch.stack([Segments.from_lengths(row).ids for row in lengths])
        return rows[0] if len(rows) == 1 else rows

    keys = ids([split.keys for split in splits])
    return Segments(keys) if inputs.context is None else Segments(keys, ids([split.queries for split in splits]))


def _pieces(inputs: Inputs, split: Split) -> list[Inputs]:
    xs = inputs.x.split(split.queries, dim=1)
    if inputs.context is None:
        return [Inputs(x) for x in xs]
    return [Inputs(*pair) for pair in zip(xs, inputs.context.split(split.keys, dim=1), strict=True)]


def _dependence(out: Tensor, source: Tensor) -> Tensor:
    """Size of the gradient of every output for every token looked at (batch, queries, keys)."""
    rows = []
    for query in range(out.shape[1]):
        (gradient,) = gradients(weighted_sum(out[:, query]), [source])
        rows.append(gradient.abs().amax(-1))
    return torch.stack(rows, dim=1)
