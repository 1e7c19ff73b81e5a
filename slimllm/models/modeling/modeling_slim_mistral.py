# SPDX-License-Identifier: Apache-2.0
"""Mistral with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimMistralConfig(SlimConfig, MistralConfig):
    model_type = "slim_mistral"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimMistralDecoderLayer(SlimDecoderLayer, MistralDecoderLayer):
    pass


class SlimMistralPreTrainedModel(MistralPreTrainedModel):
    config_class = SlimMistralConfig
    config: SlimMistralConfig
    _no_split_modules = ["SlimMistralDecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimMistralDecoderLayer, "attentions": MistralAttention}


class SlimMistralModel(SlimModel, SlimMistralPreTrainedModel, MistralModel):
    layer_class = SlimMistralDecoderLayer


class SlimMistralForCausalLM(SlimForCausalLM, SlimMistralPreTrainedModel, MistralForCausalLM):
    model_class = SlimMistralModel
