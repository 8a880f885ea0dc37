"""Small models trained and tested on the tasks, the same for every mechanism.

A model always has the same width, heads and number of steps, whatever shape is timed, so that scores can be compared
between runs, shapes and machines; on the CPU one thread trains it, so that they do not depend on the number of cores.
"""

from __future__ import annotations

import math
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.bench.pointing import DelaunayTrial, HullTrial, TourTrial
from regard.bench.results import QualityCell
from regard.bench.trial import DIM, HEADS, LAYERS, TEST_SEED, Trial
from regard.bench.variant import Variant
from regard.catalogue import card
from regard.models.language import Decoder
from regard.models.vision import Encoder
from regard.tasks import digits, text
from regard.tasks.recall import IGNORED, Recall
from regard.testing.checks.decoding import state_bytes


class Causal(Trial):
    """A task of a language model."""

    pattern = timed_as = "causal self"
    vocabulary: int
    longest: int

    def takes(self, variant: Variant) -> bool:
        return super().takes(variant) and variant.card.contract.input == "tokens"

    def model(self, variant: Variant) -> Decoder:
        return Decoder(self.vocabulary, variant.key, dim=DIM, heads=HEADS, layers=LAYERS, options=dict(variant.options))


class RecallTrial(Causal):
    """One model for all capacities. Few pairs come in short sequences: each has twice the length that the pairs take,
    so that about every other token of its second half is asked for."""

    subject = "recall of key–value pairs"
    metric, better, guessing = "accuracy", "higher", 1 / 64
    vocabulary, capacities, longest = 128, (4, 8, 16, 32, 64), 256
    steps, learning_rate, tokens, tested = 500, 3e-3, 2048, 64

    def _task(self, pairs: int) -> Recall:
        return Recall(max(32, 4 * pairs), self.vocabulary)

    def loss(self, model: nn.Module, step: int, random: torch.Generator, device: torch.device) -> Tensor:
        pairs = self.capacities[step % len(self.capacities)]
        task = self._task(pairs)
        tokens, labels = (part.to(device) for part in task.batch(self.tokens // task.length, pairs, random))
        return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def samples(self, model: nn.Module, device: torch.device, count: int | None = None) -> dict[str, Tensor]:
        random, scores = torch.Generator().manual_seed(TEST_SEED), {}
        for pairs in self.capacities:
            tokens, labels = (part.to(device) for part in self._task(pairs).batch(count or self.tested, pairs, random))
            right = (model(tokens).argmax(-1) == labels).sum(-1)
            scores[str(pairs)] = right / pairs
        return scores


class TextTrial(Causal):
    """Bits per byte of held-out files; a sample is a piece of `longest` bytes."""

    subject = "causal text"
    metric = unit = "bits per byte"
    decimals, better = 2, "lower"
    vocabulary, longest = 256, 256
    steps, learning_rate, batch, tested = 400, 4e-3, 8, 128

    @property
    def guessing(self) -> float:
        """Knowing how frequent each byte is, and nothing else."""
        counts, tested = (torch.bincount(text.source(split).long(), minlength=256) for split in ("train", "test"))
        bits = -((counts + 1) / (counts + 1).sum()).log2()
        return float((tested * bits).sum() / tested.sum())

    def loss(self, model: nn.Module, step: int, random: torch.Generator, device: torch.device) -> Tensor:
        return self._bits(
            model, text.windows(text.source("train"), self.batch, self.longest + 1, random), device
        ).mean()

    def samples(self, model: nn.Module, device: torch.device, count: int | None = None) -> dict[str, Tensor]:
        held_out = text.pieces(text.source("test"), count or self.tested, self.longest + 1)
        return {"": self._bits(model, held_out, device).mean(-1)}

    def _bits(self, model: nn.Module, pieces: Tensor, device: torch.device) -> Tensor:
        pieces = pieces.to(device)
        nats = F.cross_entropy(model(pieces[:, :-1]).mT, pieces[:, 1:], reduction="none")
        return nats / math.log(2)


class DigitsTrial(Trial):
    """Accuracy on held-out images."""

    subject = "images of digits"
    pattern = timed_as = "noncausal self"
    also = " over a plane"
    metric, better, guessing = "accuracy", "higher", 1 / digits.CLASSES
    steps, learning_rate, batch = 650, 2e-3, 32

    def takes(self, variant: Variant) -> bool:
        contract = variant.card.contract
        return super().takes(variant) and (contract.input != "grid" or 2 in contract.grid_dims)

    def model(self, variant: Variant) -> Encoder:
        return Encoder(
            digits.GRID,
            1,
            digits.CLASSES,
            variant.key,
            dim=DIM,
            heads=HEADS,
            layers=LAYERS,
            options=dict(variant.options),
        )

    def loss(self, model: nn.Module, step: int, random: torch.Generator, device: torch.device) -> Tensor:
        images, labels = digits.images("train")
        chosen = torch.randint(len(images), (self.batch,), generator=random)
        return F.cross_entropy(model(images[chosen].to(device)), labels[chosen].to(device))

    def samples(self, model: nn.Module, device: torch.device, count: int | None = None) -> dict[str, Tensor]:
        images, labels = (part[:count] for part in digits.images("test"))
        return {"": (model(images.to(device)).argmax(-1) == labels.to(device)).float()}


TRIALS: dict[str, Trial] = {
    "recall": RecallTrial(),
    "text": TextTrial(),
    "digits": DigitsTrial(),
    "hull": HullTrial(),
    "delaunay": DelaunayTrial(),
    "tour": TourTrial(),
}


def train(task: str, variant: Variant, seed: int, device: torch.device) -> QualityCell:
    """Train a model on a task and test it. The same arguments give the same numbers.

    Raises FloatingPointError where the loss stops being a number: such a model has no score.
    """
    trial = TRIALS[task]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = trial.model(variant).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1.0, 2 * (1 - step / trial.steps))
    )
    start = time.perf_counter()
    for step in range(trial.steps):
        optimizer.zero_grad()
        loss = trial.loss(model, step, random, device)
        if not loss.isfinite():
            raise FloatingPointError(f"training diverged: the loss is {loss.item()} at step {step} of {trial.steps}")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        scores = {level: values.cpu() for level, values in trial.samples(model, device).items()}
        kept = _state_bytes(model, trial, device) if isinstance(model, Decoder) else None
    samples = [round(value, 6) for values in scores.values() for value in values.tolist()]
    return QualityCell(
        task=task,
        mechanism=str(variant),
        seed=seed,
        score=statistics.fmean(samples),
        samples=samples,
        by={level: float(values.mean()) for level, values in scores.items() if level},
        steps=trial.steps,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        train_seconds=seconds,
        state_bytes=kept,
    )


def _state_bytes(model: Decoder, trial: Trial, device: torch.device) -> int | None:
    """What the mechanisms of all layers keep after the longest sequence of the task."""
    if not isinstance(trial, Causal) or not card(model.mechanism).contract.step:
        return None
    tokens = torch.zeros(1, trial.longest, dtype=torch.long, device=device)
    _, states = model.step(tokens, model.init_state(1))
    return sum(state_bytes(kept.mixer) for kept in states)
