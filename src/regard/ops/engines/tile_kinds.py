"""How a row of tiles becomes weights: with a statistic carried along (softmax), with two, or score by score."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from regard.ops.engines.tile_loop import BackwardTiles, Step, TileLoop
from regard.ops.masks.plan import KeyRange
from regard.ops.normalizers import Pointwise, SoftplusL1

LOG2E = 1 / log(2)
"""What makes of a natural logarithm one to base 2."""


class SoftmaxLoop(TileLoop):
    """Each range of keys is softmaxed alone and merged by its log-sum-exp.

    Scores are logarithms to base 2: torch's `exp2` is several times faster than its `exp` and its fused softmax.
    """

    empty_lse = -torch.inf
    unit = LOG2E

    def mix(self, step: Step) -> tuple[Tensor, Tensor]:
        query = self.scaled_query(step)
        running: tuple[Tensor, Tensor] | None = None
        for keys in step.ranges:
            scores = self.scores(query, self.keys_of(self.key, step, keys), step, keys)
            weights, total, lse = exponentials(scores)
            kept = self.kept(step, keys)
            if kept is not None:
                weights.mul_(kept)
            mixed = torch.bmm(weights, self.keys_of(self.value, step, keys)).div_(total)
            running = (mixed, lse) if running is None else merge(*running, mixed, lse)
        assert running is not None
        return running[0], running[1] / LOG2E

    def backward_over(self, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> BackwardTiles:
        return _SoftmaxBackward(self, out, lse, grad_out, grad_lse)


def exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Powers of 2, in place of scores, over the highest of a row; their sum to divide by, and its logarithm in full."""
    highest = finite(scores.amax(-1, keepdim=True))
    powers = scores.sub_(highest).exp2_()
    total = powers.sum(-1, keepdim=True)
    # The highest adds 1: only an empty row has less.
    return powers, total.clamp(min=1.0), total.log2().add_(highest)


