# SPDX-License-Identifier: Apache-2.0
"""LLaMA whose decoder layers have their own numbers of heads and FFN channels; see slim_layers.py beside it."""

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimLlamaConfig(SlimConfig, LlamaConfig):
    model_type = "slim_llama"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers makes one of its own for classes that have none


class SlimLlamaDecoderLayer(SlimDecoderLayer, LlamaDecoderLayer):
    pass


class SlimLlamaPreTrainedModel(LlamaPreTrainedModel):
    config_class = SlimLlamaConfig
    config: SlimLlamaConfig
    _no_split_modules = ["SlimLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimLlamaDecoderLayer, "attentions": LlamaAttention}


class SlimLlamaModel(SlimModel, SlimLlamaPreTrainedModel, LlamaModel):
    layer_class = SlimLlamaDecoderLayer


class SlimLlamaForCausalLM(SlimForCausalLM, SlimLlamaPreTrainedModel, LlamaForCausalLM):
    model_class = SlimLlamaModel
