"""Slot attention is the authors' module, its formulas, and a competition for inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from regard.nn import SlotAttention
from regard.nn.sets.slot_attention import InitialSlots
from regard.ops.masks import Padding, Segments
from regard.testing.compare import weighted_sum

DOUBLE = torch.float64
GOLDEN = Path(__file__).parents[1] / "golden" / "slot_attention.safetensors"
DIM, SLOTS, INPUTS = 6, 4, 9
AUTHORS = {
    "context_norm.weight": "norm_inputs.gamma",
    "context_norm.bias": "norm_inputs.beta",
    "slot_norm.weight": "norm_slots.gamma",
    "query.weight": "project_q.kernel",
    "key.weight": "project_k.kernel",
    "value.weight": "project_v.kernel",
    "cell.weight_ih": "gru.kernel",
    "cell.weight_hh": "gru.rec",
    "mlp.0.weight": "norm_mlp.gamma",
    "mlp.0.bias": "norm_mlp.beta",
    "mlp.1.weight": "mlp.layers.0.kernel",
    "mlp.1.bias": "mlp.layers.0.bias",
    "mlp.3.weight": "mlp.layers.1.kernel",
    "mlp.3.bias": "mlp.layers.1.bias",
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def layer(**options: object) -> SlotAttention:
    """With weights that are large enough for slots to differ."""
    torch.manual_seed(0)
    made = SlotAttention(DIM, **{"dtype": DOUBLE, **options})
    with torch.no_grad():
        made.query.weight.mul_(3)
    return made


def reset_then_candidate(gates: Tensor) -> Tensor:
    """Keras's gates z, r, h, one after the other in the last axis, as torch's r, z, n in the first."""
    update, reset, candidate = gates.chunk(3, dim=-1)
    return torch.cat([reset, update, candidate], dim=-1)


def test_output_and_gradients_are_those_of_the_authors_module():
    golden = {
        name.removeprefix("module."): value for name, value in load_file(GOLDEN).items() if name.startswith("module.")
    }
    first = InitialSlots(SLOTS, DIM, dtype=DOUBLE)
    ours = SlotAttention(DIM, iterations=3, hidden_dim=10, context_dim=5, dtype=DOUBLE)
    for norm in (ours.context_norm, ours.slot_norm, ours.mlp[0]):
        norm.eps = 1e-3

    def authors(name: str) -> Tensor:
        value = golden[name]
        if "gru" in name:
            value = reset_then_candidate(value)
        return value.mT if value.ndim == 2 else value

    parameters = dict(ours.named_parameters())
    with torch.no_grad():
        for mine, theirs in AUTHORS.items():
            parameters[mine].copy_(authors(theirs))
        for row, mine in enumerate(("cell.bias_ih", "cell.bias_hh")):
            parameters[mine].copy_(reset_then_candidate(golden["gru.bias"])[row])
        first.mean.copy_(golden["slots_mu"][0])
        first.log_deviation.copy_(golden["slots_log_sigma"][0])
    x = golden["x"].requires_grad_()
    out = ours(first.mean + first.log_deviation.exp() * golden["noise"], x)
    assert_close(out, golden["out"], rtol=1e-12, atol=1e-12)
    learned = [x, first.mean, first.log_deviation, *parameters.values()]
    found = torch.autograd.grad(out, learned, golden["seed"])
    wanted = {
        "cell.bias_ih": reset_then_candidate(golden["grad.gru.bias"])[0],
        "cell.bias_hh": reset_then_candidate(golden["grad.gru.bias"])[1],
        **{mine: authors(f"grad.{theirs}") for mine, theirs in AUTHORS.items()},
    }
    expected = [golden[f"grad.{name}"] for name in ("x", "slots_mu", "slots_log_sigma")]
    expected = [expected[0], expected[1][0], expected[2][0], *(wanted[name] for name in parameters)]
    for ours_gradient, theirs_gradient in zip(found, expected, strict=True):
        assert_close(ours_gradient, theirs_gradient, rtol=1e-9, atol=1e-12)


def test_the_bias_left_out_has_no_effect_in_the_authors_code():
    golden = load_file(GOLDEN)
    assert golden["module.norm_slots.beta"].abs().min() > 0
    assert golden["module.grad.norm_slots.beta"].abs().max() < 1e-14


def one_iteration(made: SlotAttention, slots: Tensor, inputs: Tensor) -> Tensor:
    """The paper's algorithm for one sample, slot by slot."""
    normed = F.layer_norm(inputs, inputs.shape[-1:])
    key, value = normed @ made.key.weight.mT, normed @ made.value.weight.mT
    query = F.layer_norm(slots, (DIM,)) @ made.query.weight.mT
    shares = (query @ key.mT / DIM**0.5).exp()
    shares = shares / shares.sum(0, keepdim=True)
    after = []
    for slot, share in zip(slots, shares, strict=True):
        weights = (share + 1e-8) / (share + 1e-8).sum()
        state = made.cell((weights @ value)[None], slot[None])[0]
        after.append(state + made.mlp[3](made.mlp[1](F.layer_norm(state, (DIM,))).relu()))
    return torch.stack(after)


