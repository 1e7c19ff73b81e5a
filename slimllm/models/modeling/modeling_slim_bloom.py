# SPDX-License-Identifier: Apache-2.0
"""BLOOM with per-layer numbers of heads and FFN channels; see slim_layers.py in this folder.

It also differs from BLOOM in two ways: q, k and v have separate projections, and the ALiBi slopes of the kept heads are
stored. A slope says how steeply a head's scores fall with the distance; BLOOM derives it from the head's place among all.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bloom.configuration_bloom import BloomConfig
from transformers.models.bloom.modeling_bloom import BloomForCausalLM, BloomGelu, BloomModel, BloomPreTrainedModel

from .slim_layers import SlimConfig, SlimForCausalLM, without_layers

_FIRST_SLOPE = 2.0**-8  # slope of BLOOM's biases where there is only one head


class SlimBloomConfig(SlimConfig, BloomConfig):
    model_type = "slim_bloom"

    def __init__(self, hidden_size=64, intermediate_size=None, **kwargs):
        if "n_head" in kwargs:
            kwargs["num_attention_heads"] = kwargs.pop("n_head")
        super().__init__(hidden_size=hidden_size, intermediate_size=intermediate_size or 4 * hidden_size, **kwargs)


class SlimBloomAttention(nn.Module):
    def __init__(self, config, own, layer_idx):
        super().__init__()
        self.layer_idx, self.head_dim, self.num_heads = layer_idx, config.head_dim, own.num_attention_heads
        self.attention_dropout = config.attention_dropout
        width = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width)
        self.k_proj = nn.Linear(config.hidden_size, width)
        self.v_proj = nn.Linear(config.hidden_size, width)
        self.dense = nn.Linear(width, config.hidden_size, bias=own.attention_out_bias)
        self.register_buffer("slopes", torch.ones(self.num_heads))

    def forward(self, hidden_states, alibi, attention_mask=None, layer_past=None, cache_position=None, **kwargs):
        if kwargs.get("output_attentions"):
            raise ValueError("slim_bloom does not return attention weights; leave output_attentions out.")
        batch_size, seq_len, _ = hidden_states.shape
        shape = (batch_size, seq_len, self.num_heads, self.head_dim)
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx, {"cache_position": cache_position})
        positions = alibi.view(batch_size, 1, 1, -1) / _FIRST_SLOPE
        bias = self.slopes.to(query.dtype).view(1, -1, 1, 1) * positions
        if attention_mask is not None:
            bias = bias + attention_mask[..., : key.shape[-2]]
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), dropout_p=dropout)
        return self.dense(attended.transpose(1, 2).flatten(2)), None


class SlimBloomMLP(nn.Module):
    def __init__(self, config, own):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, own.intermediate_size)
        self.gelu_impl = BloomGelu()
        self.dense_4h_to_h = nn.Linear(own.intermediate_size, config.hidden_size, bias=own.mlp_out_bias)

    def forward(self, hidden_states):
        return self.dense_4h_to_h(self.gelu_impl(self.dense_h_to_4h(hidden_states)))


class SlimBloomBlock(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        own = config.layer_config(layer_idx)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attention = SlimBloomAttention(config, own, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = SlimBloomMLP(config, own)
        self.hidden_dropout = config.hidden_dropout

    def forward(self, hidden_states, **kwargs) -> tuple[torch.Tensor, None]:
        attended, _ = self.self_attention(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + F.dropout(attended, self.hidden_dropout, self.training)
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + F.dropout(output, self.hidden_dropout, self.training), None


class SlimBloomPreTrainedModel(BloomPreTrainedModel):
    config_class = SlimBloomConfig
    config: SlimBloomConfig
    _no_split_modules = ["SlimBloomBlock"]


class SlimBloomModel(SlimBloomPreTrainedModel, BloomModel):
    def __init__(self, config):
        with without_layers(config):
            super().__init__(config)
        self.num_heads = 1  # so that the biases made for all layers are the positions times _FIRST_SLOPE
        self.h = nn.ModuleList([SlimBloomBlock(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()


class SlimBloomForCausalLM(SlimForCausalLM, SlimBloomPreTrainedModel, BloomForCausalLM):
    model_class = SlimBloomModel
