# SPDX-License-Identifier: Apache-2.0
"""Arcee with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.arcee.configuration_arcee import ArceeConfig
from transformers.models.arcee.modeling_arcee import (
    ArceeAttention,
    ArceeDecoderLayer,
    ArceeForCausalLM,
    ArceeModel,
    ArceePreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimArceeConfig(SlimConfig, ArceeConfig):
    model_type = "slim_arcee"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimArceeDecoderLayer(SlimDecoderLayer, ArceeDecoderLayer):
    pass


class SlimArceePreTrainedModel(ArceePreTrainedModel):
    config_class = SlimArceeConfig
    config: SlimArceeConfig
    _no_split_modules = ["SlimArceeDecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimArceeDecoderLayer, "attentions": ArceeAttention}


class SlimArceeModel(SlimModel, SlimArceePreTrainedModel, ArceeModel):
    layer_class = SlimArceeDecoderLayer


class SlimArceeForCausalLM(SlimForCausalLM, SlimArceePreTrainedModel, ArceeForCausalLM):
    model_class = SlimArceeModel
