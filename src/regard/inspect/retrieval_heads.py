"""Heads that copy from the context. "Retrieval Head Mechanistically Explains Long-Context Factuality", Wu et al., 2024,
arXiv 2404.15574.

A needle k is put into a long text and asked for. While the model writes the answer w_1 w_2 …, head h copies at step t
if the token j that it attends to most is in the needle and is the one being written: j = argmax_j a_tj, j ∈ k, x_j =
w_t.

    retrieval score of h = |g_h ∩ k| / |k|        g_h the tokens that h copied; mean over needles, lengths and depths

Heads from 0.1 on are retrieval heads (few per cent of all heads in the paper). `mask_retrieval_heads` shows what they
cause: the answer without the best of them, against the answer without as many other heads.

Cost: one generation per prompt, and per step the weights of the newest query beside the host's kernel, O(n d) per head;
teacher forcing takes one forward pass per batch of prompts instead.

Differences: a needle token counts once, as the sets say, where the authors' code counts every step that copies it. The
score is over all prompts; that code leaves out those with half of the answer or less. A masked head answers zero at
every token; in that code its queries are zero while decoding, so that it averages values.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from regard.inspect.needles import Looks, Needle, Progress, asked, recalled
from regard.inspect.plotting import plotly
from regard.ops.checks import require
from regard.sites import Edit, Where

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_OWNER = "retrieval_heads"
_LISTED = 20


class Head(NamedTuple):
    """One head of a site."""

    site: str
    layer: int
    head: int


@dataclass(frozen=True)
class RetrievalHeads:
    """What every head copies.

    Attributes:
        heads: the heads, in the order of the model.
        each: the share of the needle that each of them copied, for each prompt.
        recall: for each prompt the share of the needle's tokens in the answer.
        threshold: the score from which on a head is a retrieval head.
    """

    heads: tuple[Head, ...]
    each: Float[Tensor, "prompts heads"]
    recall: Float[Tensor, " prompts"]
    threshold: float

    @property
    def scores(self) -> dict[Head, float]:
        """The retrieval scores, the highest first."""
        scores = dict(zip(self.heads, self.each.mean(0).tolist(), strict=True))
        return dict(sorted(scores.items(), key=lambda scored: -scored[1]))

    @property
    def retrieval(self) -> tuple[Head, ...]:
        """The retrieval heads, the best first."""
        return tuple(head for head, score in self.scores.items() if score >= self.threshold)

    def table(self) -> Table:
        """The best heads: their score, and the share of prompts in which they copied anything."""
        title = f"{len(self.retrieval)} retrieval heads of {len(self.heads)}; recall {self.recall.mean():.0%}"
        table = Table("site", "head", "score", "active", title=title, title_justify="left", box=SIMPLE_HEAD)
        active = dict(zip(self.heads, (self.each > 0).double().mean(0).tolist(), strict=True))
        for head, score in list(self.scores.items())[:_LISTED]:
            style = "bold" if score >= self.threshold else None
            table.add_row(head.site, f"{head.head}", f"{score:.3f}", f"{active[head]:.0%}", style=style)
        return table

    def figure(self) -> Figure:
        """Scores, layer × head."""
        go, _ = plotly(_OWNER)
        sites = list(dict.fromkeys(head.site for head in self.heads))
        scores = self.scores
        rows = [[score for head, score in sorted(scores.items()) if head.site == site] for site in sites]
        chart = go.Figure(go.Heatmap(z=rows, y=sites, zmin=0, zmax=1, colorscale="Viridis"))
        return chart.update_layout(template="simple_white", xaxis_title="head", title="retrieval score")


@dataclass(frozen=True)
class Masking:
    """What masking retrieval heads does to the answers.

    Attributes:
        heads: the retrieval heads masked.
        plain, masked: recall, the mean share of the needle's tokens in the answer, without and with the mask.
        others, random: other heads drawn, as many each time, and the recall without them.
    """

    heads: tuple[Head, ...]
    plain: float
    masked: float
    others: tuple[tuple[Head, ...], ...]
    random: tuple[float, ...]

    def table(self) -> Table:
        """Recall with and without the heads."""
        table = Table("masked", "recall", title="needle task", title_justify="left", box=SIMPLE_HEAD)
        table.add_row("nothing", f"{self.plain:.1%}")
        table.add_row(f"{len(self.heads)} best retrieval heads", f"{self.masked:.1%}")
        least, most = min(self.random), max(self.random)
        drawn = f"{fmean(self.random):.1%} ({least:.1%} … {most:.1%})"
        table.add_row(f"as many others, drawn {len(self.random)} times", drawn)
        return table

    def figure(self) -> Figure:
        """Recall with and without the heads, as bars."""
        go, _ = plotly(_OWNER)
        names = ["nothing", f"{len(self.heads)} retrieval heads", f"{len(self.heads)} other heads"]
        chart = go.Figure(go.Bar(x=names, y=[self.plain, self.masked, fmean(self.random)]))
        return chart.update_layout(template="simple_white", xaxis_title="masked", yaxis_title="recall")


def retrieval_heads(
    model: nn.Module,
    prompts: Sequence[Needle],
    *,
    threshold: float = 0.1,
    new_tokens: int | None = None,
    teacher: bool = False,
    batch: int = 16,
    progress: Progress | None = None,
) -> RetrievalHeads:
    """The retrieval score of every causal self-attention head of `model`.

    Args:
        model: takes token ids (batch, length) and gives logits of the next token, as a tensor or as ``.logits``.
            Answers are written with its ``generate`` if it has one (greedily, with its cache), else by running it on
            all tokens so far at every step.
        prompts: see `needle_prompts`; they may be of different lengths.
        new_tokens: length of an answer; that of the needle by default.
        teacher: run prompt and needle at once and take w_t to be what the model would write after the right beginning:
            the definition, as long as the model answers rightly.
        batch: prompts in a forward pass with a teacher, filled up at the end.
        progress: told (prompts done, prompts).

    Raises ValueError without prompts and for a model without causal self-attention that can be reached.
    """
    looks = Looks()
    found: list[Tensor] = []
    recall = []
    heads: list[Head] = []
    for prompt, written in asked(model, prompts, (), looks, new_tokens, teacher, batch, progress):
        ids, needle = prompt.ids.tolist(), range(prompt.start, prompt.stop)
        copied = []
        heads = []
        for site, rows in looks.taken():
            for head, positions in enumerate(rows):
                pairs = zip(positions, written, strict=True)
                heads.append(Head(site.name, site.layer, head))
                copied.append(len({place for place, token in pairs if place in needle and ids[place] == token}))
        found.append(torch.tensor(copied) / len(needle))
        recall.append(recalled(prompt, written))
    return RetrievalHeads(tuple(heads), torch.stack(found), torch.tensor(recall), threshold)


def mask_retrieval_heads(
    model: nn.Module,
    prompts: Sequence[Needle],
    found: RetrievalHeads,
    *,
    top: int | None = None,
    draws: int = 5,
    seed: int = 0,
    new_tokens: int | None = None,
    teacher: bool = False,
    batch: int = 16,
    progress: Progress | None = None,
) -> Masking:
    """Recall without the `top` retrieval heads of `found` (all by default), and without as many other heads.

    Others are drawn `draws` times, from `seed`, among the heads below the threshold. Everything else is as for
    `retrieval_heads`; `progress` is told (runs done, runs).

    Raises ValueError if `found` has fewer retrieval heads than that, none, or too few other heads.
    """
    scores, retrieval = found.scores, found.retrieval
    count = len(retrieval) if top is None else top
    problem = f"{count} heads to mask of {len(retrieval)} retrieval heads"
    require(0 < count <= len(retrieval), "mask_retrieval_heads", problem, "lower the threshold or top")
    rest = [head for head in scores if head not in retrieval]
    problem = f"{len(rest)} heads are no retrieval heads, to draw {count} from"
    require(count <= len(rest), "mask_retrieval_heads", problem, "give a smaller top or a higher threshold")
    drawing = random.Random(seed)
    others = tuple(tuple(drawing.sample(rest, count)) for _ in range(draws))
    recalls = []
    masks = [(), retrieval[:count], *others]
    for done, heads in enumerate(masks, 1):
        answers = asked(model, prompts, silence(heads), None, new_tokens, teacher, batch, None)
        recalls.append(fmean(recalled(prompt, written) for prompt, written in answers))
        if progress is not None:
            progress(done, len(masks))
    return Masking(retrieval[:count], recalls[0], recalls[1], others, tuple(recalls[2:]))


def silence(heads: Iterable[Head]) -> list[Edit]:
    """Edits with which these heads answer zero, whatever they attend to."""
    by_site: dict[str, list[int]] = {}
    for each in heads:
        by_site.setdefault(each.site, []).append(each.head)
    return [Edit(Where(sites=site, heads=own), "output", "mask") for site, own in by_site.items()]
