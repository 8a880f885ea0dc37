"""One-to-one assignment of tokens to the nearest prompts, and the tokens with some of them replaced so.

From "Croc: Pretraining Large Multimodal Models with Cross-Modal Comprehension", Xie et al., 2024, arXiv 2410.14332:

    σ = argmin over one-to-one σ of Σ_i ‖v_i − p_σ(i)‖₂ over the chosen tokens;   v_i ← p_σ(i)

v are the visual tokens, normalised to length 1, of which the paper replaces three quarters drawn at random, and p a
learned pool of 2048 prompt tokens; the model is then trained to restore the tokens.

Cost: O(C² P) on the CPU for C chosen tokens and P prompts (the Hungarian algorithm), the distances beside it.

Differences: the released code gives each token its nearest prompt, several tokens the same one: ``unique=False``.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.ops.checks import require


def hungarian(cost: Float[Tensor, "rows columns"]) -> Int[Tensor, " rows"]:
    """The column of each row in the one-to-one assignment of least total cost. Needs scipy; no gradient."""
    require(
        cost.ndim == 2 and cost.shape[0] <= cost.shape[1],
        "hungarian",
        f"cost of shape {tuple(cost.shape)}",
        "give (rows, columns) with at least as many columns as rows",
    )
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(cost.detach().double().cpu().numpy())
    return torch.as_tensor(columns, device=cost.device)


def replace_with_prompts(
    tokens: Float[Tensor, "batch length dim"],
    prompts: Float[Tensor, "count dim"],
    chosen: Bool[Tensor, "batch length"],
    *,
    unique: bool = True,
) -> Float[Tensor, "batch length dim"]:
    """`tokens` with each `chosen` one replaced by its prompt.

    Within a sample no prompt is taken twice and the sum of the distances is least (needs scipy); with ``unique=False``
    each token takes the nearest prompt. Gradients reach the prompts that were taken, and the tokens that were kept.
    """
    require(
        tokens.ndim == 3 and prompts.ndim == 2 and tokens.shape[2] == prompts.shape[1],
        "replace_with_prompts",
        f"tokens of shape {tuple(tokens.shape)} and prompts of shape {tuple(prompts.shape)}",
        "give (batch, length, dim) and (count, dim)",
    )
    require(
        chosen.shape == tokens.shape[:2] and chosen.dtype == torch.bool,
        "replace_with_prompts",
        f"chosen of shape {tuple(chosen.shape)} and dtype {chosen.dtype} for tokens of shape {tuple(tokens.shape)}",
        "give one boolean per token",
    )
    most = int(chosen.sum(-1).max())
    require(
        most <= len(prompts) or not unique,
        "replace_with_prompts",
        f"{most} chosen tokens in a sample for {len(prompts)} prompts",
        "give more prompts, choose fewer tokens, or pass unique=False",
    )
    taken = []
    for sample, places in zip(tokens.detach(), chosen, strict=True):
        distance = torch.cdist(sample[places], prompts.detach().to(tokens.dtype))
        taken.append(hungarian(distance) if unique else distance.argmin(-1))
    replaced = tokens.clone()
    replaced[chosen] = prompts[torch.cat(taken)].to(tokens.dtype)
    return replaced
