# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 (text) with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3DecoderLayer,
    Gemma3ForCausalLM,
    Gemma3PreTrainedModel,
    Gemma3TextModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimGemma3Config(SlimConfig, Gemma3TextConfig):
    model_type = "slim_gemma3_text"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimGemma3DecoderLayer(SlimDecoderLayer, Gemma3DecoderLayer):
    pass


class SlimGemma3PreTrainedModel(Gemma3PreTrainedModel):
    config_class = SlimGemma3Config
    config: SlimGemma3Config
    _no_split_modules = ["SlimGemma3DecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimGemma3DecoderLayer, "attentions": Gemma3Attention}


class SlimGemma3Model(SlimModel, SlimGemma3PreTrainedModel, Gemma3TextModel):
    layer_class = SlimGemma3DecoderLayer


class SlimGemma3ForCausalLM(SlimForCausalLM, SlimGemma3PreTrainedModel, Gemma3ForCausalLM):
    model_class = SlimGemma3Model
