# SPDX-License-Identifier: Apache-2.0
"""Gemma with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma.modeling_gemma import (
    GemmaAttention,
    GemmaDecoderLayer,
    GemmaForCausalLM,
    GemmaModel,
    GemmaPreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimGemmaConfig(SlimConfig, GemmaConfig):
    model_type = "slim_gemma"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimGemmaDecoderLayer(SlimDecoderLayer, GemmaDecoderLayer):
    pass


class SlimGemmaPreTrainedModel(GemmaPreTrainedModel):
    config_class = SlimGemmaConfig
    config: SlimGemmaConfig
    _no_split_modules = ["SlimGemmaDecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimGemmaDecoderLayer, "attentions": GemmaAttention}


class SlimGemmaModel(SlimModel, SlimGemmaPreTrainedModel, GemmaModel):
    layer_class = SlimGemmaDecoderLayer


class SlimGemmaForCausalLM(SlimForCausalLM, SlimGemmaPreTrainedModel, GemmaForCausalLM):
    model_class = SlimGemmaModel
