"""The pointer network gives probabilities of its answers, decodes the most probable ones, and learns."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import regard
from regard.catalogue import card
from regard.models.pointer import IGNORED, PointerNetwork, can_point, ended
from regard.nn.scores.pointer import INITIAL
from regard.tasks import geometry

DOUBLE = torch.float64
CHOICES = ("any", "once", "all")
POINTING = [key for key in regard.mechanisms() if can_point(card(key))]


def network(mechanism: str = "pointer", spread: float = 0.7, **options: object) -> PointerNetwork:
    """Far from where it starts, so that its distributions are not flat."""
    torch.manual_seed(0)
    model = PointerNetwork(2, mechanism, **{"dim": 16, "heads": 2, "dtype": DOUBLE, **options}).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=random, dtype=DOUBLE))
    return model


def points(count: int, size: int, seed: int = 0) -> Tensor:
    return geometry.uniform_points(count, size, torch.Generator().manual_seed(seed))


def probability(model: PointerNetwork, x: Tensor, answers: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Log-probability of each answer and its end, by the teacher-forced network."""
    targets = ended(answers, x.shape[1])
    logs = model(x, answers, lengths=lengths).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return logs.masked_fill(targets < 0, 0.0).sum(1)


def all_answers(choose: str, size: int) -> Tensor:
    lengths = range(size if choose == "all" else 0, size + 1)
    return geometry.padded([[*way] for length in lengths for way in permutations(range(size), length)], size, IGNORED)


@pytest.mark.parametrize("choose", ["once", "all"])
def test_probabilities_of_all_answers_sum_to_one(choose: str):
    model, x = network(choose=choose), points(1, 4)
    answers = all_answers(choose, 4)
    total = probability(model, x.expand(len(answers), -1, -1), answers).exp().sum()
    assert_close(total, torch.tensor(1.0, dtype=DOUBLE))


@pytest.mark.parametrize("key", POINTING)
def test_every_exact_mechanism_points(key: str):
    """A row of the teacher-forced network is a distribution over the points left and the end."""
    model, x = network(key, choose="once"), points(3, 5)
    answers = torch.tensor([[3, 1, 0], [2, IGNORED, IGNORED], [4, 0, IGNORED]])
    logs = model(x, answers)
    assert logs.shape == (3, 4, 6)
    assert_close(logs.exp().sum(-1), torch.ones(3, 4, dtype=DOUBLE))
    left = (logs > -torch.inf).int()
    assert left[0].tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [1, 0, 1, 0, 1, 1], [0, 0, 1, 0, 1, 1]]
    assert torch.isfinite(model.loss(x, answers))


@pytest.mark.parametrize("key", [key for key in regard.mechanisms() if key not in POINTING])
def test_mechanism_that_cannot_point_is_refused(key: str):
    with pytest.raises(ValueError, match=f"PointerNetwork: mechanism '{key}' cannot point; choose an exact one"):
        PointerNetwork(2, key)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("choose", ["once", "all"])
def test_no_input_is_chosen_twice(choose: str, beams: int):
    model, x = network(choose=choose), points(40, 6)
    answers, _ = model.decode(x, beams=beams)
    for answer in answers.tolist():
        chosen = [index for index in answer if index != IGNORED]
        assert len(set(chosen)) == len(chosen)
        assert choose != "all" or sorted(chosen) == [*range(6)]


def test_without_masking_inputs_are_chosen_again():
    answers, _ = network(choose="any").decode(points(40, 6), longest=12)
    assert any(len(set(answer)) < len(answer) for answer in answers.tolist())


@pytest.mark.parametrize("beams", [1, 3, 50])
@pytest.mark.parametrize("choose", ["once", "all"])
@pytest.mark.parametrize("key", ["pointer", "multi_head"])
def test_reported_probability_is_the_networks(key: str, choose: str, beams: int):
    model, x = network(key, choose=choose), points(8, 5)
    answers, logs = model.decode(x, beams=beams)
    assert_close(logs, probability(model, x, answers))


@pytest.mark.parametrize("choose", CHOICES)
def test_one_beam_is_greedy(choose: str):
    """Each index, and the end, is the most probable one after those before it."""
    model, x = network(choose=choose), points(20, 6)
    answers, _ = model.decode(x, longest=10)
    greedy = model(x, answers).argmax(-1)[:, : answers.shape[1]]
    assert torch.equal(greedy.where(answers != IGNORED, IGNORED), answers)
    ends = (answers != IGNORED).sum(1)
    shorter = (ends < 10).nonzero().flatten()
    assert (model(x, answers).argmax(-1)[shorter, ends[shorter]] == 6).all()


@pytest.mark.parametrize("choose", ["once", "all"])
def test_a_beam_of_all_answers_finds_the_most_probable(choose: str):
    model, x = network(choose=choose, spread=0.3), points(12, 4)
    answers = all_answers(choose, 4)
    found, logs = model.decode(x, beams=len(answers))
    by_hand = torch.stack([probability(model, sample.expand(len(answers), -1, -1), answers) for sample in x])
    assert_close(logs, by_hand.amax(1))
    assert [answer[answer >= 0].tolist() for answer in found] == [
        answer[answer >= 0].tolist() for answer in answers[by_hand.argmax(1)]
    ]


@pytest.mark.parametrize("choose", ["once", "all"])
def test_wider_beams_find_more_probable_answers(choose: str):
    """On the whole: a wider beam may lose the way that a narrower one keeps, unless it has them all."""
    model, x = network(choose=choose, spread=0.3), points(60, 5)
    logs = torch.stack([model.decode(x, beams=beams)[1] for beams in (1, 3, 10, 330)])
    assert (logs.mean(1).diff() >= 0).all()
    assert logs[1].mean() > logs[0].mean()
    assert (logs[3] >= logs[:3] - 1e-12).all()


