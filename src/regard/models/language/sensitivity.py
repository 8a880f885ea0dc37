"""How much of its source a causal language model still hears, target token by target token.

"Decoder-Only or Encoder-Decoder? Interpreting Language Model as a Regularized Encoder-Decoder", Fu et al., 2023, arXiv
2304.04052, finds that plain language models attend to the source less and less as the target grows, and analyses in
theory how sensitive the output of attention is to the source. Here both are measured, on a whole model:

    S_tj = ‖∂ z_t / ∂ e_j‖_F      z_t: logits or last hidden state of target token t,  e_j: embedding of source token j
    M_t  = Σ_j A_tj               of every head whose weights the mechanism can show

Differences: the theorem itself could not be compared with the paper; this is the quantity it is about.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.catalogue import card
from regard.models.language.decoder import Decoder
from regard.ops.checks import one_of, require

Output = Literal["logits", "hidden"]


class SourceSensitivity(NamedTuple):
    """What `source_sensitivity` finds; the first target token is the one behind the source."""

    by_token: Float[Tensor, "batch targets sources"]
    """‖∂ z_t / ∂ e_j‖_F for every target token t and source token j."""
    attention: Float[Tensor, "layers batch heads targets"] | None
    """Weight on the source, the sum over its tokens, for the heads of the map; None for mechanisms without one."""

    @property
    def total(self) -> Float[Tensor, "batch targets"]:
        """‖∂ z_t / ∂ (e_1, …, e_s)‖_F: the Jacobian to the whole source."""
        return self.by_token.square().sum(-1).sqrt()


@torch.enable_grad()
def source_sensitivity(
    model: Decoder,
    tokens: Int[Tensor, "batch length"],
    source_length: int,
    *,
    output: Output = "logits",
    probes: int | None = None,
    seed: int = 0,
) -> SourceSensitivity:
    """Norm of the Jacobian of every target token's output to the embedding of every source token.

    Args:
        model: in eval mode.
        tokens: sources of `source_length` tokens, each followed by its target.
        source_length: how many of the first tokens are the source; a model whose mechanism has a source of its own is
            built with the same length.
        output: z is the ``"logits"`` or the ``"hidden"`` state they are read from.
        probes: None for the exact norm. A number for Hutchinson's estimate, the mean of ‖vᵀ J‖² over as many random
            signs v: it is unbiased for the squared norm, with a relative deviation of at most ``√(2 / probes)``.
        seed: of the probes.

    Costs one forward and, for each target token, one backward per probe, or per entry of z if exact; samples go
    together. Memory is that of one training step.

    Raises ValueError for a source that leaves no target, a model in training mode and fewer than one probe.
    """
    owner = "source_sensitivity"
    one_of(owner, "output", output, get_args(Output))
    require(tokens.ndim == 2, owner, f"tokens of shape {tuple(tokens.shape)}", "give (batch, length)")
    require(
        0 < source_length < tokens.shape[1],
        owner,
        f"source_length {source_length} of {tokens.shape[1]} tokens",
        "leave at least one token to the source and one to the target",
    )
    require(probes is None or probes > 0, owner, f"probes {probes}", "give a positive number, or None for exact norms")
    require(not model.training, owner, "the model is in training mode", "call model.eval(): dropout is noise here")
    embedded = model.embedding(tokens).detach()
    source = embedded[:, :source_length].clone().requires_grad_()
    x = torch.cat([source, embedded[:, source_length:]], dim=1)
    with _mixer_inputs(model) as inputs:
        for block in model.blocks:
            x = block(x)
    hidden = model.norm(x)
    outputs = (model.head(hidden) if output == "logits" else hidden)[:, source_length:]
    vectors = _vectors(outputs, probes, seed)
    squares = torch.stack([_pulled_back(outputs[:, target], source, vectors) for target in range(outputs.shape[1])], 1)
    return SourceSensitivity(squares.sqrt(), _mass(model, inputs, source_length))


def _vectors(outputs: Tensor, probes: int | None, seed: int) -> Tensor:
    """Rows v whose ``vvᵀ`` add up to the identity: the unit vectors, or random signs that do in expectation."""
    width = outputs.shape[-1]
    if probes is None:
        return torch.eye(width, dtype=outputs.dtype, device=outputs.device)
    signs = 2 * torch.randint(2, (probes, width), generator=torch.Generator().manual_seed(seed)) - 1
    return signs.to(outputs) * probes**-0.5


def _pulled_back(
    output: Float[Tensor, "batch width"], source: Tensor, vectors: Float[Tensor, "rows width"]
) -> Float[Tensor, "batch sources"]:
    """``Σ_v ‖vᵀ J‖²`` for each source token. A loop, because not every engine's backward can be batched."""
    total = torch.zeros_like(source[..., 0])
    for vector in vectors:
        (gradient,) = torch.autograd.grad((output @ vector).sum(), source, retain_graph=True)
        total = total + gradient.square().sum(-1)
    return total.detach()


@contextmanager
def _mixer_inputs(model: Decoder) -> Iterator[list[tuple[nn.Module, Tensor]]]:
    """Every mechanism that is called in the meantime, and its input."""
    found: list[tuple[nn.Module, Tensor]] = []
    mixers: list[Any] = [block.mixer for block in model.blocks]
    hooks = [
        mixer.register_forward_pre_hook(lambda module, given: found.append((module, given[0].detach())))
        for mixer in mixers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _mass(model: Decoder, inputs: list[tuple[Any, Tensor]], source_length: int) -> Tensor | None:
    if not card(model.mechanism).contract.attention_map:
        return None
    maps = [mixer.attention_map(x)[0] for mixer, x in inputs]
    return torch.stack([weights[:, :, source_length:, :source_length].sum(-1) for weights in maps])
