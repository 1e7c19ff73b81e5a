# SPDX-License-Identifier: Apache-2.0
"""ERNIE 4.5 with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.ernie4_5.configuration_ernie4_5 import Ernie4_5Config
from transformers.models.ernie4_5.modeling_ernie4_5 import (
    Ernie4_5Attention,
    Ernie4_5DecoderLayer,
    Ernie4_5ForCausalLM,
    Ernie4_5Model,
    Ernie4_5PreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimErnie4_5Config(SlimConfig, Ernie4_5Config):
    model_type = "slim_ernie4_5"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimErnie4_5DecoderLayer(SlimDecoderLayer, Ernie4_5DecoderLayer):
    pass


class SlimErnie4_5PreTrainedModel(Ernie4_5PreTrainedModel):
    config_class = SlimErnie4_5Config
    config: SlimErnie4_5Config
    _no_split_modules = ["SlimErnie4_5DecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimErnie4_5DecoderLayer, "attentions": Ernie4_5Attention}


class SlimErnie4_5Model(SlimModel, SlimErnie4_5PreTrainedModel, Ernie4_5Model):
    layer_class = SlimErnie4_5DecoderLayer


class SlimErnie4_5ForCausalLM(SlimForCausalLM, SlimErnie4_5PreTrainedModel, Ernie4_5ForCausalLM):
    model_class = SlimErnie4_5Model