def test_iterations_are_the_papers_algorithm():
    made = layer(iterations=3, context_dim=5)
    slots, inputs = drawn(SLOTS, DIM), drawn(INPUTS, 5, seed=1)
    expected = slots
    for _ in range(3):
        expected = one_iteration(made, expected, inputs)
    assert_close(made(slots[None], inputs[None])[0], expected)


def test_slots_share_every_input_between_them():
    made = layer()
    slots, inputs = drawn(2, SLOTS, DIM), drawn(2, INPUTS, DIM, seed=1)
    shares = made.shares(slots, inputs)
    assert_close(shares.sum(1), torch.ones(2, INPUTS, dtype=DOUBLE))
    # The last iteration of `forward` reads the inputs by just these shares.
    before = layer(iterations=2)(slots, inputs)
    _, value = made.project(before, inputs, None, None)
    weights = shares + 1e-8
    won = weights / weights.sum(-1, keepdim=True) @ value[:, 0]
    state = made.cell(won.flatten(0, 1), before.flatten(0, 1)).view_as(before)
    assert_close(state + made.mlp(state), made(slots, inputs))


def test_what_one_slot_wins_the_others_lose():
    """A slot that comes to ask for an input takes it from the others; softmax over inputs would leave theirs alone."""
    made = layer(iterations=1)
    slots, inputs = drawn(1, SLOTS, DIM), drawn(1, INPUTS, DIM, seed=1)
    before = made.shares(slots, inputs)
    slots[0, 0] = drawn(DIM, seed=2) * 5
    change = made.shares(slots, inputs) - before
    assert_close(change[:, 1:].sum(1), -change[:, 0])
    assert (change[:, 1:].abs() > 1e-4).any()


def test_one_slot_has_no_competitor_and_reads_the_mean():
    made = layer(iterations=1)
    slots, inputs = drawn(1, 1, DIM), drawn(1, INPUTS, DIM, seed=1)
    _, value = made.project(slots, inputs, None, None)
    state = made.cell(value[:, 0].mean(1), slots[:, 0])
    assert_close(made(slots, inputs)[:, 0], state + made.mlp(state))


def test_equal_slots_stay_equal():
    """Slots are exchangeable: nothing but where they start tells them apart."""
    slots, inputs = drawn(1, 1, DIM).expand(1, SLOTS, DIM), drawn(1, INPUTS, DIM, seed=1)
    out = layer()(slots, inputs)
    assert_close(out, out[:, :1].expand_as(out))


