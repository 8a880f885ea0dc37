"""Retrieval heads of small decoders trained on recall: masking them breaks it, masking as many other heads does not.

A decoder of three layers learns to give the value of a key seen before. Its tokens know their predecessor through the
convolution, so that one head can find the value, and the needle is that one token. The convolution is two tokens wide:
with the four of the default a value can also be read off the tokens after it, and one of two such models of four layers
had recall 0.99 without a head that scores above 0.04. The ratio of the first row is the recall without the retrieval
heads, of the second that without as many others, drawn among the heads that are none; both are means over seeds. Beside
the second stands the recall without any of the others. Seconds are the processor time of training, and of scoring the
heads.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

import torch
from torch.nn import functional as F

from harness import Row, report, threads_argument
from regard.inspect.needles import Needle
from regard.inspect.retrieval_heads import Masking, RetrievalHeads, mask_retrieval_heads, retrieval_heads, silence
from regard.models.language import Decoder
from regard.sites import attach
from regard.tasks.recall import IGNORED, Recall

TASK, PAIRS = Recall(32, 64), 8
LAYERS, HEADS, STEPS, BATCH, LEARNING_RATE, TESTED, DRAWS = 3, 4, 200, 32, 3e-3, 32, 8
SEEDS = (0, 1, 2)
BROKEN, WHOLE = 0.25, 0.9


class Trial(NamedTuple):
    """What was found in a trained model."""

    found: RetrievalHeads
    masking: Masking
    without_others: float
    training: float
    scoring: float


def trained(seed: int) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(TASK.vocabulary, "multi_head", heads=HEADS, layers=LAYERS, convolution=2)
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        tokens, labels = TASK.batch(BATCH, PAIRS, random)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def needles() -> list[Needle]:
    """A prompt for every key that is asked for: it ends with the key, and the needle is the value that followed it."""
    tokens, labels = TASK.batch(TESTED, PAIRS, torch.Generator().manual_seed(54321))
    prompts = []
    for row, place in (labels != IGNORED).nonzero().tolist():
        start = int((tokens[row] == labels[row, place]).nonzero()[0])
        prompts.append(Needle(tokens[row, : place + 1], start, start + 1))
    return prompts


def trial(seed: int) -> Trial:
    start = time.process_time()
    model = trained(seed)
    middle = time.process_time()
    prompts = needles()
    found = retrieval_heads(model, prompts, teacher=True, batch=64)
    end = time.process_time()
    masking = mask_retrieval_heads(model, prompts, found, draws=DRAWS, seed=seed, teacher=True, batch=64)
    with attach(model, *silence(head for head in found.heads if head not in found.retrieval)):
        alone = retrieval_heads(model, prompts, teacher=True, batch=64)
    return Trial(found, masking, float(alone.recall.mean()), middle - start, end - middle)


def main() -> None:
    threads_argument()
    trials = [trial(seed) for seed in SEEDS]
    masks = [each.masking for each in trials]
    masked = statistics.fmean(each.masked for each in masks)
    other = statistics.fmean(recall for each in masks for recall in each.random)
    seconds = [
        statistics.fmean(values) for values in ([each.training for each in trials], [each.scoring for each in trials])
    ]
    case = f"recall of {PAIRS} pairs, {LAYERS} layers of {HEADS} heads, {STEPS} steps"
    plain = f"{statistics.fmean(each.plain for each in masks):.3f}"
    report(
        "retrieval_heads",
        [
            Row(
                case=f"{case}: retrieval heads masked",
                peer="recall of the model as it is",
                ratio=masked,
                target=f"≤ {BROKEN}",
                reached=masked <= BROKEN,
                ours_seconds=seconds[0],
                peer_seconds=seconds[1],
                detail={
                    "unmasked": plain,
                    "seeds": ", ".join(f"{each.masked:.3f}" for each in masks),
                    "heads masked": ", ".join(f"{len(each.heads)}" for each in masks),
                    "scores": "; ".join(_scores(each) for each in trials),
                },
            ),
            Row(
                case=f"{case}: as many others masked",
                peer="recall of the model as it is",
                ratio=other,
                target=f"≥ {WHOLE}",
                reached=other >= WHOLE,
                ours_seconds=seconds[0],
                peer_seconds=seconds[1],
                detail={
                    "unmasked": plain,
                    "seeds": ", ".join(f"{statistics.fmean(each.random):.3f}" for each in masks),
                    "worst draws": ", ".join(f"{min(each.random):.3f}" for each in masks),
                    "without any other": ", ".join(f"{each.without_others:.3f}" for each in trials),
                },
            ),
        ],
    )


def _scores(each: Trial) -> str:
    """Of the retrieval heads and of the best other, as layer.head."""
    scores = each.found.scores
    shown = list(scores)[: len(each.found.retrieval) + 1]
    return " ".join(f"{head.layer}.{head.head} {scores[head]:.2f}" for head in shown)


if __name__ == "__main__":
    main()
