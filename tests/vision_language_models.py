"""Tiny seeded vision-language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import COMMON
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE = 90  # the token in whose place the features of an image come
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {"image_size": 28, "patch_size": 14}
QWEN_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
WIDE = {**{name: value for name, value in COMMON.items() if name != "head_dim"}, "hidden_size": 96}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {"model_type": "gemma3_text", **COMMON, "sliding_window": 7, "query_pre_attn_scalar": 16},
        "vision_config": {"model_type": "siglip_vision_model", **TOWER, **PATCHES},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **COMMON, "sliding_window": None},
        "vision_config": {"model_type": "pixtral", **TOWER, **PATCHES, "head_dim": 16},
        "image_token_index": IMAGE,
        "spatial_merge_size": 1,
    },
    "llava": {
        "text_config": {"model_type": "llama", **COMMON},
        "vision_config": {"model_type": "clip_vision_model", **TOWER, **PATCHES},
        "image_token_index": IMAGE,
        "image_seq_length": 4,
    },
    "qwen2_5_vl": {
        "text_config": {"model_type": "qwen2_5_vl_text", **WIDE, "rope_parameters": ROPE},
        "vision_config": {**QWEN_TOWER, "out_hidden_size": 96, "fullatt_block_indexes": [1], "window_size": 28},
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {"model_type": "qwen3_vl_text", **COMMON, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        "vision_config": {
            **QWEN_TOWER,
            "out_hidden_size": 48,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        **QWEN_TOKENS,
    },
}


# Of the same kinds; only their text is tested.
ALIKE: dict[str, dict[str, Any]] = {
    "llava_next": {**MODELS["llava"], "image_grid_pinpoints": [[28, 28]]},
    "llava_onevision": {
        "text_config": {"model_type": "qwen2", **COMMON, "hidden_size": 96},
        "vision_config": {"model_type": "siglip_vision_model", **TOWER, **PATCHES},
        "image_token_index": IMAGE,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **COMMON, "hidden_size": 96},
        "vision_config": {"model_type": "internvl_vision", **TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
        "image_token_id": IMAGE,
    },
    "qwen2_vl": {
        "text_config": {"model_type": "qwen2_vl_text", **WIDE, "rope_parameters": ROPE},
        "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 14, "hidden_size": 96, "mlp_ratio": 2},
        **QWEN_TOKENS,
    },
}


def made(name: str, folder: Path, **of_text: Any) -> Path:
    settings = (MODELS | ALIKE)[name]
    settings = {**settings, "text_config": {**settings["text_config"], **of_text}}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder
