# SPDX-License-Identifier: Apache-2.0
"""OPT with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder."""

import copy

import torch.nn as nn
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import (
    OPTAttention,
    OPTDecoder,
    OPTDecoderLayer,
    OPTForCausalLM,
    OPTModel,
    OPTPreTrainedModel,
)

from .slim_layers import SlimConfig, SlimForCausalLM, without_layers


class SlimOPTConfig(SlimConfig, OPTConfig):
    model_type = "slim_opt"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimOPTDecoderLayer(OPTDecoderLayer):
    def __init__(self, config, layer_idx):
        own = config.layer_config(layer_idx)
        whole = copy.copy(own)
        # OPT computes the size of a head from the number of heads.
        whole.num_attention_heads = config.hidden_size // config.head_dim
        super().__init__(whole, layer_idx)
        attention, width = self.self_attn, own.num_attention_heads * config.head_dim
        attention.config, attention.num_heads = config, own.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, nn.Linear(config.hidden_size, width, bias=config.enable_bias))
        attention.out_proj = nn.Linear(width, config.hidden_size, bias=own.attention_out_bias)
        self.fc2 = nn.Linear(own.ffn_dim, config.hidden_size, bias=own.mlp_out_bias)


class SlimOPTPreTrainedModel(OPTPreTrainedModel):
    config_class = SlimOPTConfig
    config: SlimOPTConfig
    _no_split_modules = ["SlimOPTDecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimOPTDecoderLayer, "attentions": OPTAttention}


class SlimOPTDecoder(SlimOPTPreTrainedModel, OPTDecoder):
    def __init__(self, config):
        with without_layers(config):
            super().__init__(config)
        self.layers = nn.ModuleList([SlimOPTDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()


class SlimOPTModel(SlimOPTPreTrainedModel, OPTModel):
    def __init__(self, config):
        with without_layers(config):
            super().__init__(config)
        self.decoder = SlimOPTDecoder(config)
        self.post_init()


class SlimOPTForCausalLM(SlimForCausalLM, SlimOPTPreTrainedModel, OPTForCausalLM):
    model_class = SlimOPTModel
