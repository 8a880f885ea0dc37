"""Aaren. "Attention as an RNN", Feng et al., 2024, arXiv 2405.13956.

    o_t = Σ_{i≤t} exp(s_i) v_i / Σ_{i≤t} exp(s_i)        s_i = q · k_i / √d_h,  q = W_Q token,  k, v = W_K x, W_V x

The query is one learned token, the same at every position of every sequence; each layer of a stack has its own. Of a
set A of positions (m, u, w) is all that has to be known, and disjoint sets combine by an associative operator:

    m_A = max_{i∈A} s_i,   u_A = Σ_{i∈A} exp(s_i − m_A),   w_A = Σ_{i∈A} exp(s_i − m_A) v_i
    m_{A∪B} = max(m_A, m_B)
    u_{A∪B} = u_A exp(m_A − m_{A∪B}) + u_B exp(m_B − m_{A∪B}),   and likewise w

A prefix scan with it gives every o_t = w / u at once, from {i} = (s_i, 1, v_i); the operator applied to the state and
one more token is the recurrence.

Cost: time O(n d²), of which the scan is O(n d), memory O(n d); the decoding state is d + 2h numbers.

Differences: the paper writes one head without the scale. Its parameter count, quoted from memory, is the Transformer's
and d more: multi-head attention whose query is projected from a learned token of width d. No initialisation of the
token was found; here it is normal, like a token after normalisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalogue import Contract, OptionSet, register
from regard.nn.mechanism import Mechanism, head_width
from regard.ops.attention import attention_weights
from regard.ops.masks import Causal, Mask, Padding, Segments
from regard.ops.precision import exact, statistics_dtype
from regard.ops.scan import associative_scan


class Prefix(NamedTuple):
    """What attention knows of a set of tokens; of several, with one more axis after the heads."""

    maximum: Float[Tensor, "batch heads"]
    total: Float[Tensor, "batch heads"]
    weighted: Float[Tensor, "batch heads head_dim"]

    @property
    def mixed(self) -> Float[Tensor, "batch heads head_dim"]:
        """The values' average, zero for no tokens."""
        return self.weighted / self.total.masked_fill(self.total == 0, torch.inf).unsqueeze(-1)


def union(left: Prefix, right: Prefix) -> Prefix:
    """The paper's operator: what is known of both sets of tokens."""
    left, right = Prefix(*left), Prefix(*right)
    # The maximum cancels in the quotient, and so does its gradient.
    maximum = torch.maximum(left.maximum, right.maximum).detach()
    old, new = (left.maximum - maximum).exp(), (right.maximum - maximum).exp()
    return Prefix(
        maximum,
        old * left.total + new * right.total,
        old.unsqueeze(-1) * left.weighted + new.unsqueeze(-1) * right.weighted,
    )


