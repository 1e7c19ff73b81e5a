# SPDX-License-Identifier: Apache-2.0
"""Qwen2 with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimQwen2Config(SlimConfig, Qwen2Config):
    model_type = "slim_qwen2"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimQwen2DecoderLayer(SlimDecoderLayer, Qwen2DecoderLayer):
    pass


class SlimQwen2PreTrainedModel(Qwen2PreTrainedModel):
    config_class = SlimQwen2Config
    config: SlimQwen2Config
    _no_split_modules = ["SlimQwen2DecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimQwen2DecoderLayer, "attentions": Qwen2Attention}


class SlimQwen2Model(SlimModel, SlimQwen2PreTrainedModel, Qwen2Model):
    layer_class = SlimQwen2DecoderLayer


class SlimQwen2ForCausalLM(SlimForCausalLM, SlimQwen2PreTrainedModel, Qwen2ForCausalLM):
    model_class = SlimQwen2Model
