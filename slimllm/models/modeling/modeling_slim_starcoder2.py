# SPDX-License-Identifier: Apache-2.0
"""StarCoder 2 with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.starcoder2.configuration_starcoder2 import Starcoder2Config
from transformers.models.starcoder2.modeling_starcoder2 import (
    Starcoder2Attention,
    Starcoder2DecoderLayer,
    Starcoder2ForCausalLM,
    Starcoder2Model,
    Starcoder2PreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimStarcoder2Config(SlimConfig, Starcoder2Config):
    model_type = "slim_starcoder2"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimStarcoder2DecoderLayer(SlimDecoderLayer, Starcoder2DecoderLayer):
    down = "c_proj"


class SlimStarcoder2PreTrainedModel(Starcoder2PreTrainedModel):
    config_class = SlimStarcoder2Config
    config: SlimStarcoder2Config
    _no_split_modules = ["SlimStarcoder2DecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimStarcoder2DecoderLayer, "attentions": Starcoder2Attention}


class SlimStarcoder2Model(SlimModel, SlimStarcoder2PreTrainedModel, Starcoder2Model):
    layer_class = SlimStarcoder2DecoderLayer


class SlimStarcoder2ForCausalLM(SlimForCausalLM, SlimStarcoder2PreTrainedModel, Starcoder2ForCausalLM):
    model_class = SlimStarcoder2Model
