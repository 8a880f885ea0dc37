"""Attention by additive decay: running averages of values, weighted by a softmax of the keys up to each token.

    g_t = g_{t−1} + exp(k_t),   S_t = (g_{t−1} / g_t) S_{t−1} + (exp(k_t) / g_t) ⊙ r_t v_tᵀ,   o_t = q_t S_t

g is taken for each feature of the keys; r, a factor without a part in g, is 1 or what turns keys to their positions and
may hold several copies of the features, as q and S then do. A decay that is a quotient of sums depends on all keys so
far, and g may be larger than any number: sums are kept as logarithms and every weight is taken relative to a sum of
tokens that come no earlier, so that no exponent is positive. The recurrence is that of "You Only Scan Once", Qin et
al., 2024, arXiv 2405.21022.

Cost, for n tokens, keys of width d and values of width e: time O(n d e + n c (d + e)) with chunks of c tokens, memory
O(n (d + e) + n d e / c). A state is d e and d numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from regard.ops.checks import require
from regard.ops.precision import exact, without_autocast
from regard.ops.scan import associative_scan

CHUNK = 64
"""Tokens that meet in pairs; further ones meet in the state."""


class AdditiveState(NamedTuple):
    """What is left of the tokens so far."""

    log_total: Float[Tensor, "batch heads head_dim"]
    """log g."""
    average: Float[Tensor, "batch heads width value_dim"]
    """S."""

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        head_dim: int,
        value_dim: int,
        *,
        copies: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> AdditiveState:
        """The state before the first token, for keys of width `head_dim` and `copies` times as wide queries."""
        log_total = torch.full((batch, heads, head_dim), torch.finfo(dtype).min, device=device, dtype=dtype)
        return cls(log_total, log_total.new_zeros(batch, heads, copies * head_dim, value_dim))


def additive_scan(
    query: Float[Tensor, "batch heads length width"],
    key: Float[Tensor, "batch heads length head_dim"],
    value: Float[Tensor, "batch heads length value_dim"],
    *,
    turn: Float[Tensor, "batch heads length width"] | None = None,
    real: Bool[Tensor, "#batch length"] | None = None,
    starts: Bool[Tensor, "#batch length"] | None = None,
    initial_state: AdditiveState | None = None,
) -> tuple[Float[Tensor, "batch heads length value_dim"], AdditiveState]:
    """``o_t = Σ_{s≤t} Σ_d q_td exp(k_sd) r_sd v_s / g_td`` and the state after the last token.

    Args:
        query, key, value: of one type, float32 or float64. `key` holds the logarithms k.
        turn: r, as wide as `query`; all ones by default. Its width is a multiple of the keys' width, and feature f
            belongs to key feature ``f mod head_dim``.
        real: which tokens are no padding. Padding is in no sum.
        starts: where a sequence begins anew, for which nothing came before.
        initial_state: what came before the first token.

    Raises ValueError for widths and lengths that do not fit together.
    """
    _check(query, key, value, turn)
    turn = torch.ones_like(query) if turn is None else turn
    with without_autocast(query.device):
        if real is not None:
            padded = ~real[:, None, :, None]
            key, turn = key.masked_fill(padded, least(key)), turn.masked_fill(padded, 0)
        before = None if initial_state is None else initial_state.log_total
        total = running_log_sum(key, starts=starts, before=before)
        out, average = _chunked(query, key, turn, value, total, starts, initial_state)
        return out, AdditiveState(total[:, :, -1].clone(), average)


def additive_scan_both_ways(
    query: Float[Tensor, "batch heads length width"],
    key: Float[Tensor, "batch heads length head_dim"],
    value: Float[Tensor, "batch heads length value_dim"],
    *,
    starts: Bool[Tensor, "#batch length"],
    turn: Float[Tensor, "batch heads length width"] | None = None,
) -> Float[Tensor, "batch heads length value_dim"]:
    """Every token sees all of its own sequence: a pass each way, both scaled to the sums of the whole sequence.

    Arguments are those of `additive_scan`. One sequence alone needs no scan: its softmax is one for all queries.
    """
    _check(query, key, value, turn)
    turn = torch.ones_like(query) if turn is None else turn
    length, copies = key.shape[2], turn.shape[-1] // key.shape[-1]
    with without_autocast(query.device):
        total = running_log_sum(key, starts=starts)
        ends = F.pad(starts[:, 1:], (0, 1), value=True)
        index = torch.arange(length, device=starts.device).masked_fill(~ends, length - 1)
        last = index.flip(-1).cummin(-1).values.flip(-1)[:, None, :, None]
        whole = total.gather(2, last.expand_as(total))
        past, _ = _chunked(query * _copied((total - whole).exp(), copies), key, turn, value, total, starts)
        after = running_log_sum(key.flip(2), starts=ends.flip(1))
        backwards = query.flip(2) * _copied((after - whole.flip(2)).exp(), copies)
        future, _ = _chunked(backwards, key.flip(2), turn.flip(2), value.flip(2), after, ends.flip(1))
        own = (query * widened((key - whole).exp(), turn)).sum(-1, keepdim=True) * value
        return past + future.flip(2) - own


def running_log_sum(
    key: Float[Tensor, "batch heads length head_dim"],
    *,
    starts: Bool[Tensor, "#batch length"] | None = None,
    before: Float[Tensor, "batch heads head_dim"] | None = None,
) -> Float[Tensor, "batch heads length head_dim"]:
    """log g: the logarithm of the sum of exponentials up to each token, from its sequence's start on."""
    (total,) = associative_scan(
        lambda left, right: (torch.logaddexp(left[0], right[0]),),
        (key,),
        dim=2,
        starts=None if starts is None else starts[:, None],
    )
    if before is None:
        return total
    further = torch.logaddexp(total, before.unsqueeze(2))
    return further if starts is None else torch.where(starts.cumsum(-1)[:, None, :, None] == 0, further, total)


