# SPDX-License-Identifier: Apache-2.0
"""LLaMA with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

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
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


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
