# SPDX-License-Identifier: Apache-2.0
"""Gemma 2 with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2DecoderLayer,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma2PreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimGemma2Config(SlimConfig, Gemma2Config):
    model_type = "slim_gemma2"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimGemma2DecoderLayer(SlimDecoderLayer, Gemma2DecoderLayer):
    pass


class SlimGemma2PreTrainedModel(Gemma2PreTrainedModel):
    config_class = SlimGemma2Config
    config: SlimGemma2Config
    _no_split_modules = ["SlimGemma2DecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimGemma2DecoderLayer, "attentions": Gemma2Attention}


class SlimGemma2Model(SlimModel, SlimGemma2PreTrainedModel, Gemma2Model):
    layer_class = SlimGemma2DecoderLayer


class SlimGemma2ForCausalLM(SlimForCausalLM, SlimGemma2PreTrainedModel, Gemma2ForCausalLM):
    model_class = SlimGemma2Model
