# SPDX-License-Identifier: Apache-2.0
"""Nemotron with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.nemotron.configuration_nemotron import NemotronConfig
from transformers.models.nemotron.modeling_nemotron import (
    NemotronAttention,
    NemotronDecoderLayer,
    NemotronForCausalLM,
    NemotronModel,
    NemotronPreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimNemotronConfig(SlimConfig, NemotronConfig):
    model_type = "slim_nemotron"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimNemotronDecoderLayer(SlimDecoderLayer, NemotronDecoderLayer):
    pass


class SlimNemotronPreTrainedModel(NemotronPreTrainedModel):
    config_class = SlimNemotronConfig
    config: SlimNemotronConfig
    _no_split_modules = ["SlimNemotronDecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimNemotronDecoderLayer, "attentions": NemotronAttention}


class SlimNemotronModel(SlimModel, SlimNemotronPreTrainedModel, NemotronModel):
    layer_class = SlimNemotronDecoderLayer


class SlimNemotronForCausalLM(SlimForCausalLM, SlimNemotronPreTrainedModel, NemotronForCausalLM):
    model_class = SlimNemotronModel
