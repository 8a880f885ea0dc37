"""Models for what inspects attention: one whose heads are known, because its weights are set by hand, and a LLaVA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.vision_peers import declare

declare()

import transformers  # noqa: E402  after the declarations above

VOCABULARY, PLACES = 16, 16
WIDTH = VOCABULARY * 3 + PLACES
DEPTH = 4
TOKEN, PLACE, BEFORE, OUT = (slice(16 * part, 16 * part + 16) for part in range(4))


def induction() -> Any:
    """A GPT-2 whose head 0 of layer 0 notes the token before, and head 1 of layer 1 copies what followed a token.

    The stream is [own token | place | token before | copied]; a layer's norm undoes itself, since its input always has
    the same number of ones. The logits are the normed fourth part. The other two heads answer zero.
    """
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=PLACES,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=False,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    one = torch.eye(16, dtype=torch.float64)
    sharp = 1e3
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        core = model.transformer
        core.wte.weight[:, TOKEN] = one
        core.wpe.weight[:, PLACE] = one
        for layer, ones in ((0, 2), (1, 3)):
            norm, mean = core.h[layer].ln_1, ones / WIDTH
            norm.weight.fill_((mean * (1 - mean) + norm.eps) ** 0.5)
            norm.bias.fill_(mean)
        core.ln_f.weight.fill_(1.0)
        model.lm_head.weight[:, OUT] = one

        def head(layer: int, number: int, query: tuple[slice, Tensor], key: slice, out: slice) -> None:
            attention = core.h[layer].attn
            first = number * (WIDTH // 2)
            own = slice(first, first + 16)
            attention.c_attn.weight[query[0], own] = sharp * query[1]
            attention.c_attn.weight[key, slice(WIDTH + own.start, WIDTH + own.stop)] = one
            attention.c_attn.weight[TOKEN, slice(2 * WIDTH + own.start, 2 * WIDTH + own.stop)] = one
            attention.c_proj.weight[own, out] = one

        head(0, 0, (PLACE, one.roll(-1, 1)), PLACE, BEFORE)
        head(1, 1, (TOKEN, one), BEFORE, OUT)
    return model


def tiny_llava() -> Any:
    """A random one with four patches to an image, and weights large enough that attention matters."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    language = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=97, image_seq_length=4
    )
    return transformers.LlavaForConditionalGeneration(config).double().eval()
