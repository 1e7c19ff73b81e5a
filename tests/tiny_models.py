"""Tiny seeded models of every family, with all its special features switched on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from slimllm.models.modeling.slim_layers import rope_of_transformers_4

IDS = torch.randint(3, 96, (12, 24), generator=torch.Generator().manual_seed(0))
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


WINDOWS = {"sliding_window": 7}


ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}


PECULIAR: dict[str, dict[str, Any]] = {
    "llama": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": WINDOWS,
    "qwen2": {"use_sliding_window": True, **WINDOWS, **ALTERNATING},
    "qwen3": {"use_sliding_window": True, "attention_bias": True, **WINDOWS, **ALTERNATING},
    "gemma2": {
        **WINDOWS,
        **ALTERNATING,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 24,
        "attention_bias": True,
    },
    "opt": {"ffn_dim": 96, "num_attention_heads": 3, "word_embed_proj_dim": 48, "tie_word_embeddings": True},
    "gemma3_text": {**WINDOWS, **ALTERNATING, "query_pre_attn_scalar": 24, "final_logit_softcapping": 2.0},
    "bloom": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "gemma": {"attention_bias": True},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
        "mlp_bias": True,
    },
    "smollm3": {
        **WINDOWS,
        **ALTERNATING,
        "use_sliding_window": True,
        "no_rope_layers": [1, 0, 1, 1],
        "attention_bias": True,
    },
    "arcee": {"mlp_bias": True},
    "nemotron": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "ernie4_5": {"use_bias": True, "tie_word_embeddings": True},
    "starcoder2": {**WINDOWS, "use_bias": True},
    "ministral": {**WINDOWS, **ALTERNATING},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "llama_4_scaling_beta": 0.5,
        }
    },
    "hunyuan_v1_dense": {
        "attention_bias": True,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 1.0, "alpha": 50.0},
    },
    "apertus": {"attention_bias": True},
}


# Mixtures of experts, whose own classes have them in one tensor.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "moe_intermediate_size": 48,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "attention_bias": True,
    },
}


# What llama.cpp computes as these families do: no windows, biases or caps that it lacks.
LIKE_LLAMA_CPP: dict[str, dict[str, Any]] = {
    "qwen3": {"use_sliding_window": False, "attention_bias": False, "sliding_window": None, "layer_types": None},
    "gemma2": {"attention_bias": False, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "attention_bias": False,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "layer_types": None,
        "use_bidirectional_attention": False,
        "rope_parameters": None,
    },
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
}


def of_this_version(settings: dict[str, Any]) -> dict[str, Any]:
    if transformers.__version__ < "5" and "rope_parameters" in settings:
        settings = {**settings, **rope_of_transformers_4(settings["rope_parameters"])}
        if "short_factor" in (settings.pop("rope_parameters") or {}):
            factors = {name: settings["rope_scaling"][name] for name in ("short_factor", "long_factor")}
            settings["rope_scaling"] = {"type": "longrope", **factors}
    return settings


def tiny(family: str, **changes: Any) -> PreTrainedModel:
    kind = "slim_bloom" if family == "bloom" else family  # BLOOM is read as slim_bloom, with separate projections
    config = AutoConfig.for_model(kind, **of_this_version({**COMMON, **(PECULIAR | MIXTURES)[family], **changes}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases, which start as ones and zeros
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.normal_(0, 0.25)
        for name, buffer in model.named_buffers():
            if name.endswith("slopes"):
                buffer.copy_(torch.tensor([0.5, 0.1, 0.02]))
    return model


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
