"""Gemma 1, and Gemma 2 and 3 (text): four norms per layer, soft caps, windows and rotary embeddings by layer type."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from slimllm.models.families.base import (
    GGUF_HEAD_NORMS,
    GGUF_LAYER,
    GGUF_MODEL,
    Family,
    GGUFNames,
    divides_hidden_size,
    head_dim_of,
    register_family,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LAYER = GGUF_LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _against(config: PretrainedConfig, period: int, scaled_otherwise: int) -> str | None:
    """Return what llama.cpp does not take from a file's settings but decides by itself, if it differs."""
    if list(config.layer_types) != _decided(config, period, scaled_otherwise)["layer_types"]:
        return f"llama.cpp has full attention in every layer number {period}, and windows in the others"
    scale = _scale(config, scaled_otherwise)
    if config.query_pre_attn_scalar != scale:
        theirs = config.query_pre_attn_scalar
        return f"llama.cpp divides the attention's scores by √{scale}, and this model by √{theirs} (query_pre_attn_scalar)"
    if not config.sliding_window:
        return "llama.cpp has windows in every Gemma"
    if config.hidden_activation != "gelu_pytorch_tanh":
        return f"llama.cpp computes gelu_pytorch_tanh instead of {config.hidden_activation}"
    return None


def _scale(config: PretrainedConfig, scaled_otherwise: int) -> int:
    """Return the number by whose root llama.cpp divides the scores: that of one size, by its number of layers, differs."""
    otherwise = config.num_hidden_layers == scaled_otherwise
    return int(config.hidden_size // config.num_attention_heads if otherwise else head_dim_of(config))


def _decided(config: PretrainedConfig, period: int, scaled_otherwise: int) -> dict[str, Any]:
    kinds = ("full" if (index + 1) % period == 0 else "sliding" for index in range(config.num_hidden_layers))
    return {
        "layer_types": [f"{kind}_attention" for kind in kinds],
        "query_pre_attn_scalar": _scale(config, scaled_otherwise),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _against_gemma2(config: PretrainedConfig) -> str | None:
    if not config.attn_logit_softcapping or not config.final_logit_softcapping:
        return "llama.cpp caps the scores and the logits of every Gemma 2"
    if not config.tie_word_embeddings:
        return "in llama.cpp the output head of Gemma 2 is its embedding"
    return _against(config, 2, 46)


def _against_gemma3(config: PretrainedConfig) -> str | None:
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        return "llama.cpp does not cap the scores and the logits of Gemma 3"
    if getattr(config, "use_bidirectional_attention", False):
        return "llama.cpp computes causal attention"
    local = (config.rope_parameters or {}).get("sliding_attention", {})
    if local.get("rope_theta") != 10_000 or local.get("rope_type", "default") != "default":
        return "llama.cpp turns windows by the frequencies of the base 10,000"
    return _against(config, 6, 62)


def _settings_of_gemma2(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _settings_of_gemma3(config: PretrainedConfig) -> dict[str, Any]:
    return {"attention.sliding_window": config.sliding_window}


GEMMA = register_family(Family(name="gemma", takes_heads=divides_hidden_size))
GEMMA2 = register_family(
    Family(
        name="gemma2",
        attention_post_norm="post_attention_layernorm",
        ffn_norm="pre_feedforward_layernorm",
        ffn_post_norm="post_feedforward_layernorm",
        takes_heads=divides_hidden_size,
        gguf=GGUFNames(
            "gemma2",
            _LAYER,
            GGUF_MODEL,
            one_added=True,
            settings=_settings_of_gemma2,
            why_not=_against_gemma2,
            decided=lambda config: _decided(config, 2, 46),
        ),
    )
)
GEMMA3_TEXT = register_family(
    replace(
        GEMMA2,
        name="gemma3_text",
        gguf=GGUFNames(
            "gemma3",
            _LAYER | GGUF_HEAD_NORMS,
            GGUF_MODEL,
            one_added=True,
            settings=_settings_of_gemma3,
            why_not=_against_gemma3,
            decided=lambda config: _decided(config, 6, 62),
        ),
    )
)
