"""Samples do not see each other; permutations do what is declared; positions are heard."""

from __future__ import annotations

import torch

from regard.testing.cases import Case
from regard.testing.compare import assert_differs, assert_same, assert_zero, gradients, weighted_sum
from regard.testing.proof import proves


@proves()
def samples_are_independent(case: Case) -> None:
    """A batch gives for each sample what that sample alone gives, and no sample has a gradient in another's output."""
    module, inputs = case.build(), case.inputs().with_gradients()
    out = case.run(module, inputs)
    for sample in range(out.shape[0]):
        alone = case.run(module, inputs.select(slice(sample, sample + 1)))
        assert_same(out[sample : sample + 1], alone, f"sample {sample} in a batch of {out.shape[0]}")
        for name, gradient in zip(
            ("x", "context"), gradients(weighted_sum(out[sample]), inputs.tensors()), strict=False
        ):
            others = torch.arange(out.shape[0]) != sample
            assert_zero(gradient[others], f"gradient of {name} of other samples in sample {sample}")


@proves()
def order_of_samples_is_irrelevant(case: Case) -> None:
    """Shuffling the batch shuffles the output."""
    module, inputs = case.build(), case.inputs()
    order = torch.tensor([2, 0, 1])
    shuffled = type(inputs)(*(tensor[order] for tensor in inputs.tensors()))
    assert_same(case.run(module, shuffled), case.run(module, inputs)[order], "output of the shuffled batch")


def _permutes(case: Case) -> bool:
    return case.contract.permutation is not None and not case.causal


@proves(_permutes)
def permutation_of_tokens_does_as_declared(case: Case) -> None:
    """Permuting x permutes the output (equivariant) or leaves it (invariant); permuting the context leaves it."""
    module, inputs = case.build(), case.inputs()
    tokens = case.tokens(inputs.x)
    order = torch.randperm(tokens.shape[1])
    permuted = inputs._replace(x=case.untokens(tokens[:, order], inputs.x))
    expected, actual = (case.tokens(case.run(module, given)) for given in (inputs, permuted))
    if case.contract.permutation == "equivariant":
        expected = expected[:, order]
    assert_same(actual, expected, f"output for permuted x, declared {case.contract.permutation}")
    if inputs.context is not None:
        context = inputs.context[:, torch.randperm(inputs.context.shape[1])]
        out = case.run(module, inputs._replace(context=context))
        assert_same(out, case.run(module, inputs), "output for a permuted context")


def _positions(case: Case) -> bool:
    return case.contract.positions and case.contract.input == "tokens"


@proves(_positions)
def positions_are_heard(case: Case) -> None:
    """Positions default to 0, 1, 2, …, may be given per sample, and change the output when they change."""
    module, inputs = case.build(), case.inputs()
    batch, length = inputs.x.shape[:2]
    positions = torch.arange(length)
    out = case.run(module, inputs, positions=positions)
    if not case.cross:
        assert_same(out, case.run(module, inputs), "output for positions 0, 1, 2, … and for none")
    per_sample = torch.stack([positions * (sample + 1) for sample in range(batch)])
    spread = case.run(module, inputs, positions=per_sample)
    assert_differs(spread[1:], out[1:], "output for positions twice as far apart")
    for sample in range(batch):
        alone = case.run(module, inputs.select(slice(sample, sample + 1)), positions=per_sample[sample])
        assert_same(spread[sample : sample + 1], alone, f"positions of sample {sample}, given per sample")