@register(
    "aaren",
    paper="aaren",
    contract=Contract(
        input="tokens",
        patterns=("causal self",),
        time="n*d*d",
        memory="n*d",
        padding=True,
        packed=True,
        step=True,
        state="constant",
        attention_map=True,
        exact=True,
        options=(
            # A key's bias adds the same to every score, which softmax takes off again.
            OptionSet({"bias": True}, {"frozen": ("key.bias",)}),
            OptionSet({"head_dim": 6}),
        ),
    ),
)
class Aaren(Mechanism):
    """Softmax attention of one learned query over every prefix, as a scan and as a recurrence.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        head_dim: width of a head; ``dim / heads`` by default.
        bias: whether the projections have biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, head_width(self._name, dim, heads, head_dim)
        width, factory = heads * self.head_dim, {"device": device, "dtype": dtype}
        self.token = nn.Parameter(torch.empty(dim, **factory))
        self.query = nn.Linear(dim, width, bias=bias, **factory)
        self.key = nn.Linear(dim, width, bias=bias, **factory)
        self.value = nn.Linear(dim, width, bias=bias, **factory)
        self.output = nn.Linear(width, dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A normal token, Glorot-uniform projections, zero biases."""
        nn.init.normal_(self.token)
        for projection in (self.query, self.key, self.value, self.output):
            nn.init.xavier_uniform_(projection.weight)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Attend to every prefix. `mask` may be `Padding`, or `Segments` whose tokens stand together."""
        query, key, value = self.project(x, mask)
        starts = mask.starts().view(-1, 1, x.shape[1]).to(x.device) if isinstance(mask, Segments) else None
        prefixes = associative_scan(union, self.tokens(query, key, value, mask), dim=2, starts=starts)
        return self.combine(Prefix(*prefixes).mixed)

    def attention_map(
        self, x: Float[Tensor, "batch length dim"], *, mask: Mask | None = None
    ) -> tuple[Float[Tensor, "batch heads length length"], Float[Tensor, "batch heads length head_dim"]]:
        """The weights and the values they mix: ``combine(weights @ value)`` is the output."""
        query, key, value = self.project(x, mask)
        own = Causal() if mask is None else Causal() & mask
        return attention_weights(query.expand(key.shape), key, mask=own).to(value.dtype), value

    def combine(self, mixed: Float[Tensor, "batch heads length head_dim"]) -> Float[Tensor, "batch length dim"]:
        """Concatenate the heads and project."""
        mixed = rearrange(mixed, "batch heads length width -> batch length (heads width)")
        return self.output(mixed.to(self.output.weight.dtype))

    def init_state(self, batch: int) -> Prefix:
        """The state before the first token: nothing weighs anything. At least float32."""
        weight = self.key.weight
        dtype = statistics_dtype(weight.dtype)
        nothing = torch.zeros(batch, self.heads, self.head_dim, device=weight.device, dtype=dtype)
        return Prefix(torch.full_like(nothing[..., 0], torch.finfo(dtype).min), nothing[..., 0].clone(), nothing)

    def step(self, x: Float[Tensor, "batch new dim"], state: Prefix) -> tuple[Float[Tensor, "batch new dim"], Prefix]:
        """The outputs of one or more further tokens, and the state after them."""
        self.check_step(x, self.dim, state.total.shape[0])
        prefixes = associative_scan(union, self.tokens(*self.project(x, None), None), dim=2)
        before = Prefix(*(known.unsqueeze(2) for known in state))
        after = union(before, Prefix(*prefixes))
        return self.combine(after.mixed), Prefix(*(known[:, :, -1].clone() for known in after))

    def project(self, x: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor, Tensor]:
        """Checked arguments as the query's heads (1, heads, 1, head_dim), key heads and value heads."""
        self.check_tokens(x, None, mask, None, takes_positions=False)
        self.check_width(x, self.dim)
        if mask is not None:
            mask.validate(x.shape[0], self.heads, x.shape[1], x.shape[1])
        pattern = "batch length (heads width) -> batch heads length width"
        query, key, value = (
            rearrange(projected, pattern, heads=self.heads)
            for projected in (self.query(self.token[None, None]), self.key(x), self.value(x))
        )
        return query, key, value

    @staticmethod
    def tokens(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> Prefix:
        """Every token as a set of its own, (s_i, 1, v_i); padding as no token at all."""
        score, value = scores(query, key), value.to(statistics_dtype(value.dtype))
        known = Prefix(score, torch.ones_like(score), value)
        if not isinstance(mask, Padding):
            return known
        padded = ~mask.real(key.shape[2])[:, None].to(key.device)
        return Prefix(
            score.masked_fill(padded, torch.finfo(score.dtype).min),
            known.total.masked_fill(padded, 0),
            value.masked_fill(padded.unsqueeze(-1), 0),
        )


@exact
def scores(query: Tensor, key: Tensor) -> Float[Tensor, "batch heads length"]:
    """Scaled products of the one query of each head with its keys."""
    precise = statistics_dtype(key.dtype)
    scaled = query.to(precise) * query.shape[-1] ** -0.5
    return (key.to(precise) @ scaled.mT).squeeze(-1)
