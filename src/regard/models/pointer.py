"""A network whose answers point at its inputs, around any mechanism. "Pointer Networks", Vinyals et al., 2015, arXiv
1506.03134.

    e_1 … e_n, s = LSTM(P_1 … P_n)                            inputs read one by one
    d_i          = LSTM(P_(C_(i−1)); s)                       the input chosen before, after a begin symbol ⇒
    p(C_i)       = the mechanism's weights, d_i on [e_1 … e_n, e_⇐]

Training maximises the probability of the answers C, teacher-forced; decoding is greedy or a beam search. The end
symbol ⇐ is one more input to point at. What may be chosen is part of the distribution, in training as in decoding, so
that what decoding reports is the probability that `forward` gives.

The paper's network has one head of `pointer`, one layer of 256 or 512 units, weights from −0.08 to 0.08, and is trained
by SGD with a learning rate of 1, batches of 128, and gradients clipped to a norm of 2.

Differences: the paper does not say what e_⇐ is: here a learned vector, as P_⇒ is. It leaves out only tours that are not
valid, and only in the beam search. A mechanism of several heads points by the mean of their weights. What a mechanism
mixes by its weights is not used here, so that the projections of its values and output learn nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from regard.catalogue import Card, card
from regard.models.mixers import build_mixers
from regard.nn.scores.pointer import INITIAL
from regard.ops.checks import one_of, require
from regard.ops.masks import Dense
from regard.ops.precision import statistics_dtype

IGNORED = -100
"""What fills up answers that are shorter than others."""

Choose = Literal["any", "once", "all"]
State = tuple[Tensor, Tensor]


def can_point(entry: Card) -> bool:
    """Whether a mechanism's weights are a distribution over the inputs that any of them can be left out of."""
    contract = entry.contract
    return (
        contract.input == "tokens"
        and "noncausal cross" in contract.patterns
        and contract.exact
        and contract.attention_map
        and contract.any_mask
    )


