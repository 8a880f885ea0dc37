"""The optional arguments of forward that a case declares, as examples to call it with."""

from __future__ import annotations

from typing import Any

import torch

from regard.ops.masks import Dense, Padding, Segments
from regard.testing.cases import Case, Inputs


def forward_arguments(case: Case, inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Keyword arguments by what they stand for: none, and one set per declared ability.

    The padded batch has a full sample, a shorter one and one that is nothing but padding; the random mask has a row
    that may look at nothing.
    """
    batch, queries, keys = case.sizes(inputs)
    given: dict[str, dict[str, Any]] = {"no mask": {}}
    if case.takes_padding:
        given["padding"] = {"mask": Padding(torch.tensor([keys, keys - keys // 3, 0][:batch]))}
    if case.takes_packed:
        ids = torch.arange(keys) // 4
        given["packed"] = {"mask": Segments(ids, torch.arange(queries) // 4) if case.cross else Segments(ids)}
    if case.contract.any_mask:
        allowed = torch.rand(batch, 1, queries, keys) < 0.5
        allowed[:, :, queries // 2] = False
        given["a random mask"] = {"mask": Dense(allowed)}
    if case.contract.positions:
        given["positions"] = {"positions": 2 * torch.arange(queries)}
    return given
