"""Prefix scans against the sequential definition, for operators that commute and that do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.ops import associative_scan


def sequential(combine, elements, dim, starts=None):
    """Token by token; `starts` is (length,)."""
    tokens = list(zip(*(element.split(1, dim) for element in elements), strict=True))
    results = [tokens[0]]
    for index, token in enumerate(tokens[1:], 1):
        again = starts is not None and bool(starts[index])
        results.append(token if again else combine(results[-1], token))
    return tuple(torch.cat(parts, dim) for parts in zip(*results, strict=True))


def recurrence(left, right):
    """h → a h + b, one after the other."""
    (a, b), (c, d) = left, right
    return a * c, c * b + d


def matrices(left, right):
    """2×2 matrices, the later one on the left."""
    return ((right[0].flatten(2).unflatten(2, (2, 2)) @ left[0].flatten(2).unflatten(2, (2, 2))).reshape_as(left[0]),)


def softmax_sums(left, right):
    """(maximum, sum, weighted sum) of two sets; the last has an axis more."""
    top = torch.maximum(left[0], right[0])
    old, new = (left[0] - top).exp(), (right[0] - top).exp()
    return top, old * left[1] + new * right[1], old.unsqueeze(-1) * left[2] + new.unsqueeze(-1) * right[2]


def first_of_all(left, right):
    """Associative, and as little commutative as can be."""
    return left


def draw(name: str, length: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if name == "recurrence":
        return normal(2, length, 3).sigmoid(), normal(2, length, 3)
    if name == "matrices":
        return (torch.linalg.qr(normal(2, length, 2, 2)).Q.flatten(2),)
    if name == "softmax_sums":
        return 30 * normal(2, length), torch.ones(2, length, dtype=torch.float64), normal(2, length, 3)
    return (normal(2, length, 3),)


OPERATORS = {
    "recurrence": recurrence,
    "matrices": matrices,
    "softmax_sums": softmax_sums,
    "first_of_all": first_of_all,
}


@given(
    name=st.sampled_from(sorted(OPERATORS)), length=st.integers(1, 70), reverse=st.booleans(), seed=st.integers(0, 9)
)
@settings(deadline=None, max_examples=80)
def test_a_scan_is_its_sequential_definition(name, length, reverse, seed):
    combine, elements = OPERATORS[name], draw(name, length, seed)
    found = associative_scan(combine, elements, dim=1, reverse=reverse)
    if reverse:
        flipped = sequential(combine, tuple(element.flip(1) for element in elements), 1)
        wanted = tuple(element.flip(1) for element in flipped)
    else:
        wanted = sequential(combine, elements, 1)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@given(name=st.sampled_from(sorted(OPERATORS)), starts=st.lists(st.booleans(), min_size=1, max_size=40))
@settings(deadline=None, max_examples=40)
def test_a_scan_begins_anew_at_starts(name, starts):
    combine, elements, starts = OPERATORS[name], draw(name, len(starts)), torch.tensor(starts)
    found = associative_scan(combine, elements, dim=1, starts=starts[None])
    for a, b in zip(found, sequential(combine, elements, 1, starts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["recurrence", "matrices", "softmax_sums"])
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_gradients_are_those_of_the_sequential_definition(name, length):
    combine = OPERATORS[name]
    elements = tuple(element.requires_grad_() for element in draw(name, length))
    found, wanted = associative_scan(combine, elements, dim=1), sequential(combine, elements, 1)
    gradients = [
        torch.autograd.grad(sum(out.sin().sum() for out in outputs), elements, materialize_grads=True)
        for outputs in (found, wanted)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
def test_first_and_second_derivatives_are_right(reverse):
    elements = tuple(element[:1, :, :1].clone().requires_grad_() for element in draw("recurrence", 5))

    def scan(*elements):
        return associative_scan(recurrence, elements, dim=1, reverse=reverse, starts=torch.arange(5)[None] == 3)

    assert torch.autograd.gradcheck(scan, elements)
    assert torch.autograd.gradgradcheck(scan, elements)


def test_the_operator_is_applied_less_than_twice_per_token_in_logarithmically_many_calls():
    calls = []

    def counted(left, right):
        calls.append(left[0].shape[1])
        return recurrence(left, right)

    associative_scan(counted, draw("recurrence", 1000), dim=1)
    assert sum(calls) < 2 * 1000
    assert len(calls) <= 3 * 10


def test_the_operator_itself_is_the_step():
    elements = draw("recurrence", 9)
    before = associative_scan(recurrence, tuple(element[:, :8] for element in elements), dim=1)
    after = recurrence(tuple(state[:, -1:] for state in before), tuple(element[:, 8:] for element in elements))
    for a, b in zip(after, associative_scan(recurrence, elements, dim=1), strict=True):
        torch.testing.assert_close(a, b[:, -1:], rtol=1e-12, atol=1e-12)


def test_any_axis_can_be_scanned():
    elements = draw("recurrence", 6)
    turned = associative_scan(recurrence, tuple(element.movedim(1, 0) for element in elements), dim=0)
    for a, b in zip(turned, associative_scan(recurrence, elements, dim=1), strict=True):
        assert torch.equal(a.movedim(0, 1), b)


@pytest.mark.parametrize("length", [1, 13])
def test_a_compiled_scan_is_one_graph_and_gives_the_same(length):
    torch._dynamo.reset()
    elements = tuple(element.requires_grad_() for element in draw("softmax_sums", length))

    def scan(*elements):
        return associative_scan(softmax_sums, elements, dim=1)

    results = [run(*elements) for run in (scan, torch.compile(scan, fullgraph=True, backend="aot_eager"))]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    gradients = [torch.autograd.grad(out[2].sum(), elements, materialize_grads=True) for out in results]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"elements": torch.ones(2, 3)}, "elements is a Tensor"),
        ({"elements": ()}, "elements is a tuple"),
        ({"dim": -1}, "dim -1"),
        ({"dim": 2}, "dim 2"),
        ({"elements": (torch.ones(2, 3), torch.ones(2, 4))}, "along axis 1"),
        ({"elements": (torch.ones(2, 0),)}, "along axis 1"),
        ({"starts": torch.ones(3, dtype=torch.bool)}, r"starts of shape \(3,\)"),
        ({"starts": torch.ones(1, 3)}, "dtype torch.float32"),
        ({"combine": lambda left, right: (left[0].sum(),)}, "combine made"),
    ],
)
def test_misfits_are_refused(arguments, message):
    given = {"combine": lambda left, right: left, "elements": (torch.ones(2, 3),), "dim": 1, **arguments}
    with pytest.raises(ValueError, match=message):
        associative_scan(given.pop("combine"), given.pop("elements"), **given)
