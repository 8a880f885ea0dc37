"""Which token is which: labels and kinds (text, image, …) that selections and captured data refer to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from regard.ops.checks import one_of, require

GENERATED = "generated"
"""The kind of every token after those that were labelled."""


@dataclass(frozen=True)
class Tokens:
    """Labels and kinds of a batch of token sequences, all of one length.

    Attributes:
        labels: per sample the tokens' texts, or a patch's place in the image.
        kinds: per sample ``"text"``, ``"image"``, ``"video"``, ``"special"``, ``"patch"``, … for each token.
    """

    labels: tuple[tuple[str, ...], ...]
    kinds: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        lengths = {len(row) for row in (*self.labels, *self.kinds)}
        require(
            len(self.labels) == len(self.kinds) > 0 and len(lengths) == 1,
            "Tokens",
            f"{len(self.labels)} rows of labels, {len(self.kinds)} of kinds, of lengths {sorted(lengths)}",
            "give one label and one kind per token, and rows of one length (pad them)",
        )

    @classmethod
    def of(cls, model: nn.Module, input_ids: Int[Tensor, "batch length"], tokenizer: Any = None) -> Tokens:
        """Labels by `tokenizer` (the ids themselves without one), kinds by the image and video ids of the config."""
        config = getattr(model, "config", None)
        names = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}
        placeholders = {
            number: kind
            for kind, attributes in names.items()
            for attribute in attributes
            if (number := getattr(config, attribute, None)) is not None
        }
        special = set(getattr(tokenizer, "all_special_ids", ()))
        rows = input_ids.tolist()
        kinds = tuple(
            tuple(placeholders.get(number, "special" if number in special else "text") for number in row)
            for row in rows
        )
        if tokenizer is None:
            return cls(tuple(tuple(map(str, row)) for row in rows), kinds)
        return cls(tuple(tuple(tokenizer.convert_ids_to_tokens(row)) for row in rows), kinds)

    @classmethod
    def patches(cls, grid: tuple[int, int], *, prefix: Sequence[str] = (), batch: int = 1) -> Tokens:
        """Image patches in row-major order, each labelled ``"row,column"``, after `prefix` special tokens."""
        places = [f"{row},{column}" for row in range(grid[0]) for column in range(grid[1])]
        labels = (*prefix, *places)
        kinds = (*("special",) * len(prefix), *("patch",) * len(places))
        return cls((labels,) * batch, (kinds,) * batch)

    @property
    def length(self) -> int:
        return len(self.labels[0])

    def spans(self, sample: int = 0) -> list[tuple[str, int, int]]:
        """Runs of one kind as (kind, start, stop), in order."""
        runs: list[tuple[str, int, int]] = []
        for position, kind in enumerate(self.kinds[sample]):
            if runs and runs[-1][0] == kind:
                runs[-1] = (kind, runs[-1][1], position + 1)
            else:
                runs.append((kind, position, position + 1))
        return runs

    def are(self, kind: str, positions: Int[Tensor, " length"]) -> Bool[Tensor, "batch length"]:
        """Whether the tokens at these positions are of a kind; those after the labelled ones are ``"generated"``."""
        known = sorted({each for row in self.kinds for each in row} | {GENERATED})
        one_of("Tokens", "kind", kind, known)
        table = [[each == kind for each in row] + [kind == GENERATED] for row in self.kinds]
        hits = torch.tensor(table, device=positions.device)
        return hits[:, positions.clamp(max=self.length)]
