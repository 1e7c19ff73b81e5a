# SPDX-License-Identifier: Apache-2.0
"""Apertus with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.apertus.configuration_apertus import ApertusConfig
from transformers.models.apertus.modeling_apertus import (
    ApertusAttention,
    ApertusDecoderLayer,
    ApertusForCausalLM,
    ApertusModel,
    ApertusPreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimApertusConfig(SlimConfig, ApertusConfig):
    model_type = "slim_apertus"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimApertusDecoderLayer(SlimDecoderLayer, ApertusDecoderLayer):
    pass


class SlimApertusPreTrainedModel(ApertusPreTrainedModel):
    config_class = SlimApertusConfig
    config: SlimApertusConfig
    _no_split_modules = ["SlimApertusDecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimApertusDecoderLayer, "attentions": ApertusAttention}


class SlimApertusModel(SlimModel, SlimApertusPreTrainedModel, ApertusModel):
    layer_class = SlimApertusDecoderLayer


class SlimApertusForCausalLM(SlimForCausalLM, SlimApertusPreTrainedModel, ApertusForCausalLM):
    model_class = SlimApertusModel
