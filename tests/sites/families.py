"""Tiny random models of every family that the door is promised to reach, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.torchvision_stub import declare

declare()

import transformers  # noqa: E402  after the declarations above

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE_TOKEN = 97


@dataclass(frozen=True)
class Family:
    """How to build a model of a family and call it.

    `sites` is how many attention sites it has, by kind; `output` takes what is compared out of the model's answer.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    sites: dict[str, int]
    output: Callable[[Any], Tensor] = lambda answer: answer[0]
    generates: bool = False
    padded: bool = field(default=False)


def text() -> dict[str, Tensor]:
    """Two sequences, the second padded on the left."""
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[1, :4] = 0
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def decoder(name: str, **settings: Any) -> Family:
    def build() -> nn.Module:
        config = getattr(transformers, f"{name}Config")
        model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
        if name.startswith("Gemma3"):
            config, model = transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM
        return model(config(**{**SMALL, **IDS, **settings}))

    return Family(build, text, {"self": 2}, generates=True, padded=True)


def encoder_decoder(name: str, model: str, config: dict[str, Any]) -> Family:
    def build() -> nn.Module:
        settings = getattr(transformers, f"{name}Config")(**IDS, decoder_start_token_id=1, **config)
        return getattr(transformers, model)(settings)

    def inputs() -> dict[str, Tensor]:
        return {**text(), "decoder_input_ids": torch.arange(3, 10).repeat(2, 1)}

    return Family(build, inputs, {"self": 4, "cross": 2}, generates=True)


def vision(name: str, size: int, sites: int, **settings: Any) -> Family:
    def build() -> nn.Module:
        return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))

    def inputs() -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))}

    return Family(build, inputs, {"self": sites})


GQA = {"num_key_value_heads": 2}
FAMILIES: dict[str, Family] = {
    "Llama": decoder("Llama", **GQA),
    "Qwen3": decoder("Qwen3", head_dim=8, **GQA),
    "Mistral": decoder("Mistral", sliding_window=6, **GQA),
    "Gemma3": decoder(
        "Gemma3", head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"], **GQA
    ),
    "GPT-2": decoder("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "T5": encoder_decoder(
        "T5",
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
    ),
    "BART": encoder_decoder(
        "Bart",
        "BartForConditionalGeneration",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "vocab_size": 99,
            "forced_eos_token_id": None,
        },
    ),
    "BERT": Family(lambda: transformers.BertModel(transformers.BertConfig(**SMALL)), text, {"self": 2}, padded=True),
    "ViT": vision("ViT", 32, 2, **{**SMALL, "image_size": 32, "patch_size": 8}),
    "Swin": vision(
        "Swin", 32, 4, image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
}
