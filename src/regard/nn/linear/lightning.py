"""Lightning attention. "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", Qin et
al., 2024, arXiv 2405.17381, and "Lightning Attention-2", Qin et al., 2024, arXiv 2401.04658.

    S_t = λ_h S_{t−1} + k_t v_tᵀ,   o_t = q_t S_t          λ_h = exp(−slope_h · (1 − l / (L − 1) + 1e-5))
    y   = (SRMSNorm(o) ⊙ x W^U) W^O                        q = swish(x W^Q),  k = swish(x W^K),  v = x W^V

slope_h are ALiBi's; l is the layer and L the number of layers, so that later layers see further. SRMSNorm divides by
the root mean square over all heads together and has no parameters.

Cost: time O(n d² / h + n c d) with chunks of c tokens, memory O(n d); the decoding state is d² / h numbers.

Differences: these slopes are those of the authors' code; the paper's are in `transnormer`, which also has the LRPE of
the first layer. The authors' example layer passes v through swish too, and uses a low-rank sigmoid gate and LayerNorm.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalogue import Contract, OptionSet, register
from regard.nn.mechanism import Mechanism, head_width
from regard.ops.biases import Alibi
from regard.ops.checks import require
from regard.ops.linear import linear_attention
from regard.ops.masks import Mask, Padding, Segments
from regard.ops.precision import statistics_dtype


@register(
    "lightning",
    paper=("lightning", "lightning2"),
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
            OptionSet({"layer": 2, "layers": 3, "head_dim": 6}),
        ),
    ),
)
class LightningAttention(Mechanism):
    """Linear attention with a fixed decay per head, normalised and gated.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        head_dim: width of a head; ``dim / heads`` by default.
        layer, layers: index of this layer and number of layers, which set how far the decay reaches.
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
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.log_decay: Tensor
        require(0 <= layer < layers, self._name, f"layer {layer} of layers {layers}", "count layers from 0")
        self.dim, self.heads, self.head_dim = dim, heads, head_width(self._name, dim, heads, head_dim)
        width, factory = heads * self.head_dim, {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, width, bias=bias, **factory)
        self.key = nn.Linear(dim, width, bias=bias, **factory)
        self.value = nn.Linear(dim, width, bias=bias, **factory)
        self.gate = nn.Linear(dim, width, bias=bias, **factory)
        self.output = nn.Linear(width, dim, bias=bias, **factory)
        depth = 1 - layer / (layers - 1) + 1e-5 if layers > 1 else 1.0
        self.register_buffer("log_decay", -Alibi.for_heads(heads).slopes.to(**factory) * depth)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Mask | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Attend causally. `mask` may be `Padding`, or `Segments` whose tokens stand together."""
        self.check_tokens(x, None, mask, None, takes_positions=False)
        self.check_width(x, self.dim)
        query, key, value = self._project(x)
        key, decay = self._masked(key, mask)
        return self._read_out(x, linear_attention(query, key, value, log_decay=decay))

    def init_state(self, batch: int) -> Float[Tensor, "batch heads head_dim head_dim"]:
        """The state before the first token: zeros, at least float32."""
        weight = self.key.weight
        dtype = statistics_dtype(weight.dtype)
        return torch.zeros(batch, self.heads, self.head_dim, self.head_dim, device=weight.device, dtype=dtype)

    def step(self, x: Float[Tensor, "batch new dim"], state: Tensor) -> tuple[Float[Tensor, "batch new dim"], Tensor]:
        """The outputs of one or more further tokens, and the state after them."""
        self.check_step(x, self.dim, state.shape[0])
        query, key, value = self._project(x)
        mixed, state = linear_attention(
            query, key, value, log_decay=self.log_decay, initial_state=state, return_state=True
        )
        return self._read_out(x, mixed), state

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def split(tensor: Tensor) -> Tensor:
            return rearrange(tensor, "batch length (heads width) -> batch heads length width", heads=self.heads)

        return split(F.silu(self.query(x))), split(F.silu(self.key(x))), split(self.value(x))

    def _masked(self, key: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor]:
        """Keys without padding, and decays that forget what came before a segment."""
        batch, length = key.shape[0], key.shape[2]
        decay = self.log_decay
        if mask is not None:
            mask.validate(batch, self.heads, length, length)
        if isinstance(mask, Padding):
            key = key * mask.real(length)[:, None, :, None].to(key.dtype)
        elif isinstance(mask, Segments):
            forgets = mask.starts().view(-1, 1, length)
            decay = decay.view(1, -1, 1).masked_fill(forgets, -torch.inf).expand(batch, -1, -1)
        return key, decay

    def _read_out(self, x: Tensor, mixed: Tensor) -> Tensor:
        mixed = rearrange(mixed, "batch heads length width -> batch length (heads width)")
        return self.output(F.rms_norm(mixed, mixed.shape[-1:], eps=1e-6) * self.gate(x))
