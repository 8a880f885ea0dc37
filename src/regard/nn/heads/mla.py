"""Multi-head latent attention. "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
DeepSeek-AI, 2024, arXiv 2405.04434; its decode step: "The New LLM Bottleneck: A Systems Perspective on Latent Attention
and Mixture-of-Experts", Yun et al., 2025, arXiv 2507.15465.

    c^Q = RMSNorm(x W^DQ)        q_h = [c^Q W_h^UQ ; rope(c^Q W_h^QR)]        head_dim d_h and rotary_dim d_R wide
    c   = RMSNorm(x W^DKV)       k_h = [c W_h^UK ; k^R],  k^R = rope(x W^KR)  k^R is shared by the heads
    y   = [o_1, …, o_H] W^O      o_h = softmax(q_h k_hᵀ / √(d_h + d_R)) v_h,  v_h = c W_h^UV

The decoding state holds c and k^R only. Rotary positions are decoupled from the content, so that W^UK can be absorbed
into the query and W^UV into the output, and a step attends over the latents without making keys or values:

    c^Q W_h^UQ · (c_j W_h^UK) = (c^Q W_h^UQ W_h^UKᵀ) · c_j        o_h = (Σ_j a_j c_j) W_h^UV

Cost: time O(n m d); a step of one token O(m H (2 d_c + d_R)) absorbed, O(m H d_h d_c) plain. The state takes d_c + d_R
numbers a token where multi-head attention takes 2 H d_h. `LatentAttention.decode_cost` counts a step's operations and
bytes: absorbed, all heads share what is read, and FLOPs per byte come to H (2 d_c + d_R) / (d_c + d_R) in bfloat16 for
a long state, where multi-head attention has 1.

Differences: the paper's scaling factors at the latents are left to the weights of the norms, as in the released models,
and initialisation is Glorot's instead of normal with deviation 0.006. Noncausal use is not in the paper. Rotation of
a context beyond the training length (YaRN) is not part of the mechanism.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalogue import OptionSet, Paper, register
from regard.nn.attention import ATTENTION, Attention
from regard.nn.mechanism import head_width
from regard.ops.attention import attention
from regard.ops.cache import KeyValueCache
from regard.ops.checks import require
from regard.ops.masks import Mask
from regard.ops.positions import rotary

_HEADS = "batch length (heads width) -> batch heads length width"


class DecodeCost(NamedTuple):
    """Floating-point operations of a step (two per multiply-add) and the bytes it moves."""

    flops: int
    bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes


@register(
    "mla",
    paper=(
        "mla",
        Paper(
            key="deepseek_v2",
            title="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
            year=2024,
            arxiv="2405.04434",
        ),
    ),
    contract=replace(
        ATTENTION,
        patterns=("noncausal self", "causal self"),
        memory="n*d",
        positions=True,
        permutation=None,
        options=(
            OptionSet({"latent_dim": 12, "query_latent_dim": 20, "rotary_dim": 6, "head_dim": 5, "dropout": 0.1}),
            OptionSet({"query_latent_dim": 0, "absorb": False}),
        ),
    ),
)
class LatentAttention(Attention):
    """Keys and values of all heads are expanded from one small latent, the only thing kept to decode.

    Args:
        dim: width of the tokens.
        heads: number of heads.
        head_dim: width d_h of a head's content and of its value; ``dim / heads`` by default.
        latent_dim: width d_c of the latent of keys and values; the paper's ``4 head_dim`` by default.
        query_latent_dim: width of the queries' latent; the paper's ``12 head_dim`` by default, `dim` where that is
            less. 0 projects queries directly, as DeepSeek-V2-Lite does.
        rotary_dim: width d_R of the rotary part of queries and of the shared key, even; ``head_dim / 2`` by default.
        causal: whether a token sees only itself and what came before.
        absorb: whether `step` attends over the latents; otherwise it expands them to keys and values. Both give the
            same.
        dropout: probability of dropping an attention weight in training.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        latent_dim: int | None = None,
        query_latent_dim: int | None = None,
        rotary_dim: int | None = None,
        causal: bool = False,
        absorb: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = head_width(self._name, dim, heads, head_dim)
        latent_dim = 4 * width if latent_dim is None else latent_dim
        query_latent_dim = min(12 * width, dim) if query_latent_dim is None else query_latent_dim
        rotary_dim = max(2, width // 4 * 2) if rotary_dim is None else rotary_dim
        require(latent_dim > 0, self._name, f"latent_dim {latent_dim}", "give a positive width")
        require(
            query_latent_dim >= 0, self._name, f"query_latent_dim {query_latent_dim}", "give a width, or 0 for none"
        )
        require(
            rotary_dim > 0 and rotary_dim % 2 == 0, self._name, f"rotary_dim {rotary_dim}", "give a positive even width"
        )
        # Keys and values are projected from the latent.
        super().__init__(
            dim,
            heads=heads,
            head_dim=head_dim,
            causal=causal,
            dropout=dropout,
            context_dim=latent_dim,
            device=device,
            dtype=dtype,
        )
        self.context_dim = dim
        self.latent_dim, self.rotary_dim, self.absorb = latent_dim, rotary_dim, absorb
        factory = {"device": device, "dtype": dtype}
        query_width = heads * (self.head_dim + rotary_dim)
        self.query = nn.Linear(query_latent_dim or dim, query_width, bias=False, **factory)
        self.query_latent = (
            nn.Sequential(
                nn.Linear(dim, query_latent_dim, bias=False, **factory),
                nn.RMSNorm(query_latent_dim, eps=1e-6, **factory),
            )
            if query_latent_dim
            else nn.Identity()
        )
        self.latent = nn.Linear(dim, latent_dim, bias=False, **factory)
        self.latent_norm = nn.RMSNorm(latent_dim, eps=1e-6, **factory)
        self.rotary_key = nn.Linear(dim, rotary_dim, bias=False, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot-uniform projections, norms that scale by one."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()

    def project(
        self, x: Tensor, context: Tensor | None, mask: Mask | None, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.check_tokens(x, context, mask, positions, takes_positions=True)
        self.check_width(x, self.dim)
        positions = torch.arange(x.shape[1], device=x.device) if positions is None else positions
        return torch.cat(self.queries(x, positions), dim=-1), *self.expand(self.compress(x, positions))

    def queries(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The content and the rotary part of every head's query."""
        query = rearrange(self.query(self.query_latent(x)), _HEADS, heads=self.heads)
        content, turned = query.split([self.head_dim, self.rotary_dim], dim=-1)
        return content, rotary(turned, positions, layout="interleaved")

    def compress(self, x: Tensor, positions: Tensor) -> Float[Tensor, "batch 1 length latent_and_rotary"]:
        """All that later tokens need of `x`: the latent c and behind it the rotary key k^R."""
        latent = self.latent_norm(self.latent(x))[:, None]
        return torch.cat([latent, rotary(self.rotary_key(x)[:, None], positions, layout="interleaved")], dim=-1)

    def expand(self, compressed: Float[Tensor, "batch 1 length latent_and_rotary"]) -> tuple[Tensor, Tensor]:
        """The keys and values of all heads."""
        latent, turned = compressed.split([self.latent_dim, self.rotary_dim], dim=-1)
        key, value = (rearrange(up(latent[:, 0]), _HEADS, heads=self.heads) for up in (self.key, self.value))
        return torch.cat([key, turned.expand(-1, self.heads, -1, -1)], dim=-1), value

    def init_state(self, batch: int) -> KeyValueCache:
        """The state before the first token: its keys are c and k^R side by side, its values have no width."""
        weight = self.key.weight
        width = self.latent_dim + self.rotary_dim
        return KeyValueCache.empty(batch, 1, width, value_dim=0, device=weight.device, dtype=weight.dtype)

    def step(
        self, x: Float[Tensor, "batch new dim"], state: KeyValueCache
    ) -> tuple[Float[Tensor, "batch new dim"], KeyValueCache]:
        self.check_step(x, self.dim, state.key.shape[0])
        positions = torch.arange(state.length, state.length + x.shape[1], device=x.device)
        compressed = self.compress(x, positions)
        state = state.append(compressed, compressed[..., :0])
        content, turned = self.queries(x, positions)
        if self.absorb:
            return self.combine(self.absorbed(content, turned, state.key)), state
        query = torch.cat([content, turned], dim=-1)
        return self.combine(attention(query, *self.expand(state.key), mask=self.own_mask())), state

    def absorbed(
        self,
        content: Float[Tensor, "batch heads new head_dim"],
        turned: Float[Tensor, "batch heads new rotary_dim"],
        compressed: Float[Tensor, "batch 1 length latent_and_rotary"],
    ) -> Float[Tensor, "batch heads new head_dim"]:
        """What the heads read, from the latents instead of their own keys and values."""
        up_key, up_value = (up.weight.unflatten(0, (self.heads, self.head_dim)) for up in (self.key, self.value))
        query = torch.cat([content @ up_key, turned], dim=-1)
        # The newest token sees all that is kept: its heads are then the queries of one head, and read it once. Values
        # are as wide as keys and cut afterwards, so that no step copies what is kept.
        single = query.shape[2] == 1
        mixed = attention(
            query.transpose(1, 2) if single else query,
            compressed,
            compressed,
            mask=None if single else self.own_mask(),
            scale=(self.head_dim + self.rotary_dim) ** -0.5,
        )
        mixed = mixed.transpose(1, 2) if single else mixed
        return mixed[..., : self.latent_dim] @ up_value.mT

    def decode_cost(self, cached: int, *, batch: int = 1, absorbed: bool | None = None) -> DecodeCost:
        """What a step of one token costs when `cached` tokens are kept, as the layer decodes or as `absorbed` says.

        Operations are those of the matrix products, less what is multiplied to fill a width and cut off again. Bytes
        are every weight and the whole state read once, in the weights' type, and for the plain step the expanded keys
        and values written and read once; the activations of the one token are left out.
        """
        absorbed = self.absorb if absorbed is None else absorbed
        tokens, latent, content, turned = cached + 1, self.latent_dim, self.head_dim, self.rotary_dim
        weights = sum(parameter.numel() for parameter in self.parameters())
        products = sum(parameter.numel() for parameter in self.parameters() if parameter.ndim == 2)
        expansion = self.key.weight.numel() + self.value.weight.numel()
        moved = weights + batch * tokens * (latent + turned)
        if absorbed:
            operations = products + self.heads * tokens * (2 * latent + turned)
        else:
            operations = products + cached * expansion + self.heads * tokens * (2 * content + turned)
            moved += 2 * batch * tokens * self.heads * 2 * content
        return DecodeCost(2 * batch * operations, moved * self.key.weight.element_size())
