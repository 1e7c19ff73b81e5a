# SPDX-License-Identifier: Apache-2.0
"""Granite with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.granite.configuration_granite import GraniteConfig
from transformers.models.granite.modeling_granite import (
    GraniteAttention,
    GraniteDecoderLayer,
    GraniteForCausalLM,
    GraniteModel,
    GranitePreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimGraniteConfig(SlimConfig, GraniteConfig):
    model_type = "slim_granite"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimGraniteDecoderLayer(SlimDecoderLayer, GraniteDecoderLayer):
    pass


class SlimGranitePreTrainedModel(GranitePreTrainedModel):
    config_class = SlimGraniteConfig
    config: SlimGraniteConfig
    _no_split_modules = ["SlimGraniteDecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimGraniteDecoderLayer, "attentions": GraniteAttention}


class SlimGraniteModel(SlimModel, SlimGranitePreTrainedModel, GraniteModel):
    layer_class = SlimGraniteDecoderLayer


class SlimGraniteForCausalLM(SlimForCausalLM, SlimGranitePreTrainedModel, GraniteForCausalLM):
    model_class = SlimGraniteModel