class PointerNetwork(nn.Module):
    """Points in, log-probabilities of pointing at each of them, or at the end, out.

    Args:
        features: width of an input.
        mechanism: key of an exact mechanism with the pattern "noncausal cross", any mask and an attention map.
        dim: units of both LSTMs.
        heads: number of heads of the mechanism.
        choose: how often an input may be pointed at: ``"any"`` number of times, at most ``"once"``, or ``"all"`` of
            them once before the end.
        options: further arguments of the mechanism.
    """

    def __init__(
        self,
        features: int = 2,
        mechanism: str = "pointer",
        *,
        dim: int = 256,
        heads: int = 1,
        choose: Choose = "any",
        options: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require(features > 0, "PointerNetwork", f"features {features}", "give a positive number")
        one_of("PointerNetwork", "choose", choose, ("any", "once", "all"))
        require(
            can_point(card(mechanism)),
            "PointerNetwork",
            f"mechanism {mechanism!r} cannot point",
            "choose an exact one with 'noncausal cross', any_mask and an attention_map",
        )
        self.choose: Choose = choose
        factory = {"device": device, "dtype": dtype}
        self.encoder = nn.LSTM(features, dim, batch_first=True, **factory)
        self.decoder = nn.LSTM(features, dim, batch_first=True, **factory)
        self.begin = nn.Parameter(torch.empty(features, **factory))
        self.end = nn.Parameter(torch.empty(dim, **factory))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -INITIAL, INITIAL)
        (self.pointer,) = build_mixers(
            mechanism, dim, heads=heads, layers=1, pattern="noncausal cross", options=options, **factory
        )

    def forward(
        self,
        points: Float[Tensor, "batch inputs features"],
        answers: Int[Tensor, "batch steps"],
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch steps_and_end inputs_and_end"]:
        """The log-distribution before each index of `answers`, and after the last; the last column is the end.

        Points beyond `lengths`, and answers that are `IGNORED`, are padding.
        """
        memory, state, real = self._encode(points, lengths)
        require(
            answers.ndim == 2 and len(answers) == len(points),
            "PointerNetwork",
            lambda: f"answers of shape {tuple(answers.shape)} for {len(points)} sets of points",
            "give indices of shape (batch, steps)",
        )
        begin = self.begin.expand(len(points), 1, -1)
        decoded, _ = self.decoder(torch.cat([begin, _take(points, answers.clamp(min=0))], dim=1), state)
        known = (answers >= 0)[..., None]
        chosen = (F.one_hot(answers.clamp(min=0), points.shape[1]).bool() & known).cumsum(1) > 0
        chosen = torch.cat([torch.zeros_like(real)[:, None], chosen], dim=1)
        return self._point(decoded, memory, self._allowed(real[:, None], chosen))

    def loss(
        self,
        points: Float[Tensor, "batch inputs features"],
        answers: Int[Tensor, "batch steps"],
        *,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """Negative log-probability of the answers, each with its end, a step."""
        targets = ended(answers, points.shape[1])
        logs = self(points, answers, lengths=lengths)
        return F.nll_loss(logs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def decode(
        self,
        points: Float[Tensor, "batch inputs features"],
        *,
        lengths: Int[Tensor, " batch"] | None = None,
        beams: int = 1,
        longest: int | None = None,
    ) -> tuple[Int[Tensor, "batch steps"], Float[Tensor, "batch"]]:
        """The most probable answers that a beam search finds, filled up with `IGNORED`, and their log-probabilities.

        One beam is greedy. An answer of `longest` indices is cut there, without its end; where an input may be pointed
        at any number of times there is no other limit, and it must be given.
        """
        require(beams > 0, "PointerNetwork", f"beams {beams}", "give a positive number")
        require(
            longest is not None or self.choose != "any",
            "PointerNetwork",
            "no longest answer, with choose='any'",
            "give longest: an input may be pointed at again and again",
        )
        memory, state, real = self._encode(points, lengths)
        batch, inputs = points.shape[:2]
        memory, real, places = (_for_each_beam(part, beams) for part in (memory, real, points))
        state = (_for_each_beam(state[0], beams, 1), _for_each_beam(state[1], beams, 1))
        logs = memory.new_full((batch, beams), -torch.inf, dtype=statistics_dtype(memory.dtype))
        logs[:, 0] = 0.0
        answers = torch.empty(batch, beams, 0, dtype=torch.long, device=points.device)
        chosen = torch.zeros_like(real)
        ends = torch.zeros(batch, beams, dtype=torch.bool, device=points.device)
        fed = self.begin.expand(batch * beams, 1, -1)
        after_end = F.one_hot(torch.tensor(inputs, device=points.device), inputs + 1).log().to(logs.dtype)
        for _ in range(inputs + 1 if longest is None else longest):
            decoded, state = self.decoder(fed, state)
            step = self._point(decoded, memory, self._allowed(real, chosen)[:, None])
            step = torch.where(ends[..., None], after_end, step.view(batch, beams, -1))
            logs, found = (logs[..., None] + step).flatten(1).topk(beams)
            origin, pointed = found // (inputs + 1), found % (inputs + 1)
            answers = torch.cat([_take(answers, origin), pointed[..., None]], dim=-1)
            ends = pointed == inputs
            rows = (origin + beams * torch.arange(batch, device=points.device)[:, None]).flatten()
            state = (state[0][:, rows], state[1][:, rows])
            index = pointed.flatten().clamp(max=inputs - 1)
            chosen = chosen[rows] | (F.one_hot(index, inputs).bool() & ~ends.view(-1, 1))
            fed = _take(places, index[:, None])
            if ends[:, 0].all():  # the others only become less probable
                break
        best = answers[:, 0].masked_fill(answers[:, 0] == inputs, IGNORED)
        return best[:, : int((best >= 0).sum(1).max())], logs[:, 0]

    def _encode(self, points: Tensor, lengths: Tensor | None) -> tuple[Tensor, State, Bool[Tensor, "batch inputs"]]:
        """The inputs with the end symbol behind them, the decoder's first state, and which inputs are real."""
        features = self.encoder.input_size
        require(
            points.ndim == 3 and points.shape[1] > 0 and points.shape[2] == features,
            "PointerNetwork",
            lambda: f"points of shape {tuple(points.shape)}",
            f"give at least one input: (batch, inputs, {features})",
        )
        batch, inputs = points.shape[:2]
        real = torch.ones(batch, inputs, dtype=torch.bool, device=points.device)
        if lengths is None:
            memory, state = self.encoder(points)
        else:
            require(
                lengths.shape == (batch,) and bool(((lengths > 0) & (lengths <= inputs)).all()),
                "PointerNetwork",
                lambda: f"lengths {lengths.tolist()} for points of shape {tuple(points.shape)}",
                lambda: f"give {batch} numbers from 1 to {inputs}",
            )
            real = torch.arange(inputs, device=points.device) < lengths.to(points.device)[:, None]
            packed = pack_padded_sequence(points, lengths.cpu(), batch_first=True, enforce_sorted=False)
            memory, state = self.encoder(packed)
            memory, _ = pad_packed_sequence(memory, batch_first=True, total_length=inputs)
        return torch.cat([memory, self.end.expand(batch, 1, -1)], dim=1), state, real

    def _allowed(self, real: Tensor, chosen: Bool[Tensor, "... inputs"]) -> Bool[Tensor, "... inputs_and_end"]:
        """What may be pointed at after `chosen`."""
        left = real & ~chosen if self.choose != "any" else real.expand_as(chosen)
        ends = ~left.any(-1, keepdim=True) if self.choose == "all" else torch.ones_like(left[..., :1])
        return torch.cat([left, ends], dim=-1)

    def _point(self, decoded: Tensor, memory: Tensor, allowed: Bool[Tensor, "batch steps keys"]) -> Tensor:
        mask = Dense(allowed[:, None])
        exactly = getattr(self.pointer, "log_distribution", None)
        if exactly is not None:
            return exactly(decoded, memory, mask=mask)
        weights, _ = self.pointer.attention_map(decoded, memory, mask=mask)
        mean = weights.to(statistics_dtype(weights.dtype)).mean(1)
        # A weight may be so small that it is 0, which the loss must survive.
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log().masked_fill(~allowed, -torch.inf)


def ended(answers: Int[Tensor, "batch steps"], inputs: int) -> Int[Tensor, "batch steps_and_end"]:
    """Answers with the index of the end, `inputs`, behind the last of each."""
    targets = F.pad(answers, (0, 1), value=IGNORED)
    counts = (answers >= 0).sum(1, keepdim=True)
    return targets.scatter(1, counts, inputs)


def _take(values: Float[Tensor, "batch inputs features"], index: Int[Tensor, "batch steps"]) -> Tensor:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def _for_each_beam(values: Tensor, beams: int, axis: int = 0) -> Tensor:
    return values.repeat_interleave(beams, dim=axis)
