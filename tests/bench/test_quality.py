"""Small models are trained alike and tested on the same samples, and a seed says all of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.bench.quality import TRIALS, Trial, train
from regard.bench.results import QualityCell
from regard.bench.variant import Variant
from regard.models.language import Decoder
from regard.models.pointer import PointerNetwork
from regard.models.vision import Encoder
from regard.tasks import digits, text
from regard.testing.checks.decoding import state_bytes

CPU = torch.device("cpu")
EXACT = Variant("multi_head")
TESTED = {"recall": 320, "text": 128, "digits": 450, "hull": 600, "delaunay": 500, "tour": 600}
MODELS = {"recall": Decoder, "text": Decoder, "digits": Encoder}


@pytest.fixture(autouse=True)
def torchs_own_settings() -> Iterator[None]:
    """Training asks for deterministic algorithms: not so for other tests."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps each, and few test samples where there may be fewer."""
    for trial in TRIALS.values():
        monkeypatch.setattr(trial, "steps", 3)
    monkeypatch.setattr(TRIALS["recall"], "tested", 4)
    for task in ("text", "hull", "delaunay", "tour"):
        monkeypatch.setattr(TRIALS[task], "tested", 4)


def measurements(cell: QualityCell) -> dict[str, object]:
    return cell.model_dump(exclude={"train_seconds"})


