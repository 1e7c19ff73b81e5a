"""Qwen 3 with mixtures of experts in all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimllm.models.families.base import Family, one_expert, register_family

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _why_not(config: PretrainedConfig) -> str | None:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        return "Some layers of the model have no experts (mlp_only_layers, decoder_sparse_step), which is not supported."
    return one_expert(config)


QWEN3_MOE = register_family(
    Family(
        name="qwen3_moe",
        expert="mlp.experts.{}",
        gate_proj="gate_proj",
        up_proj="up_proj",
        down_proj="down_proj",
        width="moe_intermediate_size",
        why_not=_why_not,
    )
)
