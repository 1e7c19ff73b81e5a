# SPDX-License-Identifier: Apache-2.0
"""What turns a family of `transformers` into one whose decoder layers have their own numbers of heads and FFN channels.

Each class here goes before the family's own one among the bases. A model is the stock one but for two things: each layer is
built from its own entry of `config.per_layer_config`, and `o_proj` / `down_proj` may have a bias whatever the others have.
"""

import copy
from contextlib import contextmanager

import torch.nn as nn
import transformers


def rope_of_transformers_4(rope):
    """The settings in which transformers 4 has the numbers of version 5's `rope_parameters`."""
    settings = {}
    if "full_attention" in rope:  # by the type of a layer
        settings["rope_local_base_freq"] = rope.get("sliding_attention", {}).get("rope_theta", 10000.0)
        rope = rope["full_attention"]
    rope = dict(rope)
    settings["rope_theta"] = rope.pop("rope_theta", 10000.0)
    settings["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return settings


def knows_rope_parameters():
    """Whether this version of transformers has `rope_parameters`."""
    return int(transformers.__version__.split(".")[0]) >= 5


class SlimConfig:
    """A family's configuration with sizes by layer.

    `per_layer_config` maps a layer's index to those of `num_attention_heads`, `num_key_value_heads`,
    `intermediate_size`, `attention_out_bias` and `mlp_out_bias` in which the layer differs from the global values, which
    are the largest over the layers. The last two give a layer's `o_proj` and `down_proj` a bias of their own.
    """

    def __init__(self, attention_out_bias=False, mlp_out_bias=False, per_layer_config=None, **kwargs):
        if "rope_parameters" in kwargs and not knows_rope_parameters():
            kwargs.update(rope_of_transformers_4(kwargs.pop("rope_parameters")))
        # Families insist that the number of heads divides hidden_size. Here it need not (head_dim is explicit),
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
        name = type(self).__name__.removesuffix("Config")
        file = f"modeling_{self.model_type}"
        self.auto_map = {
            "AutoConfig": f"{file}.{name}Config",
            "AutoModel": f"{file}.{name}Model",
            "AutoModelForCausalLM": f"{file}.{name}ForCausalLM",
        }
        if per_layer_config:
            self.per_layer_config = per_layer_config
            # Tools that size one cache for all layers read the global values, which are the maxima.
            self.allow_global_per_layer_attribute_access = True

    def validate(self):
        """Global sizes are maxima over the layers: the family's rules about them do not apply."""

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


class SlimDecoderLayer:
    """A family's decoder layer, of the layer's own sizes."""

    def __init__(self, config, layer_idx):
        own = config.layer_config(layer_idx)
        super().__init__(own, layer_idx)
        # Settings that change after construction (the attention implementation) live in the global configuration.
        for module in (self, self.self_attn, self.mlp):
            if hasattr(module, "config"):
                module.config = config
        # The family's own switches for biases do not separate these two from the other projections.
        o_proj, down_proj = self.self_attn.o_proj, self.mlp.down_proj
        self.self_attn.o_proj = nn.Linear(o_proj.in_features, config.hidden_size, bias=own.attention_out_bias)
        self.mlp.down_proj = nn.Linear(down_proj.in_features, config.hidden_size, bias=own.mlp_out_bias)


@contextmanager
def without_layers(config):
    """So that the family's own constructor does not build every layer at the largest size."""
    number, config.num_hidden_layers = config.num_hidden_layers, 0
    try:
        yield
    finally:
        config.num_hidden_layers = number


class SlimModel:
    """A family's decoder, with layers of the class `layer_class`."""

    def __init__(self, config):
        with without_layers(config):
            super().__init__(config)
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()


class SlimForCausalLM:
    """A family's causal language model, around a decoder of the class `model_class`."""

    def __init__(self, config):
        with without_layers(config):
            super().__init__(config)
        setattr(self, self.base_model_prefix, self.model_class(config))
        self.post_init()
