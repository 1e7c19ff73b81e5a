"""Phi-3 and Phi-3.5-mini: fused projections; read as Mistral, which computes the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from slimllm.errors import InputError
from slimllm.models.families.base import ReadAs, Rows, head_dim_of, register_reading
from slimllm.models.families.mistral import MISTRAL

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Settings of Phi-3 that Mistral's configuration takes over.
_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "original_max_position_embeddings",
    "sliding_window",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)


def _config(config: PretrainedConfig) -> PretrainedConfig:
    from transformers import MistralConfig

    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) not in (None, 1.0):
        raise InputError(
            "This Phi model applies its rotary embedding to only a part of each head, which no pruned format supports; "
            "choose a model that applies it to the whole head, such as Phi-3-mini or Phi-3.5-mini."
        )
    settings = {name: getattr(config, name) for name in _KEPT if hasattr(config, name)}
    return MistralConfig(**settings, head_dim=head_dim_of(config), architectures=["MistralForCausalLM"])


def _rows(config: PretrainedConfig) -> dict[str, dict[str, Rows]]:
    width, kv_width = (n * head_dim_of(config) for n in (config.num_attention_heads, config.num_key_value_heads))
    qkv = (MISTRAL.q_proj, MISTRAL.k_proj, MISTRAL.v_proj)
    return {
        "self_attn.qkv_proj": _one_after_the_other(qkv, (width, kv_width, kv_width)),
        "mlp.gate_up_proj": _one_after_the_other(MISTRAL.into_ffn, (config.intermediate_size,) * 2),
    }


def _one_after_the_other(parts: tuple[str, ...], numbers: tuple[int, ...]) -> dict[str, Rows]:
    ends = torch.tensor(numbers).cumsum(0).tolist()
    return {part: slice(end - number, end) for part, number, end in zip(parts, numbers, ends)}


register_reading(ReadAs("phi3", "mistral", _config, _rows))
