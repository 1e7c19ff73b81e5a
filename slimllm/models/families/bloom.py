"""BLOOM: no gate, biases everywhere, ALiBi with slopes stored for each head, and q, k and v interleaved by head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from slimllm.errors import InputError
from slimllm.models.families.base import Family, ReadAs, Rows, register_family, register_reading

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BLOOM = register_family(
    Family(
        name="bloom",
        layers="transformer.h",
        embedding="transformer.word_embeddings",
        before_layers="transformer.word_embeddings_layernorm",
        final_norm="transformer.ln_f",
        rotary="",
        attention="self_attention",
        q_proj="self_attention.q_proj",
        k_proj="self_attention.k_proj",
        v_proj="self_attention.v_proj",
        o_proj="self_attention.dense",
        slopes="self_attention.slopes",
        gate_proj="",
        up_proj="mlp.dense_h_to_4h",
        down_proj="mlp.dense_4h_to_h",
    )
)


def _config(config: PretrainedConfig) -> PretrainedConfig:
    from slimllm.models.modeling.modeling_slim_bloom import SlimBloomConfig

    if config.apply_residual_connection_post_layernorm:
        raise InputError(
            "This BLOOM model is not supported: its residual connections start after the norms "
            "(apply_residual_connection_post_layernorm); choose a model whose residual connections start before them."
        )
    kept = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
    biases = {"attention_out_bias": True, "mlp_out_bias": True}
    return SlimBloomConfig(**kept, **biases, architectures=["SlimBloomForCausalLM"])


def _rows(config: PretrainedConfig) -> dict[str, dict[str, Rows]]:
    heads = config.num_attention_heads
    rows = torch.arange(3 * heads * config.head_dim).view(heads, 3, config.head_dim)
    parts = (BLOOM.q_proj, BLOOM.k_proj, BLOOM.v_proj)
    return {"self_attention.query_key_value": {part: rows[:, i].flatten() for i, part in enumerate(parts)}}


def _slopes(config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Return the slopes of the position bias, one for each head."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    heads = config.num_attention_heads
    biases = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # slope times position
    return {BLOOM.slopes: biases.view(heads, 2)[:, 1].clone()}


register_reading(ReadAs("bloom", "slim_bloom", _config, _rows, _slopes))
