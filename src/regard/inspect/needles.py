"""Prompts that ask for a needle in a long text, and the answers that a model writes to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from regard.ops.checks import require
from regard.sites import AttentionCall, Edit, Site, attach
from regard.sites.call import TILE

_OWNER = "retrieval_heads"

Progress = Callable[[int, int], None]
"""Told how many of how many are done."""


@dataclass(frozen=True)
class Needle:
    """A prompt that asks for a part of itself.

    Attributes:
        ids: the prompt's tokens; the answer is to follow.
        start, stop: where the needle k is among them, ``ids[start:stop]``: the tokens to copy, and the right answer.

    Raises ValueError for an empty span and one outside the prompt.
    """

    ids: Int[Tensor, " length"]
    start: int
    stop: int

    def __post_init__(self) -> None:
        fits = self.ids.ndim == 1 and 0 <= self.start < self.stop <= len(self.ids)
        span = f"needle {self.start} … {self.stop} in ids of shape {tuple(self.ids.shape)}"
        require(fits, "Needle", span, "give ids (length,) and a span inside them that is not empty")

    @property
    def answer(self) -> list[int]:
        return self.ids[self.start : self.stop].tolist()


def needle_prompts(
    tokenizer: Any,
    text: str,
    needle: str,
    question: str,
    *,
    answer: str | None = None,
    lengths: Sequence[int] = tuple(round(1000 + 49000 * step / 19) for step in range(20)),
    depths: Sequence[float] = tuple(step / 9 for step in range(10)),
) -> list[Needle]:
    """A prompt for each length and depth: `text` with `needle` put in after a sentence, then `question`.

    Args:
        tokenizer: a fast tokenizer of transformers, which tells where in a text its tokens are.
        text: what the needle is hidden in; repeated if it is too short.
        question: everything after the text, with the words that make the model answer.
        answer: the part of the needle that the model is to repeat; all of it by default.
        lengths: tokens in a prompt, about; the paper's are 20 from 1000 to 50 000.
        depths: the needle's place, from 0 (start) to 1 (end); the paper's are 10.

    Raises ValueError for a tokenizer without offsets, an answer that is not in the needle, and lengths without room.
    """
    answer = needle if answer is None else answer
    require(answer in needle, "needle_prompts", f"answer {answer!r} is not in the needle", "give a part of the needle")
    require(
        getattr(tokenizer, "is_fast", False),
        "needle_prompts",
        f"{type(tokenizer).__name__} does not tell where its tokens are",
        "load a fast tokenizer, or make Needle(ids, start, stop) yourself",
    )

    def places(text: str) -> list[tuple[int, int]]:
        return tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]

    own = len(places(f"{needle} {question}"))
    words = places(f"{text} ")
    require(bool(words), "needle_prompts", "text is empty", "give any text")
    text = f"{text} " * (max(lengths) // len(words) + 1)
    words = places(text)
    made = []
    for length in lengths:
        kept = length - own
        problem = f"length {length} for a needle and question of {own} tokens"
        require(kept > 0, "needle_prompts", problem, "give longer lengths")
        body = text[: words[kept - 1][1]]
        for depth in depths:
            require(0 <= depth <= 1, "needle_prompts", f"depth {depth}", "give shares of the text, 0 … 1")
            before = body[: words[round(depth * kept) - 1][1]] if round(depth * kept) else ""
            if depth < 1:
                before = before[: before.rfind(".") + 1]
            head = f"{before} " if before else ""
            prompt = f"{head}{needle}{body[len(before) :]}\n{question}"
            first = len(head) + needle.index(answer)
            made.append(_located(tokenizer, prompt, first, first + len(answer)))
    return made


def _located(tokenizer: Any, prompt: str, first: int, last: int) -> Needle:
    coded = tokenizer(prompt, return_offsets_mapping=True)
    inside = [
        place
        for place, (start, stop) in enumerate(coded["offset_mapping"])
        if start < last and stop > max(first, start)
    ]
    return Needle(torch.tensor(coded["input_ids"]), inside[0], inside[-1] + 1)


class Looks:
    """The instrument that keeps where each head looks most, for the rows that answer."""

    def __init__(self) -> None:
        self.rows: list[slice] = []
        self._seen: dict[Site, list[Tensor]] = {}
        self._first = self._sample = 0

    def begin(self, rows: list[slice] | None) -> None:
        """Forget, and read these rows of each sample from now on; the last row without."""
        self.rows, self._seen, self._sample = rows or [], {}, 0

    def __call__(self, call: AttentionCall) -> AttentionCall:
        if call.site.kind != "self" or not call.site.causal:
            return call
        first = min((rows.start for rows in self.rows), default=call.queries - 1)
        last = max((rows.stop for rows in self.rows), default=call.queries)
        steps = range(first, last, TILE)
        most = [call.weights(slice(start, min(start + TILE, last))).argmax(-1) for start in steps]
        self._seen.setdefault(call.site, []).append(torch.cat(most, -1) + call.key_start)
        self._first = first
        return call

    def taken(self) -> Iterator[tuple[Site, list[list[int]]]]:
        """Of the next sample, per site and head, the position looked at for each token written."""
        require(
            bool(self._seen),
            _OWNER,
            "the model has no causal self-attention that can be reached",
            "sites.find(model).table() shows what was seen",
        )
        sample, self._sample = self._sample, self._sample + 1
        for site, steps in self._seen.items():
            most = torch.cat(steps, -1)[sample]
            if self.rows:
                rows = self.rows[sample]
                most = most[:, rows.start - self._first : rows.stop - self._first]
            yield site, most.tolist()


def asked(
    model: nn.Module,
    prompts: Sequence[Needle],
    edits: Sequence[Edit],
    looks: Looks | None,
    new_tokens: int | None,
    teacher: bool,
    batch: int,
    progress: Progress | None,
) -> Iterator[tuple[Needle, list[int]]]:
    """Each prompt with what the model writes after it; `looks` is then that of this prompt."""
    require(len(prompts) > 0, _OWNER, "no prompts", "give at least one")
    problem = f"new_tokens {new_tokens} with a teacher"
    require(not (teacher and new_tokens is not None), _OWNER, problem, "the teacher's answer is as long as the needle")
    watch = () if looks is None else (looks,)
    size = batch if teacher else 1
    done = 0
    for start in range(0, len(prompts), size):
        group = prompts[start : start + size]
        with torch.no_grad(), attach(model, *edits, *watch):
            if looks is not None:
                looks.begin([_answering(prompt) for prompt in group] if teacher else None)
            written = _taught(model, group) if teacher else [_write(model, group[0], new_tokens)]
        for pair in zip(group, written, strict=True):
            yield pair
            done += 1
            if progress is not None:
                progress(done, len(prompts))


def _answering(prompt: Needle) -> slice:
    """The rows that write the answer, where it follows the prompt."""
    return slice(len(prompt.ids) - 1, len(prompt.ids) - 1 + prompt.stop - prompt.start)


def _taught(model: nn.Module, group: Sequence[Needle]) -> list[list[int]]:
    """What the model would write at each place of the right answer. Being causal, it does not see the filling."""
    taught = [torch.cat([prompt.ids, prompt.ids[prompt.start : prompt.stop - 1]]) for prompt in group]
    filling = float(group[0].ids[-1])
    ids = nn.utils.rnn.pad_sequence(taught, batch_first=True, padding_value=filling).to(_device(model))
    best = _logits(model(ids)).argmax(-1)
    return [best[row, _answering(prompt)].tolist() for row, prompt in enumerate(group)]


def _write(model: nn.Module, prompt: Needle, new_tokens: int | None) -> list[int]:
    count = prompt.stop - prompt.start if new_tokens is None else new_tokens
    ids = prompt.ids[None].to(_device(model))
    if hasattr(model, "generate"):
        options = {"max_new_tokens": count, "do_sample": False, "num_beams": 1}
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # pyright: ignore[reportCallIssue]
    else:
        for _ in range(count):
            ids = torch.cat([ids, _logits(model(ids))[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt.ids) :].tolist()


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def recalled(prompt: Needle, written: list[int]) -> float:
    """Share of the needle's tokens that were written (recall of ROUGE-1)."""
    return (Counter(prompt.answer) & Counter(written)).total() / len(prompt.answer)
