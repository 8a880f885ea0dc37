"""No leak from the future: by perturbation and by gradient, alone and with a padding mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from regard.ops.masks import Padding
from regard.testing.cases import LONG, Case, Inputs
from regard.testing.compare import assert_same, assert_zero, gradients, tolerance, weighted_sum
from regard.testing.proof import proves, told_apart

LengthsOf = Callable[[int], Tensor]


class Future(NamedTuple):
    """Tokens from `cut` on of input `name`, which the outputs before `unaffected` must not see."""

    name: str
    cut: int
    unaffected: int


def _causal(case: Case) -> bool:
    return case.causal


def _causal_padded(case: Case) -> bool:
    return case.causal and case.takes_padding


@proves(_causal)
def future_changes_nothing(case: Case) -> None:
    """Changing a token, or all tokens, after a position leaves the outputs up to it as they were (causal patterns)."""
    _by_perturbation(case, case.inputs())
    _by_perturbation(case, case.inputs(LONG, batch=1))  # what samples tell each other, the short ones show
    if case.cross:
        _by_perturbation(case, case.inputs(context_length=5))


@proves(_causal)
def future_has_no_gradient(case: Case) -> None:
    """Outputs up to a position have no gradient for later tokens, in eval mode and in training with dropout."""
    _by_gradient(case)


@proves(_causal_padded)
def future_changes_nothing_with_padding(case: Case) -> None:
    """The same by perturbation when a padding mask is given, with one full sample and shorter ones."""
    _by_perturbation(case, case.inputs(), _lengths)
    _by_perturbation(case, case.inputs(LONG), _lengths)


@proves(_causal_padded)
def future_has_no_gradient_with_padding(case: Case) -> None:
    """The same by gradient when a padding mask is given."""
    _by_gradient(case, _lengths)


@proves(lambda case: case.pattern is not None and not case.causal)
def later_tokens_are_seen(case: Case) -> None:
    """Without causality some output depends on a later token (noncausal patterns)."""
    inputs = case.inputs().with_gradients()
    out = case.tokens(case.run(case.build(), inputs))
    for future in _futures(case, inputs):
        gradient = _gradient(case, inputs, out, future)
        if gradient.abs().max() > tolerance(gradient.dtype):
            return
    raise AssertionError("no output depends on any later token, though the pattern is noncausal")


def _lengths(keys: int) -> Tensor:
    return torch.tensor([keys, max(1, keys // 2), max(1, keys - 2)])


def _by_perturbation(case: Case, inputs: Inputs, lengths_of: LengthsOf | None = None) -> None:
    module = case.build()
    arguments, real = _padding(case, inputs, lengths_of)
    before = case.tokens(case.run(module, inputs, **arguments)) * real
    for future in _futures(case, inputs):
        for scope in ("tokens from", "token"):
            changed = _changed(case, inputs, future, only_one=scope == "token")
            after = case.tokens(case.run(module, changed, **arguments)) * real
            what = f"outputs before position {future.unaffected} when {future.name} changes in {scope} {future.cut}"
            assert_same(after[:, : future.unaffected], before[:, : future.unaffected], what)


def _by_gradient(case: Case, lengths_of: LengthsOf | None = None) -> None:
    inputs = case.inputs().with_gradients()
    arguments, real = _padding(case, inputs, lengths_of)
    for mode, module in case.modes().items():
        out = case.tokens(case.run(module, inputs, **arguments)) * real
        for future in _futures(case, inputs):
            what = f"gradient of {future.name} from position {future.cut} in outputs before {future.unaffected}"
            with told_apart(mode):
                assert_zero(_gradient(case, inputs, out, future), what)


def _gradient(case: Case, inputs: Inputs, out: Tensor, future: Future) -> Tensor:
    """What the outputs before a position see of the future."""
    source = getattr(inputs, future.name)
    loss = weighted_sum(out[:, : future.unaffected])
    (gradient,) = gradients(loss, [source])
    return (case.tokens(gradient) if future.name == "x" else gradient)[:, future.cut :]


def _padding(case: Case, inputs: Inputs, lengths_of: LengthsOf | None) -> tuple[dict[str, object], Tensor]:
    """The padding mask as arguments, and which outputs stand for real tokens."""
    _, queries, keys = case.sizes(inputs)
    if lengths_of is None:
        return {}, torch.ones(1, queries, 1, dtype=case.dtype)
    lengths = lengths_of(keys)
    real = torch.arange(queries) < (lengths[:, None] if inputs.context is None else queries)
    return {"mask": Padding(lengths)}, real.unsqueeze(-1).to(case.dtype)


def _futures(case: Case, inputs: Inputs) -> Iterator[Future]:
    """Every position of short inputs, a few of long ones."""
    _, queries, keys = case.sizes(inputs)
    cuts = range(1, queries) if queries < LONG // 2 else (1, 2, 32, 64, 128, queries - 1)
    for cut in cuts:
        yield Future("x", cut, cut)
        # Query i stands at key keys − queries + i.
        if inputs.context is not None and cut + keys - queries >= 0:
            yield Future("context", cut + keys - queries, cut)


def _changed(case: Case, inputs: Inputs, future: Future, *, only_one: bool) -> Inputs:
    source = getattr(inputs, future.name)
    tokens = (case.tokens(source) if future.name == "x" else source).clone()
    stop = future.cut + 1 if only_one else tokens.shape[1]
    tokens[:, future.cut : stop] = 3 * torch.randn_like(tokens[:, future.cut : stop])
    changed = case.untokens(tokens, source) if future.name == "x" else tokens
    return inputs._replace(**{future.name: changed})
