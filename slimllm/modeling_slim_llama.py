# SPDX-License-Identifier: Apache-2.0
"""LLaMA whose decoder layers have their own numbers of heads and FFN channels.

This file is shipped inside every natively pruned checkpoint and is all the custom code such a checkpoint has. It is
stock `transformers` LLaMA but for two things: each layer is built from its own entry of `config.per_layer_config`, and
`o_proj` / `down_proj` may have a bias while the other projections have none.

It works with transformers 4.51 and later; from 5.14 on, `per_layer_config` is a field that transformers knows.
"""

import copy

import torch.nn as nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


class SlimLlamaConfig(LlamaConfig):
    """LLaMA's configuration, with sizes by layer.

    `per_layer_config` maps a layer's index to those of `num_attention_heads`, `num_key_value_heads`,
    `intermediate_size`, `attention_out_bias` and `mlp_out_bias` in which the layer differs from the global values, which
    are the largest over the layers. The last two give a layer's `o_proj` and `down_proj` a bias of their own.
    """

    model_type = "slim_llama"

    def __init__(self, attention_out_bias=False, mlp_out_bias=False, per_layer_config=None, **kwargs):
        if "rope_parameters" in kwargs and "rope_parameters" not in getattr(LlamaConfig, "__dataclass_fields__", {}):
            # transformers 4 knows the same numbers as rope_theta and rope_scaling.
            rope = dict(kwargs.pop("rope_parameters"))
            kwargs["rope_theta"] = rope.pop("rope_theta", 10000.0)
            kwargs["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
        # LlamaConfig insists that the number of heads divides hidden_size. Here it need not (head_dim is explicit),
        # so the parent sees a number that passes, and the true one is set afterwards.
        num_heads = kwargs.pop("num_attention_heads", 32)
        kwargs["num_key_value_heads"] = kwargs.get("num_key_value_heads") or num_heads
        kwargs["head_dim"] = kwargs.get("head_dim") or kwargs.get("hidden_size", 4096) // num_heads
        kwargs.pop("auto_map", None)
        super().__init__(num_attention_heads=1, **kwargs)
        self.num_attention_heads = num_heads
        self.attention_out_bias = attention_out_bias
        self.mlp_out_bias = mlp_out_bias
        # vLLM asks for AutoModel, everything else for AutoModelForCausalLM.
        self.auto_map = {
            "AutoConfig": "modeling_slim_llama.SlimLlamaConfig",
            "AutoModel": "modeling_slim_llama.SlimLlamaModel",
            "AutoModelForCausalLM": "modeling_slim_llama.SlimLlamaForCausalLM",
        }
        if per_layer_config:
            self.per_layer_config = per_layer_config
            # Tools that size one cache for all layers read the global values, which are the maxima.
            self.allow_global_per_layer_attribute_access = True

    def validate(self):
        """Global sizes are maxima over the layers: LLaMA's rules about them do not apply."""

    def to_dict(self):
        """Without our own switch: tools that read config.json without this class need not see it."""
        settings = super().to_dict()
        settings.pop("allow_global_per_layer_attribute_access", None)
        return settings

    def layer_config(self, layer_idx):
        """The configuration of one layer: this one, with the layer's own sizes in place of the global ones."""
        if getattr(self, "is_heterogeneous", False):
            return self.per_layer_config[layer_idx]
        config = copy.copy(self)
        overrides = getattr(self, "per_layer_config", None)
        if isinstance(overrides, dict):
            own = {int(index): sizes for index, sizes in overrides.items()}.get(layer_idx, {})
            for name, value in own.items():
                setattr(config, name, value)
        return config


class SlimLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        own = config.layer_config(layer_idx)
        super().__init__(own, layer_idx)
        # Settings that change after construction (the attention implementation) live in the global configuration.
        self.self_attn.config = config
        self.mlp.config = config
        # LLaMA's own switches, attention_bias and mlp_bias, do not separate these two from the other projections.
        o_proj, down_proj = self.self_attn.o_proj, self.mlp.down_proj
        self.self_attn.o_proj = nn.Linear(o_proj.in_features, config.hidden_size, bias=own.attention_out_bias)
        self.mlp.down_proj = nn.Linear(down_proj.in_features, config.hidden_size, bias=own.mlp_out_bias)


class SlimLlamaPreTrainedModel(LlamaPreTrainedModel):
    config_class = SlimLlamaConfig
    config: SlimLlamaConfig
    _no_split_modules = ["SlimLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": SlimLlamaDecoderLayer, "attentions": LlamaAttention}


class SlimLlamaModel(SlimLlamaPreTrainedModel, LlamaModel):
    def __init__(self, config):
        # Not LlamaModel.__init__, which would build every layer at the global sizes first.
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([SlimLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class SlimLlamaForCausalLM(SlimLlamaPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.model = SlimLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