class Guess(nn.Module):
    """Answers of a uniform draw from some of the classes, whatever is asked; remembers what it was asked."""

    def __init__(self, classes: int, lowest: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.classes, self.lowest = classes, lowest
        self.random, self.seen = torch.Generator().manual_seed(seed), []

    def answers(self, shape: torch.Size) -> Tensor:
        logits = torch.rand(*shape, self.classes, generator=self.random)
        logits[..., : self.lowest] = -1.0
        return logits


class GuessToken(Guess):
    def forward(self, tokens: Tensor) -> Tensor:
        self.seen.append(tokens)
        return self.answers(tokens.shape)


class GuessClass(Guess):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.answers(x.shape[:1])


class GuessOrder(Guess):
    """Names all points once, in any order."""

    def decode(self, points: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        self.seen.append(points)
        order = torch.rand(points.shape[:2], generator=self.random).argsort(1)
        return order[:, :longest], torch.zeros(len(points))

    def loss(self, points: Tensor, answers: Tensor) -> Tensor:
        self.seen.append(points)
        return torch.zeros(())


class Fixed(nn.Module):
    """The same logits for every token."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)


class Knows(nn.Module):
    """Answers recall by looking the key up."""

    def forward(self, tokens: Tensor) -> Tensor:
        same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
        first = same.int().argmax(-1)
        answer = tokens.gather(1, (first + 1).clamp(max=tokens.shape[1] - 1))
        return nn.functional.one_hot(answer, 128).float()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("task", [*TRIALS])
def test_one_seed_gives_one_training(task: str):
    one, again = (train(task, EXACT, 3, CPU) for _ in range(2))
    assert measurements(one) == measurements(again)


@pytest.mark.usefixtures("tiny")
def test_training_does_not_depend_on_what_was_drawn_before():
    torch.manual_seed(1)
    one = train("text", EXACT, 3, CPU)
    torch.manual_seed(2)
    torch.rand(7)
    assert measurements(train("text", EXACT, 3, CPU)) == measurements(one)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("task", ["text", "digits"])
def test_another_seed_gives_another_training(task: str):
    assert train(task, EXACT, 3, CPU).samples != train(task, EXACT, 4, CPU).samples


@pytest.mark.parametrize("task", [*TRIALS])
def test_another_seed_gives_other_batches(task: str):
    batches = []
    for seed in (3, 4):
        model = guesser(task)
        TRIALS[task].loss(model, 0, torch.Generator().manual_seed(seed), CPU)
        batches.append(model.seen[0])
    assert not torch.equal(*batches)


@pytest.mark.usefixtures("tiny")
def test_batches_come_from_a_generator_of_the_seed(monkeypatch: pytest.MonkeyPatch):
    drawn, loss = [], TRIALS["text"].loss

    def spied(model: nn.Module, step: int, random: torch.Generator, device: torch.device) -> Tensor:
        drawn.append((step, random.initial_seed()))
        return loss(model, step, random, device)

    monkeypatch.setattr(TRIALS["text"], "loss", spied)
    train("text", EXACT, 5, CPU)
    assert drawn == [(0, 5), (1, 5), (2, 5)]


@pytest.mark.usefixtures("tiny")
def test_options_make_another_model():
    one, two = (train("text", Variant.parse(name), 3, CPU) for name in ("multi_head", "gqa:kv_heads=1"))
    assert one.parameters > two.parameters
    assert one.samples != two.samples


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("task", [*TRIALS])
def test_a_cell_says_what_was_done(task: str):
    cell = train(task, Variant.parse("gqa:kv_heads=1"), 3, CPU)
    assert (cell.task, cell.mechanism, cell.seed, cell.steps) == (task, "gqa:kv_heads=1", 3, 3)
    assert cell.parameters == sum(map(torch.numel, TRIALS[task].model(Variant.parse("gqa:kv_heads=1")).parameters()))
    assert cell.score == pytest.approx(sum(cell.samples) / len(cell.samples), abs=1e-9)
    assert cell.train_seconds > 0


@pytest.mark.usefixtures("tiny")
def test_recall_is_told_by_capacity():
    cell = train("recall", EXACT, 3, CPU)
    assert [*cell.by] == ["4", "8", "16", "32", "64"]
    assert sum(cell.by.values()) / 5 == pytest.approx(cell.score, abs=1e-6)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("task", ["text", "digits"])
def test_other_tasks_have_one_difficulty(task: str):
    assert train(task, EXACT, 3, CPU).by == {}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("key", regard.mechanisms(pattern="causal self", input="tokens"))
def test_kept_bytes_are_those_of_the_mechanisms_after_the_longest_sample(key: str):
    cell, variant = train("text", Variant(key), 3, CPU), Variant(key)
    if not variant.card.contract.step:
        assert cell.state_bytes is None
        return
    model = TRIALS["text"].model(variant)
    with torch.no_grad():
        _, state = model.step(torch.zeros(1, 256, dtype=torch.long), model.init_state(1))
    assert cell.state_bytes == sum(state_bytes(block.mixer) for block in state)


@pytest.mark.usefixtures("tiny")
def test_encoders_keep_nothing():
    assert train("digits", EXACT, 3, CPU).state_bytes is None


def test_training_lowers_the_loss(monkeypatch: pytest.MonkeyPatch):
    """Bits per byte of the first steps: uniform guessing is 8, the frequencies of bytes alone below 5."""
    monkeypatch.setattr(TRIALS["text"], "steps", 20)
    monkeypatch.setattr(TRIALS["text"], "tested", 16)
    assert train("text", EXACT, 0, CPU).score < 6


@pytest.mark.parametrize("task", [*TRIALS])
def test_model_is_tested_in_eval_mode(task: str, monkeypatch: pytest.MonkeyPatch):
    trial, modes = TRIALS[task], []
    monkeypatch.setattr(trial, "steps", 1)
    tested = type(trial).samples

    def spied(model: nn.Module, device: torch.device, count: int | None = None) -> dict[str, Tensor]:
        modes.append((model.training, torch.is_grad_enabled()))
        return tested(trial, model, device, 2)

    monkeypatch.setattr(trial, "samples", spied)
    train(task, EXACT, 0, CPU)
    assert modes == [(False, False)]


@pytest.mark.parametrize("task", [*TRIALS])
@pytest.mark.parametrize("key", regard.mechanisms())
def test_tasks_take_exactly_what_their_model_can_be_built_with(task: str, key: str):
    trial, variant = TRIALS[task], Variant(key)
    if trial.takes(variant):
        assert isinstance(trial.model(variant), MODELS.get(task, PointerNetwork))
        levels = trial.samples(trial.model(variant), CPU, 1)
        assert all(torch.isfinite(scores).all() for scores in levels.values())
    else:
        grid = task in MODELS and variant.card.contract.input == "grid"
        with pytest.raises(ValueError, match="grid|of shape" if grid else key):
            trial.samples(trial.model(variant), CPU, 1)


def guesser(task: str, seed: int = 0) -> Guess:
    if task == "digits":
        return GuessClass(digits.CLASSES, seed=seed)
    if task in ("hull", "delaunay", "tour"):
        return GuessOrder(0, seed=seed)
    return GuessToken(128, lowest=64, seed=seed) if task == "recall" else GuessToken(256, seed=seed)


def mean(trial: Trial, model: nn.Module) -> float:
    return float(torch.cat([*trial.samples(model, CPU).values()]).mean())


@pytest.mark.parametrize("task", ["recall", "digits"])
def test_random_answers_score_about_the_guessing_level(task: str):
    """A digit has the variance p (1 − p); a recall sample the mean of as many as it has pairs, 4 at the fewest.

    Twenty guessers; 4 standard deviations of their mean.
    """
    trial = TRIALS[task]
    found = [mean(trial, guesser(task, seed)) for seed in range(20)]
    answers = 20 * TESTED[task] * (1 if task == "digits" else 4)
    tolerated = 4 * math.sqrt(trial.guessing * (1 - trial.guessing) / answers)
    assert sum(found) / 20 == pytest.approx(trial.guessing, abs=tolerated)
    assert tolerated < 0.5 * trial.guessing


def test_guessing_text_is_to_know_the_frequency_of_each_byte():
    """Recomputed by hand, and what a model that knows just that scores on the pieces it is tested on."""
    train_bytes, test_bytes = (bytes(text.source(split).tolist()) for split in ("train", "test"))
    counts = Counter(train_bytes)
    total = len(train_bytes) + 256
    bits = [-math.log2((counts[byte] + 1) / total) for byte in range(256)]
    by_hand = sum(times * bits[byte] for byte, times in Counter(test_bytes).items()) / len(test_bytes)
    trial = TRIALS["text"]
    assert trial.guessing == pytest.approx(by_hand, rel=1e-4)
    assert mean(trial, Fixed(-math.log(2) * torch.tensor(bits))) == pytest.approx(by_hand, rel=0.05)
    assert 4 < trial.guessing < 6


def test_knowing_nothing_about_text_is_eight_bits():
    assert mean(TRIALS["text"], Fixed(torch.zeros(256))) == pytest.approx(8.0, abs=1e-5)


def test_lookup_recalls_everything():
    scores = TRIALS["recall"].samples(Knows(), CPU)
    assert [*scores] == ["4", "8", "16", "32", "64"]
    assert all((values == 1).all() for values in scores.values())


@pytest.mark.parametrize("task", [*TRIALS])
def test_a_score_for_every_test_sample(task: str):
    assert sum(map(len, TRIALS[task].samples(guesser(task), CPU).values())) == TESTED[task]


@pytest.mark.parametrize("task", [*TRIALS])
def test_test_samples_are_the_same_for_every_model_and_seed(task: str):
    one, other = guesser(task, 1), guesser(task, 2)
    torch.manual_seed(1)
    TRIALS[task].samples(one, CPU)
    torch.manual_seed(2)
    TRIALS[task].samples(other, CPU)
    assert len(one.seen) == len(other.seen) > 0
    assert all(torch.equal(first, second) for first, second in zip(one.seen, other.seen, strict=True))


@pytest.mark.parametrize("task", [*TRIALS])
def test_count_takes_so_many_samples_of_each_difficulty(task: str):
    model = guesser(task)
    assert {len(scores) for scores in TRIALS[task].samples(model, CPU, 2).values()} == {2}
    assert {len(x) for x in model.seen} == {2}


def test_text_is_trained_on_one_side_and_tested_on_the_other():
    model, trial = GuessToken(256), TRIALS["text"]
    trial.loss(model, 0, torch.Generator().manual_seed(0), CPU)
    trial.samples(model, CPU)
    trained, tested = model.seen
    train_bytes, test_bytes = (bytes(text.source(split).tolist()) for split in ("train", "test"))
    assert all(bytes(row.tolist()) in train_bytes for row in trained)
    assert all(bytes(row.tolist()) in test_bytes for row in tested)


def test_batches_of_recall_cycle_through_the_capacities():
    model, trial, random = GuessToken(128), TRIALS["recall"], torch.Generator().manual_seed(0)
    for step in range(6):
        trial.loss(model, step, random, CPU)
    lengths = [x.shape[1] for x in model.seen]
    assert lengths == [32, 32, 64, 128, 256, 32]
    assert {x.numel() for x in model.seen} == {2048}


def test_recall_asks_only_for_labels():
    """The loss of answers that are right where asked, and nothing elsewhere, is nothing."""
    trial, sharp = TRIALS["recall"], Knows()
    sharp.register_forward_hook(lambda module, inputs, out: 100 * out)
    assert float(trial.loss(sharp, 0, torch.Generator().manual_seed(0), CPU)) < 1e-6


def test_a_training_that_diverges_has_no_score(monkeypatch: pytest.MonkeyPatch):
    losses = iter([1.0, float("nan")])
    own = type(TRIALS["recall"]).loss
    monkeypatch.setattr(TRIALS["recall"], "loss", lambda *given: own(TRIALS["recall"], *given) * next(losses))
    with pytest.raises(FloatingPointError, match="diverged: the loss is nan at step 1 of"):
        train("recall", Variant.parse("lightning"), 0, torch.device("cpu"))
