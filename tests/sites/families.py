"""Tiny random models of every family that the door is promised to reach, with inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.vision_peers import declare

declare()

import diffusers  # noqa: E402  after the declarations above
import timm  # noqa: E402
import transformers  # noqa: E402

from regard.models.language import Decoder  # noqa: E402
from regard.models.vision import Encoder  # noqa: E402

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

    Attributes:
        build, inputs: a new model, and what it is called with.
        sites: how many attention sites it has, by kind.
        output: takes what is compared out of the model's answer.
        generates: whether it generates text.
        padded: whether the second sequence of the inputs is padded.
        exact: whether the door, with nothing attached, leaves every bit as it is, and not only 1e-6.
        notes: what is to be said of a property beside yes.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    sites: dict[str, int]
    output: Callable[[Any], Tensor] = lambda answer: answer[0]
    generates: bool = False
    padded: bool = False
    exact: bool = True
    notes: dict[str, str] = field(default_factory=dict)


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

    return Family(build, lambda: {"pixel_values": images(size)}, {"self": sites})


def images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def deberta() -> nn.Module:
    settings = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**SMALL, **settings))


def llava() -> nn.Module:
    settings = {name: SMALL[name] for name in SMALL if name != "vocab_size"}
    vision = transformers.CLIPVisionConfig(**settings, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(**SMALL, **IDS)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    return transformers.LlavaForConditionalGeneration(config)


def llava_inputs() -> dict[str, Tensor]:
    return {**text_with_images(4), "pixel_values": images(16)}


def qwen2_5_vl() -> nn.Module:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    text = {**SMALL, **IDS, **GQA, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=96,
        vision_start_token_id=95,
        vision_end_token_id=94,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen2_5_vl_inputs() -> dict[str, Tensor]:
    """An image of 8 × 8 patches a sample: four windows of 4 × 4, 16 tokens after merging."""
    grid = torch.tensor([[1, 8, 8]] * 2)
    pixels = noise(128, 3 * 2 * 4 * 4)
    tokens = text_with_images(16)
    kinds = (tokens["input_ids"] == IMAGE_TOKEN).int()
    return {**tokens, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}


def text_with_images(count: int) -> dict[str, Tensor]:
    """The padded text with the tokens of an image in the middle of each sequence."""
    tokens = text()
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    image = torch.full((2, count), IMAGE_TOKEN)
    return {
        "input_ids": torch.cat([ids[:, :6], image, ids[:, 6:]], 1),
        "attention_mask": torch.cat([mask[:, :6], torch.ones_like(image), mask[:, 6:]], 1),
    }


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def unet_inputs() -> dict[str, Any]:
    return {"sample": noise(2, 4, 8, 8), "timestep": 1, "encoder_hidden_states": noise(2, 5, 16)}


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )


def sd3_inputs() -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, 8, 8),
        "encoder_hidden_states": noise(2, 5, 16),
        "pooled_projections": noise(2, 16),
        "timestep": torch.tensor([1, 1]),
    }


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def flux_inputs() -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return {
        "hidden_states": noise(2, 16, 4),
        "encoder_hidden_states": noise(2, 6, 16),
        "pooled_projections": noise(2, 16),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], -1),
        "txt_ids": torch.zeros(6, 3),
    }


def of_timm(name: str, sites: int, **settings: Any) -> Family:
    def build() -> nn.Module:
        return timm.create_model(name, num_classes=5, img_size=32, **settings)

    return Family(build, lambda: {"x": images(32)}, {"self": sites}, output=lambda answer: answer)


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def torch_encoder_inputs() -> dict[str, Tensor]:
    return {"src": noise(2, 12, 32), "src_key_padding_mask": torch.arange(12) >= torch.tensor([[12], [8]])}


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
    # Its padded queries attend evenly to logits of the lowest number, which no bias moves.
    "DeBERTa-v2": Family(
        deberta, text, {"self": 2}, lambda answer: answer[0][text()["attention_mask"].bool()], padded=True
    ),
    "LLaVA": Family(llava, llava_inputs, {"self": 4}, generates=True, padded=True),
    "Qwen2.5-VL": Family(qwen2_5_vl, qwen2_5_vl_inputs, {"self": 4}, generates=True, padded=True),
    "UNet2DCondition": Family(unet, unet_inputs, {"self": 4, "cross": 4}),
    "SD3": Family(sd3, sd3_inputs, {"joint": 2, "self": 1}),
    "Flux": Family(flux, flux_inputs, {"joint": 2}),
    "timm ViT": of_timm("vit_tiny_patch16_224", 2, embed_dim=32, depth=2, num_heads=4, patch_size=8),
    "timm EVA": of_timm(
        "eva02_tiny_patch14_224", 2, embed_dim=32, depth=2, num_heads=4, patch_size=8, head_init_scale=1.0
    ),
    "timm Swin": of_timm(
        "swin_tiny_patch4_window7_224", 4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, patch_size=2
    ),
    "nn.MultiheadAttention": Family(
        torch_encoder,
        torch_encoder_inputs,
        {"self": 2},
        output=lambda answer: answer[~torch_encoder_inputs()["src_key_padding_mask"]],
        padded=True,
        exact=False,
        notes={"parity": "yes; torch's fused encoder, which writes zeros at padding, is off"},
    ),
    "regard Decoder": Family(
        lambda: Decoder(99, "multi_head", dim=32, heads=4, options={"position": "rotary"}),
        lambda: {"tokens": text()["input_ids"]},
        {"self": 2},
        output=lambda answer: answer,
        generates=True,
    ),
    "regard Encoder": Family(
        lambda: Encoder((4, 4), 6, 5, "gqa", dim=32, heads=4, options={"kv_heads": 2}),
        lambda: {"x": noise(2, 4, 4, 6)},
        {"self": 2},
        output=lambda answer: answer,
    ),
}