@pytest.mark.parametrize("choose", CHOICES)
@pytest.mark.parametrize("key", ["pointer", "multi_head"])
def test_padding_changes_nothing(key: str, choose: str):
    model, x = network(key, choose=choose), points(3, 6)
    lengths = torch.tensor([6, 3, 4])
    found, logs = model.decode(x, lengths=lengths, beams=2, longest=7)
    junk = x.masked_fill(torch.arange(6)[None, :, None] >= lengths[:, None, None], 9.0)
    answers = torch.tensor([[5, 4, 3, 2, 1, 0], [1, 0, 2] + [IGNORED] * 3, [0, 3, 2, 1] + [IGNORED] * 2])
    forced = probability(model, junk, answers, lengths)
    for sample, length in enumerate(lengths.tolist()):
        alone = x[sample : sample + 1, :length]
        own, own_log = model.decode(alone, beams=2, longest=7)
        assert_close(own_log[0], logs[sample])
        assert found[sample][found[sample] >= 0].tolist() == own[0].tolist()
        assert_close(forced[sample], probability(model, alone, answers[sample : sample + 1, :length])[0])
    again, logs_again = model.decode(junk, lengths=lengths, beams=2, longest=7)
    assert torch.equal(again, found)
    assert_close(logs_again, logs)


def test_one_network_takes_any_number_of_points():
    model = network(choose="all")
    for size in (1, 2, 9, 40):
        answers, logs = model.decode(points(2, size))
        assert sorted(answers[0].tolist()) == [*range(size)]
        assert torch.isfinite(logs).all()


def test_what_comes_later_in_an_answer_does_not_matter_before():
    model, x = network(choose="once"), points(2, 6)
    one, other = torch.tensor([[0, 1, 2, 3], [5, 4, 1, 0]]), torch.tensor([[0, 1, 4, 5], [5, 4, 3, 2]])
    first, second = model(x, one), model(x, other)
    assert_close(first[:, :3], second[:, :3])
    assert not torch.allclose(first[:, 3:].exp(), second[:, 3:].exp())


def test_all_but_the_unused_mix_learns_and_nothing_else():
    model = network(choose="any")
    model.loss(points(8, 6), torch.tensor([[0, 1, 2]]).expand(8, 3)).backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert silent == {"pointer.value.weight", "pointer.output.weight"}
    assert all(parameter.grad is None or parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_loss_is_the_negative_log_probability_a_step():
    model, x = network(choose="once"), points(2, 5)
    answers = torch.tensor([[3, 1, 0], [2, IGNORED, IGNORED]])
    assert_close(model.loss(x, answers), -probability(model, x, answers).sum() / 6)


def test_weights_start_as_the_papers():
    model = PointerNetwork(2)
    assert (model.encoder.hidden_size, model.decoder.num_layers, model.pointer.heads) == (256, 1, 1)
    for name, parameter in model.named_parameters():
        if name not in ("pointer.value.weight", "pointer.output.weight"):
            assert parameter.abs().max() <= INITIAL


def train_on_hulls(model: PointerNetwork, steps: int, size: int) -> None:
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    for _ in range(steps):
        drawn = geometry.uniform_points(64, size, random)
        loss = model.loss((3 * drawn - 1.5).float(), geometry.hulls(drawn))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        schedule.step()


def right_hulls(model: PointerNetwork, size: int, **how: int) -> float:
    pytest.importorskip("scipy")
    drawn = points(300, size, seed=1)
    found, _ = model.decode((3 * drawn - 1.5).float(), **how)
    answers = [[index for index in answer if index != IGNORED] for answer in found.tolist()]
    return sum(geometry.same_hull(*pair) for pair in zip(answers, map(geometry.hull, drawn), strict=True)) / 300


@pytest.mark.slow
def test_a_small_network_learns_hulls_of_five_points_and_carries_it_over_to_six():
    """Guessing gives 3% with five points and 1% with six."""
    torch.manual_seed(0)
    model = PointerNetwork(2, dim=48, choose="once")
    before = right_hulls(model, 5)
    train_on_hulls(model, 1500, 5)
    assert before < 0.1
    assert right_hulls(model, 5) > 0.5
    assert right_hulls(model, 5, beams=3) > 0.5
    assert right_hulls(model, 6) > 0.2


def test_a_tiny_network_learns_triangles_in_seconds():
    """With three points the answer has them all, in one of two directions: chance is a half."""
    torch.manual_seed(0)
    model = PointerNetwork(2, dim=24, choose="once")
    train_on_hulls(model, 250, 3)
    drawn = points(300, 3, seed=1)
    found, _ = model.decode((3 * drawn - 1.5).float())
    assert (found == geometry.hulls(drawn)).all(1).float().mean() > 0.85


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PointerNetwork(0), "features 0"),
        (lambda: PointerNetwork(choose="twice"), "choose 'twice' is not known"),
        (lambda: network().decode(points(1, 3)), "no longest answer, with choose='any'"),
        (lambda: network().decode(points(1, 3), beams=0, longest=3), "beams 0"),
        (lambda: network().decode(points(1, 3)[0], longest=3), r"points of shape \(3, 2\)"),
        (lambda: network().decode(points(2, 3), lengths=torch.tensor([4, 1]), longest=3), "give 2 numbers from 1 to 3"),
        (lambda: network()(points(2, 3), torch.zeros(3, 2).long()), r"answers of shape \(3, 2\) for 2 sets"),
    ],
)
def test_what_cannot_be_pointed_at_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
