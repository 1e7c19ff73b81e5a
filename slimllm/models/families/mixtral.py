"""Mixtral: Mistral with mixtures of experts."""

from __future__ import annotations

from slimllm.models.families.base import Family, divides_hidden_size, one_expert, register_family

MIXTRAL = register_family(
    Family(
        name="mixtral",
        ffn="block_sparse_moe",
        expert="block_sparse_moe.experts.{}",
        gate_proj="w1",
        up_proj="w3",
        down_proj="w2",
        why_not=one_expert,
        vllm_takes_heads=divides_hidden_size,
    )
)
