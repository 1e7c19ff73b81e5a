# SPDX-License-Identifier: Apache-2.0
"""Qwen3 MoE with per-layer numbers of heads and of channels of every expert; see slim_layers.py in this folder."""

from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeDecoderLayer,
    Qwen3MoeForCausalLM,
    Qwen3MoeModel,
    Qwen3MoePreTrainedModel,
)

from .slim_layers import SlimDecoderLayer, SlimExpert, SlimForCausalLM, SlimMixture, SlimMixtureConfig, SlimModel


class SlimQwen3MoeConfig(SlimMixtureConfig, Qwen3MoeConfig):
    model_type = "slim_qwen3_moe"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimQwen3MoeDecoderLayer(SlimDecoderLayer, Qwen3MoeDecoderLayer):
    def set_ffn(self, own):
        sizes = own.hidden_size, own.moe_intermediate_size, own.hidden_act
        experts = [SlimExpert(*sizes) for _ in range(own.num_experts)]
        self.mlp = SlimMixture(experts, own.num_experts_per_tok, own.hidden_size, own.norm_topk_prob, True)


class SlimQwen3MoePreTrainedModel(Qwen3MoePreTrainedModel):
    config_class = SlimQwen3MoeConfig
    config: SlimQwen3MoeConfig
    _no_split_modules = ["SlimQwen3MoeDecoderLayer"]
    _can_compile_fullgraph = False  # the number of an expert's tokens is not known before
    _can_record_outputs = {"hidden_states": SlimQwen3MoeDecoderLayer, "attentions": Qwen3MoeAttention}


class SlimQwen3MoeModel(SlimModel, SlimQwen3MoePreTrainedModel, Qwen3MoeModel):
    layer_class = SlimQwen3MoeDecoderLayer


class SlimQwen3MoeForCausalLM(SlimForCausalLM, SlimQwen3MoePreTrainedModel, Qwen3MoeForCausalLM):
    model_class = SlimQwen3MoeModel