@exact
def _chunked(
    query: Float[Tensor, "batch heads length width"],
    key: Float[Tensor, "batch heads length head_dim"],
    turn: Float[Tensor, "batch heads length width"],
    value: Float[Tensor, "batch heads length value_dim"],
    total: Float[Tensor, "batch heads length head_dim"],
    starts: Bool[Tensor, "#batch length"] | None = None,
    initial: AdditiveState | None = None,
) -> tuple[Tensor, Tensor]:
    """``o_t = Σ_{s≤t} Σ_d query_td exp(key_sd − total_td) turn_sd v_s`` and the last S, for non-decreasing `total`.

    `key` and `total` hold for every one of the width / head_dim copies of their features. An exponent is never positive
    because every pair of tokens, s before t, is scaled at a token between them: at the last token of a chunk, or of
    the first half of the smallest half, quarter, … of a chunk that holds both.
    """
    length, size = query.shape[2], 1
    while size < min(CHUNK, length):
        size *= 2
    added = -length % size
    ids = None if starts is None else starts.long().cumsum(-1)[:, None, :, None]
    if added:
        # Tokens without weight that leave the total as it is.
        query, turn, value = (F.pad(part, (0, 0, 0, added)) for part in (query, turn, value))
        key = F.pad(key, (0, 0, 0, added), value=least(key))
        total = torch.cat([total, total[:, :, -1:].expand(-1, -1, added, -1)], 2)
        ids = None if ids is None else torch.cat([ids, ids[:, :, -1:].expand(-1, -1, added, -1)], 2)
    chunked = (-1, size)
    query, key, turn, value, total = (part.unflatten(2, chunked) for part in (query, key, turn, value, total))
    ids = None if ids is None else ids.unflatten(2, chunked)
    out = (query * widened((key - total).exp(), turn)).sum(-1, keepdim=True) * value
    half = 1
    while half < size:
        out = out + _across_halves(query, key, turn, value, total, ids, half)
        half *= 2
    # States at the ends of chunks, led by the one before the first.
    ends, end_ids = total[:, :, :, -1], None if ids is None else ids[:, :, :, -1]
    first, state = (torch.full_like(ends[:, :, 0], torch.finfo(ends.dtype).min), None) if initial is None else initial
    borders = torch.cat([first.unsqueeze(2), ends], 2)
    border_ids = None if end_ids is None else torch.cat([torch.zeros_like(end_ids[:, :, :1]), end_ids], 2)
    update = widened(_ratio(key, ends.unsqueeze(3), ids, _row(end_ids)), turn).mT @ value
    state = torch.zeros_like(update[:, :, 0]) if state is None else state
    kept = _ratio(borders[:, :, :-1], ends, _until_last(border_ids), end_ids)
    kept = F.pad(kept, (0, 0, 1, 0), value=1.0)
    copies = turn.shape[-1] // key.shape[-1]
    updates = torch.cat([state.unsqueeze(2), update], 2)
    _, states = associative_scan(_then, (_copied(kept, copies).unsqueeze(-1), updates), dim=2)
    reach = _ratio(borders[:, :, :-1].unsqueeze(3), total, _row(_until_last(border_ids)), ids)
    out = out + (query * _copied(reach, copies)) @ states[:, :, :-1]
    return out.flatten(2, 3)[:, :, :length], states[:, :, -1].clone()