def merge(mixed: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys, from log-sum-exps to base 2."""
    total = torch.logaddexp2(lse, more_lse)
    level = finite(total)
    return mixed.mul_((lse - level).exp2_()).addcmul_(more, (more_lse - level).exp2_()), total


class _SoftmaxBackward(BackwardTiles):
    """``dS = P ∘ (dP − δ)`` with ``P = exp(S − lse)``; δ is what the row's normalisation takes from each gradient."""

    def __init__(self, loop: SoftmaxLoop, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> None:
        self.loop = loop
        delta = torch.linalg.vecdot(grad_out.to(loop.dtype), out.to(loop.dtype))
        self.minus_lse, self.minus_delta = finite(lse * LOG2E).neg_(), grad_lse - delta

    def enter(self, step: Step, query: Tensor, grad: Tensor) -> None:
        place = (step.rows, slice(None), slice(*step.queries))
        self.start, self.shift = (each[place].flatten(1, 2)[..., None] for each in (self.minus_lse, self.minus_delta))
        self.query, self.grad = query, grad

    def tile(self, step: Step, keys: KeyRange) -> tuple[Tensor, Tensor]:
        loop = self.loop
        weights = loop.scores(self.query, loop.keys_of(loop.key, step, keys), step, keys, self.start).exp2_()
        value, kept = loop.keys_of(loop.value, step, keys), loop.kept(step, keys)
        if kept is None:
            return weights, loop.product("grad", self.grad, value, self.shift).mul_(weights)
        grad_scores = loop.product("grad", self.grad, value).mul_(kept).add_(self.shift).mul_(weights)
        return weights.mul_(kept), grad_scores


class PointwiseLoop(TileLoop):
    """Every weight comes from its own score: nothing is carried along a row."""

    normalizer: Pointwise

    def mix(self, step: Step) -> tuple[Tensor, None]:
        query, counts = self.scaled_query(step), self.counts(step)
        mixed = query.new_zeros(*query.shape[:2], self.value.shape[-1])
        for keys in step.ranges:
            scores = self.scores(query, self.keys_of(self.key, step, keys), step, keys)
            weights, kept = self.normalizer.weights(scores, counts), self.kept(step, keys)
            if kept is not None:
                weights.mul_(kept)
            mixed.baddbmm_(weights, self.keys_of(self.value, step, keys))
        return mixed, None

    def backward_over(self, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> BackwardTiles:
        return _PointwiseBackward(self)


class _PointwiseBackward(BackwardTiles):
    """``dS = f′(S) ∘ dP``."""

    def __init__(self, loop: PointwiseLoop) -> None:
        self.loop = loop

    def enter(self, step: Step, query: Tensor, grad: Tensor) -> None:
        self.query, self.grad, self.counts = query, grad, self.loop.counts(step)

    def tile(self, step: Step, keys: KeyRange) -> tuple[Tensor, Tensor]:
        loop = self.loop
        scores = loop.scores(self.query, loop.keys_of(loop.key, step, keys), step, keys)
        weights = loop.normalizer.weights(scores, self.counts)
        grad_scores = loop.product("grad", self.grad, loop.keys_of(loop.value, step, keys))
        grad_scores.mul_(loop.normalizer.slope(weights, self.counts))
        kept = loop.kept(step, keys)
        if kept is not None:
            grad_scores.mul_(kept)
            weights.mul_(kept)
        return weights, grad_scores


class SoftplusLoop(TileLoop):
    """Two statistics: the row's sum of softplus, then, in a second walk, the sum of what re-weighting makes of it."""

    empty_lse = -torch.inf
    normalizer: SoftplusL1

    def mix(self, step: Step) -> tuple[Tensor, Tensor]:
        query, counts = self.scaled_query(step), self.counts(step)
        level = query.new_full((*query.shape[:2], 1), -torch.inf)
        for keys in step.ranges:
            level = torch.logaddexp(level, self.logs(query, counts, step, keys)[1].logsumexp(-1, keepdim=True))
        shift = finite(level)
        mixed, total = query.new_zeros(*query.shape[:2], self.value.shape[-1]), self.floor(level) * LOG2E
        for keys in step.ranges:
            logs, _ = self.normalizer.sharpened(self.logs(query, counts, step, keys)[1] - shift, counts)
            more = logs.logsumexp(-1, keepdim=True)
            weights, kept = (logs - finite(more)).exp_(), self.kept(step, keys)
            if kept is not None:
                weights.mul_(kept)
            mixed, total = merge(mixed, total, torch.bmm(weights, self.keys_of(self.value, step, keys)), more * LOG2E)
        return mixed, level

    def logs(self, query: Tensor, counts: Tensor, step: Step, keys: KeyRange) -> tuple[Tensor, Tensor]:
        """Scores of a range of keys, and the logarithms of their softplus."""
        scores = self.scores(query, self.keys_of(self.key, step, keys), step, keys)
        return scores, self.normalizer.logs(scores, counts)

    def floor(self, level: Tensor) -> Tensor:
        """What the sum over re-weighted shares starts from, as a logarithm."""
        return torch.full_like(level, -torch.inf if self.normalizer.power is None else self.normalizer.LOG_EPSILON)

    def backward_over(self, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor) -> BackwardTiles:
        return _SoftplusBackward(self, out, lse, grad_out)


class _SoftplusBackward(BackwardTiles):
    """``dS = (U − A Σ_j U) f′(S)`` with ``U = W′ ∘ (dP − δ)``; A are the shares, W′ how a weight follows its share."""

    def __init__(self, loop: SoftplusLoop, out: Tensor, lse: Tensor, grad_out: Tensor) -> None:
        self.loop, self.lse = loop, lse
        self.delta = torch.linalg.vecdot(grad_out.to(loop.dtype), out.to(loop.dtype))

    def enter(self, step: Step, query: Tensor, grad: Tensor) -> None:
        place = (step.rows, slice(None), slice(*step.queries))
        level = self.lse[place].flatten(1, 2)[..., None]
        self.level, self.shift = finite(level), self.delta[place].flatten(1, 2)[..., None]
        self.query, self.grad, self.counts = query, grad, self.loop.counts(step)
        self.total, self.sum = self.loop.floor(level), torch.zeros_like(level)
        for keys in step.ranges:
            _, _, logs, steepness = self._logs(step, keys)
            total = torch.logaddexp(self.total, logs.logsumexp(-1, keepdim=True))
            self.sum.mul_((self.total - finite(total)).exp_())
            self.total = total
            self.sum.add_(self._grad_logs(step, keys, steepness)[0].sum(-1, keepdim=True))

    def tile(self, step: Step, keys: KeyRange) -> tuple[Tensor, Tensor]:
        scores, softplus, logs, steepness = self._logs(step, keys)
        slope = self.loop.normalizer.slope(scores, softplus, self.counts)
        grad_scores, kept = self._grad_logs(step, keys, steepness)
        grad_scores.sub_((softplus - self.level).exp_().mul_(self.sum)).mul_(slope)
        weights = (logs - finite(self.total)).exp_()
        return weights if kept is None else weights.mul_(kept), grad_scores

    def _logs(self, step: Step, keys: KeyRange) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores, softplus = self.loop.logs(self.query, self.counts, step, keys)
        return scores, softplus, *self.loop.normalizer.sharpened(softplus - self.level, self.counts)

    def _grad_logs(self, step: Step, keys: KeyRange, steepness: Tensor) -> tuple[Tensor, Tensor | None]:
        """U, and the dropout factors."""
        grad = self.loop.product("grad", self.grad, self.loop.keys_of(self.loop.value, step, keys))
        kept = self.loop.kept(step, keys)
        if kept is not None:
            grad.mul_(kept)
        return grad.sub_(self.shift).mul_((steepness - finite(self.total)).exp_()), kept


def finite(level: Tensor) -> Tensor:
    """A logarithm that may be subtracted. Empty rows have −inf: exp(−inf − level) is 0 for every finite level."""
    return level.clamp(min=torch.finfo(level.dtype).min)