def test_segments_keep_competitions_apart():
    made = layer()
    slots, inputs = drawn(1, 5, DIM), drawn(1, 9, DIM, seed=1)
    shares = made.shares(slots, inputs, mask=Segments(torch.arange(9) // 6, torch.arange(5) // 3))
    assert_close(shares[:, :3, :6], made.shares(slots[:, :3], inputs[:, :6]))
    assert_close(shares[:, 3:, 6:], made.shares(slots[:, 3:], inputs[:, 6:]))
    assert not shares[:, :3, 6:].any()


def test_padding_is_shared_by_nobody():
    shares = layer().shares(drawn(2, SLOTS, DIM), drawn(2, INPUTS, DIM, seed=1), mask=Padding(torch.tensor([9, 4])))
    assert not shares[1, :, 4:].any()


def test_implicit_gradients_go_through_the_last_iteration_alone():
    """First order: the output is that of one more iteration, its gradient that of an iteration from constants."""
    implicit, plain = layer(iterations=3, implicit=1), layer(iterations=4)
    slots, inputs = drawn(2, SLOTS, DIM).requires_grad_(), drawn(2, INPUTS, DIM, seed=1).requires_grad_()
    out = implicit(slots, inputs)
    assert_close(out, plain(slots, inputs))
    fixed = layer(iterations=3)(slots, inputs).detach()
    learned = [inputs, *implicit.parameters()]
    found = torch.autograd.grad(weighted_sum(out), learned, retain_graph=True)
    single = layer(iterations=1)
    expected = single(fixed, inputs)
    wanted = torch.autograd.grad(weighted_sum(expected), [inputs, *single.parameters()])
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs)
    assert torch.autograd.grad(weighted_sum(out), slots, allow_unused=True) == (None,)


def fixed_point(made: SlotAttention, slots: Tensor, inputs: Tensor) -> Tensor:
    for _ in range(200):
        slots = made(slots, inputs)
    return slots.detach()


def test_more_terms_come_nearer_to_the_implicit_derivative():
    """At a fixed point s* = f(s*, θ) it is v (I − ∂f/∂s)⁻¹ ∂f/∂θ, here solved densely."""
    single = layer(iterations=1)
    with torch.no_grad():
        single.mlp[3].weight.mul_(0.1)
    inputs = drawn(1, INPUTS, DIM, seed=1).requires_grad_()
    star = fixed_point(single, drawn(1, SLOTS, DIM), inputs)
    assert_close(single(star, inputs), star)
    jacobian = torch.autograd.functional.jacobian(lambda slots: single(slots, inputs), star)
    jacobian = jacobian.reshape(star.numel(), star.numel())
    seed = drawn(*star.shape, seed=3)
    solved = torch.linalg.solve(torch.eye(len(jacobian), dtype=DOUBLE) - jacobian.mT, seed.flatten())
    (exact,) = torch.autograd.grad(single(star, inputs), inputs, solved.view_as(star))
    errors = []
    for terms in (1, 2, 4, 60):
        implicit = layer(iterations=1, implicit=terms)
        implicit.load_state_dict(single.state_dict())
        (found,) = torch.autograd.grad(implicit(star, inputs), inputs, seed)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < errors[0]


def kept_for_backward(made: SlotAttention) -> int:
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made(drawn(1, SLOTS, DIM), drawn(1, 200, DIM, seed=1))
    return sum(sizes)


def test_implicit_differentiation_keeps_no_more_for_more_iterations():
    implicit = {count: kept_for_backward(layer(iterations=count, implicit=1)) for count in (1, 7)}
    unrolled = {count: kept_for_backward(layer(iterations=count)) for count in (1, 7)}
    assert implicit[1] == implicit[7]
    assert unrolled[7] > 3 * unrolled[1]


def test_drawn_slots_follow_the_learned_gaussian():
    first = InitialSlots(SLOTS, DIM, dtype=DOUBLE)
    with torch.no_grad():
        first.mean.copy_(torch.arange(DIM))
        first.log_deviation.fill_(-1.0)
    slots = first(500, slots=20, generator=torch.Generator().manual_seed(0))
    assert slots.shape == (500, 20, DIM)
    assert_close(slots.mean((0, 1)), torch.arange(DIM, dtype=DOUBLE), rtol=0, atol=0.03)
    assert_close(slots.std((0, 1)), torch.full((DIM,), -1.0, dtype=DOUBLE).exp(), rtol=0.05, atol=0)
    assert not torch.equal(first(1), first(1))
    slots.sum().backward()
    assert first.mean.grad is not None
    assert first.log_deviation is not None
    assert first.log_deviation.grad is not None


def test_learned_slots_are_the_same_for_every_sample():
    first = InitialSlots(SLOTS, DIM, learned=True)
    slots = first(3)
    assert slots.shape == (3, SLOTS, DIM)
    assert torch.equal(slots[0], slots[2])
    assert not torch.equal(slots[0, 0], slots[0, 1])
    with pytest.raises(ValueError, match="InitialSlots: 5 slots, of which 4 are learned"):
        first(3, slots=5)


def test_it_starts_as_keras_does():
    made = SlotAttention(64)
    assert_close(made.cell.weight_hh.mT @ made.cell.weight_hh, torch.eye(64), rtol=0, atol=1e-5)
    assert made.cell.weight_ih.abs().max() <= (6 / (64 + 3 * 64)) ** 0.5
    assert not made.cell.bias_ih.any()
    assert InitialSlots(7, 64).mean.abs().max() <= (6 / 65) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iterations": 0}, "iterations 0"),
        ({"hidden_dim": 0}, "hidden_dim 0"),
        ({"context_dim": 0}, "context_dim 0"),
        ({"epsilon": 0.0}, "epsilon 0.0"),
        ({"implicit": -1}, "implicit -1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str):
    with pytest.raises(ValueError, match=f"SlotAttention: {message}"):
        SlotAttention(8, **arguments)


def test_inputs_are_required():
    with pytest.raises(ValueError, match="SlotAttention: no context"):
        layer()(drawn(1, SLOTS, DIM))