def _across_halves(
    query: Tensor, key: Tensor, turn: Tensor, value: Tensor, total: Tensor, ids: Tensor | None, half: int
) -> Tensor:
    """What the second `half` tokens of every 2 · `half` see of the first, scaled at the last of the first."""

    def halves(part: Tensor) -> tuple[Tensor, Tensor]:
        first, second = part.unflatten(3, (-1, 2, half)).unbind(4)
        return first, second

    middle = halves(total)[0][..., -1:, :]
    own, (before, after) = (None, (None, None)) if ids is None else (halves(ids)[0][..., -1:, :], halves(ids))
    keys = widened(_ratio(halves(key)[0], middle, before, own), halves(turn)[0])
    copies = turn.shape[-1] // key.shape[-1]
    queries = halves(query)[1] * _copied(_ratio(middle, halves(total)[1], own, after), copies)
    seen = (queries @ keys.mT) @ halves(value)[0]
    return torch.stack([torch.zeros_like(seen), seen], 4).flatten(3, 5)


def _then(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return left[0] * right[0], right[0] * left[1] + right[1]


def _ratio(part: Tensor, whole: Tensor, part_ids: Tensor | None, whole_ids: Tensor | None) -> Tensor:
    """exp(part − whole), zero for another segment."""
    difference = part - whole
    if part_ids is not None and whole_ids is not None:
        difference = difference.masked_fill(part_ids != whole_ids, -torch.inf)
    return difference.exp()


def widened(
    weights: Float[Tensor, "batch heads length head_dim"], turn: Float[Tensor, "batch heads length width"]
) -> Float[Tensor, "batch heads length width"]:
    """`turn` times the weights of its features."""
    return _copied(weights, turn.shape[-1] // weights.shape[-1]) * turn


def _copied(part: Tensor, copies: int) -> Tensor:
    return part if copies == 1 else torch.cat([part] * copies, -1)


def _row(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids.unsqueeze(3)


def _until_last(ids: Tensor | None) -> Tensor | None:
    return None if ids is None else ids[:, :, :-1]


def least(key: Tensor) -> float:
    """Far below any key, and far above what stands for no keys at all."""
    return torch.finfo(key.dtype).min / 2


def _check(query: Tensor, key: Tensor, value: Tensor, turn: Tensor | None) -> None:
    fits = query.shape[:3] == key.shape[:3] == value.shape[:3] and query.shape[-1] % key.shape[-1] == 0
    require(
        fits and (turn is None or turn.shape == query.shape),
        "additive_scan",
        lambda: (
            f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)} and turn "
            f"{None if turn is None else tuple(turn.shape)}"
        ),
        "give one length, a query as wide as the keys or a multiple of it, and a turn of its shape",
    )
