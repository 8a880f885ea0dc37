"""Neighbourhood attention, dilated and strided. "Neighborhood Attention Transformer", Hassani et al., 2022,
arXiv 2204.07143; "Dilated Neighborhood Attention Transformer", Hassani and Shi, 2022, arXiv 2209.15001; strides:
"Generalized Neighborhood Attention", Hassani et al., 2025, arXiv 2504.16922.

    y_i = softmax_j(q_i · k_j / √d_h + B(j − i)) v_j W^O,     j in ρ(i)

ρ(i) holds the `kernel_size` nearest positions per axis that are a multiple of `dilation` away; at a border the window
moves inwards, so every position sees equally many. With `stride`, that many neighbouring queries share one
neighbourhood.

Cost: time O(n k d) with k the positions in a kernel, memory O(n d).

Differences: none. The relative bias is on by default, as in NAT and DiNAT; the strided paper has none.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.catalogue import Contract, OptionSet, Taxonomy, register
from regard.nn.mechanism import Mechanism, head_width
from regard.ops.checks import require
from regard.ops.neighborhood import neighborhood_attention


@register(
    "dinat",
    paper=("dinat", "faster_na", "gna"),
    taxonomy=Taxonomy(positions="local"),
    contract=Contract(
        input="grid",
        patterns=("noncausal self", "causal self"),
        time="n*kernel_size**2*d",
        memory="n*d",
        grid_dims=(2,),
        minimum={"length": 7},
        options=(
            OptionSet({"kernel_size": 3, "dilation": 2}),
            OptionSet({"kernel_size": 3, "stride": 2, "relative_bias": False, "head_dim": 6}),
            OptionSet({"axes": 1, "kernel_size": 5, "bias": False}, {"grid_dims": (1,), "time": "n*kernel_size*d"}),
            OptionSet({"axes": 3, "kernel_size": 3}, {"grid_dims": (3,), "time": "n*kernel_size**3*d"}),
        ),
    ),
)
class NeighborhoodAttention(Mechanism):
    """A position of a grid attends to its nearest neighbours.

    Args:
        dim: width of a position.
        heads: number of heads.
        head_dim: width of a head; ``dim / heads`` by default.
        kernel_size: odd number of neighbours per axis; an integer or one per axis. An axis must be at least
            ``kernel_size · dilation`` long.
        dilation: step between neighbours, likewise.
        stride: how many queries share a neighbourhood, likewise.
        causal: whether a position sees only what does not come after it, on every axis or per axis.
        axes: number of axes of the grid, 1 to 3.
        relative_bias: whether to learn a bias per head and offset.
        bias: whether the projections have biases.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        head_dim: int | None = None,
        kernel_size: int | tuple[int, ...] = 7,
        dilation: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        causal: bool | tuple[bool, ...] = False,
        axes: int = 2,
        relative_bias: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.head_dim = dim, heads, head_width(self._name, dim, heads, head_dim)
        require(axes in (1, 2, 3), self._name, f"axes {axes}", "give 1, 2 or 3")
        sizes = (kernel_size,) * axes if isinstance(kernel_size, int) else tuple(kernel_size)
        require(
            len(sizes) == axes and all(size > 0 and size % 2 == 1 for size in sizes),
            self._name,
            f"kernel_size {kernel_size} for {axes} axes",
            "give an odd number, or one per axis",
        )
        self.kernel_size, self.dilation, self.stride, self.causal = sizes, dilation, stride, causal
        factory = {"device": device, "dtype": dtype}
        width = heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * width, bias=bias, **factory)
        self.output = nn.Linear(width, dim, bias=bias, **factory)
        entries = [2 * size - 1 for size in sizes]
        self.relative = nn.Parameter(torch.empty(heads, *entries, **factory)) if relative_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """NAT's initialisation: truncated normal of standard deviation 0.02, zero biases."""
        for projection in (self.qkv, self.output):
            nn.init.trunc_normal_(projection.weight, std=0.02)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.relative is not None:
            nn.init.trunc_normal_(self.relative, std=0.02)

    def forward(self, x: Float[Tensor, "batch *grid dim"]) -> Float[Tensor, "batch *grid dim"]:
        """Attend within each neighbourhood of the grid."""
        axes = len(self.kernel_size)
        self.check_shape(x, f"(batch, {axes} grid axes, dim)", axes + 2)
        self.check_width(x, self.dim)
        heads = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        query, key, value = heads.movedim(-2, 1).unbind(-2)
        mixed = neighborhood_attention(
            query,
            key,
            value,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            stride=self.stride,
            is_causal=self.causal,
            bias=self.relative,
        )
        return self.output(mixed.movedim(1, -2).flatten(-2))
