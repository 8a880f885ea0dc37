"""The gated linear attention of TransNormerLLM. "Scaling TransNormer to 175 Billion Parameters", Qin et al., 2023,
arXiv 2307.14995.

    O    = Norm(Q Kᵀ V) ⊙ U                          Q = swish(X W_q),  K = swish(X W_k),  V = X W_v,  U = X W_u
    Y    = O W_o
    a_st = q_sᵀ k_t λ^(s−t) e^(iθ(s−t))              λ = exp(−(8h / H) (1 − l / L)),  h = 1 … H,  l = 0 … L − 1
    Norm(x) = x / (‖x‖ / √d)                         over all heads together, without parameters

a_st is LRPE-d: θ is learnable, one angle for every feature, and of real q and k the real part is what counts,
Σ_d q_sd k_td cos(θ_d (s − t)) λ^(s−t). Only the first layer has θ, the others have λ alone: says 2405.17381, 15–20 %
faster to train and hardly worse than θ in all, which is ``lrpe=True``. As a recurrence, which is how it is decoded (the
paper's robust inference, where nothing grows with t):

    S_t = λ S_{t−1} + k'_t v_tᵀ,   o_t = q'_t S_t         q', k' = `regard.ops.positions.lrpe` of q and k

Cost: time O(n d² / h + n c d) with chunks of c tokens, memory O(n d); the decoding state is d² / h numbers, twice that
with LRPE, and the count of tokens seen.

Differences: none. The authors' weights are trained with the slopes of ALiBi in place of 8h / H, and with
1 − l / (L − 1) + 1e-5: ``decay="alibi"``. The paper does not say where h and l begin; here as in their code. Norm adds
their 1e-6 to the mean square.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.catalogue import Contract, OptionSet, register
from regard.nn.linear.lightning import LightningAttention
from regard.ops.checks import one_of
from regard.ops.linear import linear_attention
from regard.ops.masks import Mask, Segments
from regard.ops.positions import layer_decay, lrpe, lrpe_angles


class TransNormerState(NamedTuple):
    """What a layer keeps while decoding."""

    memory: Float[Tensor, "batch heads key_dim head_dim"]
    seen: Int[Tensor, ""]


@register(
    "transnormer",
    paper="transnormer",
    contract=Contract(
        input="tokens",
        patterns=("causal self",),
        time="n*d*d/h + n*d*d",
        memory="n*d",
        padding=True,
        packed=True,
        step=True,
        state="constant",
        options=(
            OptionSet({"layer": 1, "layers": 3, "bias": True}),
            OptionSet({"layer": 2, "layers": 3, "head_dim": 6, "lrpe": True}),
            OptionSet({"layers": 3, "decay": "alibi", "lrpe": False}),
        ),
    ),
)
class TransNormerAttention(LightningAttention):
    """Gated linear attention with rotations of learnable angle and a fixed decay per head.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        head_dim: width of a head; ``dim / heads`` by default.
        layer, layers: index of this layer and number of layers, which set how far the decay reaches.
        lrpe: whether queries and keys are turned by learnable angles; by default in layer 0.
        decay: ``"linear"`` is the paper's 8h / H, ``"alibi"`` that of the authors' weights.
        bias: whether the projections have biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        layer: int = 0,
        layers: int = 1,
        lrpe: bool | None = None,
        decay: Literal["linear", "alibi"] = "linear",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, heads=heads, head_dim=head_dim, layer=layer, layers=layers, bias=bias, device=device, dtype=dtype
        )
        one_of(self._name, "decay", decay, ("linear", "alibi"))
        if decay == "linear":
            self.log_decay = layer_decay(heads, layer, layers, device=device).to(dtype=self.log_decay.dtype)
        turned = layer == 0 if lrpe is None else lrpe
        angles = lrpe_angles(heads, self.head_dim, device=device).to(dtype=dtype)
        self.angles = nn.Parameter(angles) if turned else None

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Attend causally. `mask` may be `Padding`, or `Segments` whose tokens stand together."""
        self.check_tokens(x, None, mask, None, takes_positions=False)
        self.check_width(x, self.dim)
        query, key, value = self._project(x)
        key, decay = self._masked(key, mask)
        places = mask.places() if isinstance(mask, Segments) else torch.arange(x.shape[1], device=x.device)
        query, key = self._turn(query, key, places)
        return self._read_out(x, linear_attention(query, key, value, log_decay=decay))

    def init_state(self, batch: int) -> TransNormerState:
        """The state before the first token: zeros, at least float32."""
        memory = super().init_state(batch)
        if self.angles is not None:
            memory = torch.cat([memory, memory], dim=2)
        return TransNormerState(memory, torch.zeros((), dtype=torch.int64, device=memory.device))

    def step(
        self, x: Float[Tensor, "batch new dim"], state: TransNormerState
    ) -> tuple[Float[Tensor, "batch new dim"], TransNormerState]:
        """The outputs of one or more further tokens, and the state after them."""
        self.check_step(x, self.dim, state.memory.shape[0])
        query, key, value = self._project(x)
        query, key = self._turn(query, key, state.seen + torch.arange(x.shape[1], device=x.device))
        mixed, memory = linear_attention(
            query, key, value, log_decay=self.log_decay, initial_state=state.memory, return_state=True
        )
        return self._read_out(x, mixed), TransNormerState(memory, state.seen + x.shape[1])

    def _turn(self, query: Tensor, key: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        if self.angles is None:
            return query, key
        return lrpe(query, places, self.angles), lrpe(key, places, self.angles)
