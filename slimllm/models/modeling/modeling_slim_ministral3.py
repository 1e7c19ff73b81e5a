# SPDX-License-Identifier: Apache-2.0
"""Ministral 3 with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.ministral3.configuration_ministral3 import Ministral3Config
from transformers.models.ministral3.modeling_ministral3 import (
    Ministral3Attention,
    Ministral3DecoderLayer,
    Ministral3ForCausalLM,
    Ministral3Model,
    Ministral3PreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimMinistral3Config(SlimConfig, Ministral3Config):
    model_type = "slim_ministral3"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimMinistral3DecoderLayer(SlimDecoderLayer, Ministral3DecoderLayer):
    pass


class SlimMinistral3PreTrainedModel(Ministral3PreTrainedModel):
    config_class = SlimMinistral3Config
    config: SlimMinistral3Config
    _no_split_modules = ["SlimMinistral3DecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimMinistral3DecoderLayer, "attentions": Ministral3Attention}


class SlimMinistral3Model(SlimModel, SlimMinistral3PreTrainedModel, Ministral3Model):
    layer_class = SlimMinistral3DecoderLayer


class SlimMinistral3ForCausalLM(SlimForCausalLM, SlimMinistral3PreTrainedModel, Ministral3ForCausalLM):
    model_class = SlimMinistral3Model
