# SPDX-License-Identifier: Apache-2.0
"""Ministral with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.ministral.configuration_ministral import MinistralConfig
from transformers.models.ministral.modeling_ministral import (
    MinistralAttention,
    MinistralDecoderLayer,
    MinistralForCausalLM,
    MinistralModel,
    MinistralPreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimMinistralConfig(SlimConfig, MinistralConfig):
    model_type = "slim_ministral"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimMinistralDecoderLayer(SlimDecoderLayer, MinistralDecoderLayer):
    pass


class SlimMinistralPreTrainedModel(MinistralPreTrainedModel):
    config_class = SlimMinistralConfig
    config: SlimMinistralConfig
    _no_split_modules = ["SlimMinistralDecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimMinistralDecoderLayer, "attentions": MinistralAttention}


class SlimMinistralModel(SlimModel, SlimMinistralPreTrainedModel, MinistralModel):
    layer_class = SlimMinistralDecoderLayer


class SlimMinistralForCausalLM(SlimForCausalLM, SlimMinistralPreTrainedModel, MinistralForCausalLM):
    model_class = SlimMinistralModel
