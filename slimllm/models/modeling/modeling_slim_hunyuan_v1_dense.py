# SPDX-License-Identifier: Apache-2.0
"""Hunyuan (dense) with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

from transformers.models.hunyuan_v1_dense.configuration_hunyuan_v1_dense import HunYuanDenseV1Config
from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import (
    HunYuanDenseV1Attention,
    HunYuanDenseV1DecoderLayer,
    HunYuanDenseV1ForCausalLM,
    HunYuanDenseV1Model,
    HunYuanDenseV1PreTrainedModel,
)

from .slim_layers import SlimConfig, SlimDecoderLayer, SlimForCausalLM, SlimModel


class SlimHunYuanDenseV1Config(SlimConfig, HunYuanDenseV1Config):
    model_type = "slim_hunyuan_v1_dense"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimHunYuanDenseV1DecoderLayer(SlimDecoderLayer, HunYuanDenseV1DecoderLayer):
    pass


class SlimHunYuanDenseV1PreTrainedModel(HunYuanDenseV1PreTrainedModel):
    config_class = SlimHunYuanDenseV1Config
    config: SlimHunYuanDenseV1Config
    _no_split_modules = ["SlimHunYuanDenseV1DecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimHunYuanDenseV1DecoderLayer, "attentions": HunYuanDenseV1Attention}


class SlimHunYuanDenseV1Model(SlimModel, SlimHunYuanDenseV1PreTrainedModel, HunYuanDenseV1Model):
    layer_class = SlimHunYuanDenseV1DecoderLayer


class SlimHunYuanDenseV1ForCausalLM(SlimForCausalLM, SlimHunYuanDenseV1PreTrainedModel, HunYuanDenseV1ForCausalLM):
    model_class = SlimHunYuanDenseV1Model
