# SPDX-License-Identifier: Apache-2.0
"""Qwen3 with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3PreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimQwen3Config(SlimConfig, Qwen3Config):
    model_type = "slim_qwen3"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimQwen3DecoderLayer(SlimDecoderLayer, Qwen3DecoderLayer):
    pass


class SlimQwen3PreTrainedModel(Qwen3PreTrainedModel):
    config_class = SlimQwen3Config
    config: SlimQwen3Config
    _no_split_modules = ["SlimQwen3DecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimQwen3DecoderLayer, "attentions": Qwen3Attention}


class SlimQwen3Model(SlimModel, SlimQwen3PreTrainedModel, Qwen3Model):
    layer_class = SlimQwen3DecoderLayer


class SlimQwen3ForCausalLM(SlimForCausalLM, SlimQwen3PreTrainedModel, Qwen3ForCausalLM):
    model_class = SlimQwen3Model
