"""Object discovery: a slot attention autoencoder learns from images alone, and its masks are held against the objects.

The ratio of the first row is the foreground ARI itself, 0 by chance and 1 for the true masks, of held-out images; that
of the second is the ARI with implicit differentiation over the one with gradients through all iterations. Both are
means over seeds. Seconds are the processor time of a training step.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
from torch import nn

from harness import Row, report, threads_argument
from regard.models.sets import ObjectDiscovery
from regard.tasks.scenes import Scenes, foreground_ari

SCENES = Scenes(size=16, fewest=3, most=3)
SLOTS, STEPS, BATCH, LEARNING_RATE, TESTED = 4, 2000, 16, 1e-3, 200
SEEDS = (0, 1, 2)
AT_LEAST, IMPLICIT_AT_LEAST = 0.6, 0.9


class Trained(NamedTuple):
    """What a model became."""

    ari: float
    untrained: float
    error: float
    seconds: float


def score(model: ObjectDiscovery) -> tuple[float, float]:
    """Foreground ARI and squared error on images that training never sees."""
    images, ids = SCENES.batch(TESTED, torch.Generator().manual_seed(54321))
    torch.manual_seed(0)
    with torch.no_grad():
        found = model(images)
    return statistics.fmean(foreground_ari(ids, found.objects)), float((found.image - images).square().mean())


def train(implicit: int, seed: int) -> Trained:
    torch.manual_seed(seed)
    model = ObjectDiscovery(
        SCENES.size, SLOTS, dim=32, width=32, encoder_layers=2, layers=2, doublings=1, implicit=implicit
    )
    untrained, _ = score(model)
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 1.0) * 0.25 ** (step / STEPS)
    )
    seconds = []
    for _ in range(STEPS):
        images, _ = SCENES.batch(BATCH, random)
        start = time.process_time()
        optimizer.zero_grad()
        model.loss(images).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seconds.append(time.process_time() - start)
    ari, error = score(model)
    return Trained(ari, untrained, error, statistics.median(seconds))


def mean(trained: list[Trained]) -> Trained:
    return Trained(*(statistics.fmean(values) for values in zip(*trained, strict=True)))


def spread(trained: list[Trained]) -> str:
    return ", ".join(f"{each.ari:.2f}" for each in trained)


def main() -> None:
    threads_argument()
    plain, other = ([train(implicit, seed) for seed in SEEDS] for implicit in (0, 1))
    unrolled, implicit = mean(plain), mean(other)
    case = f"foreground ARI, {SCENES.most} shapes on {SCENES.size}×{SCENES.size}, {SLOTS} drawn slots, {STEPS} steps"
    report(
        "object_discovery",
        [
            Row(
                case=case,
                peer="the true masks",
                ratio=unrolled.ari,
                target=f"≥ {AT_LEAST}",
                reached=unrolled.ari >= AT_LEAST,
                ours_seconds=unrolled.seconds,
                peer_seconds=0.0,
                detail={"seeds": spread(plain), "untrained": unrolled.untrained, "squared error": unrolled.error},
            ),
            Row(
                case=f"{case}, implicit differentiation",
                peer="gradients through all iterations",
                ratio=implicit.ari / unrolled.ari,
                target=f"≥ {IMPLICIT_AT_LEAST}×",
                reached=implicit.ari >= IMPLICIT_AT_LEAST * unrolled.ari,
                ours_seconds=implicit.seconds,
                peer_seconds=unrolled.seconds,
                detail={"ARI": implicit.ari, "seeds": spread(other), "squared error": implicit.error},
            ),
        ],
    )


if __name__ == "__main__":
    main()
