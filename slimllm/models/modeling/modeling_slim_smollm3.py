# SPDX-License-Identifier: Apache-2.0
"""SmolLM3 with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.smollm3.configuration_smollm3 import SmolLM3Config
from transformers.models.smollm3.modeling_smollm3 import (
    SmolLM3Attention,
    SmolLM3DecoderLayer,
    SmolLM3ForCausalLM,
    SmolLM3Model,
    SmolLM3PreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimSmolLM3Config(SlimConfig, SmolLM3Config):
    model_type = "slim_smollm3"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimSmolLM3DecoderLayer(SlimDecoderLayer, SmolLM3DecoderLayer):
    pass


class SlimSmolLM3PreTrainedModel(SmolLM3PreTrainedModel):
    config_class = SlimSmolLM3Config
    config: SlimSmolLM3Config
    _no_split_modules = ["SlimSmolLM3DecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimSmolLM3DecoderLayer, "attentions": SmolLM3Attention}


class SlimSmolLM3Model(SlimModel, SlimSmolLM3PreTrainedModel, SmolLM3Model):
    layer_class = SlimSmolLM3DecoderLayer


class SlimSmolLM3ForCausalLM(SlimForCausalLM, SlimSmolLM3PreTrainedModel, SmolLM3ForCausalLM):
    model_class = SlimSmolLM3Model
