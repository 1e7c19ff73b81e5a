# SPDX-License-Identifier: Apache-2.0
"""Base classes that give each decoder layer of a `transformers` family its own numbers of heads and FFN channels.

Each class here precedes the family's own class among the bases. A model differs from the stock one in two ways: each layer
is built from its own entry of `config.per_layer_config`, and `o_proj` / `down_proj` may have a bias independently of the
other projections.
"""

import copy
from contextlib import contextmanager

import torch
import torch.nn as nn
import transformers
from transformers.activations import ACT2FN


def rope_of_transformers_4(rope):
    """Convert the `rope_parameters` of transformers 5 to the settings of transformers 4."""
    settings = {}
    if "full_attention" in rope:  # one entry per layer type
        settings["rope_local_base_freq"] = rope.get("sliding_attention", {}).get("rope_theta", 10000.0)
        rope = rope["full_attention"]
    rope = dict(rope)
    settings["rope_theta"] = rope.pop("rope_theta", 10000.0)
    settings["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return settings


def knows_rope_parameters():
    """Return whether this version of transformers has `rope_parameters`."""
    return int(transformers.__version__.split(".")[0]) >= 5


class SlimConfig:
    """A family's configuration with sizes by layer.

    `per_layer_config` maps a layer's index to the values in which the layer differs from the global ones, among
    `num_attention_heads`, `num_key_value_heads`, `intermediate_size` (or the family's name for it), `attention_out_bias`
    and `mlp_out_bias`. The global values are the largest over the layers. The two biases are those of a layer's `o_proj`
    and `down_proj`.
    """

    def __init__(self, attention_out_bias=False, mlp_out_bias=False, per_layer_config=None, **kwargs):
        if "rope_parameters" in kwargs and not knows_rope_parameters():
            kwargs.update(rope_of_transformers_4(kwargs.pop("rope_parameters")))
        # Stock configurations require that the number of heads divides hidden_size. Here it need not, because head_dim is
        # explicit: the parent gets a number that passes, and the true one is set afterwards.
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
        """Skip the family's checks of the global sizes: these are maxima over the layers, and need not pass."""

    def to_dict(self):
        """Return the settings without our own switch: tools that read config.json without this class do not need it."""
        settings = super().to_dict()
        settings.pop("allow_global_per_layer_attribute_access", None)
        return settings

    def layer_config(self, layer_idx):
        """Return the configuration of one layer: this one, with the layer's own sizes instead of the global ones."""
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
    """A family's decoder layer, built with the layer's own sizes; `down` is the name of its FFN's output projection."""

    down = "down_proj"

    def __init__(self, config, layer_idx):
        own = config.layer_config(layer_idx)
        super().__init__(own, layer_idx)
        # Settings that change after construction (the attention implementation) are set in the global configuration.
        for module in (self, self.self_attn, self.mlp):
            if hasattr(module, "config"):
                module.config = config
        # The family's own switches for biases do not distinguish these two from the other projections.
        o_proj = self.self_attn.o_proj
        self.self_attn.o_proj = nn.Linear(o_proj.in_features, config.hidden_size, bias=own.attention_out_bias)
        self.set_ffn(own)

    def set_ffn(self, own):
        """Replace what the FFN of this layer's configuration has that the family's own does not."""
        down_proj = getattr(self.mlp, self.down)
        setattr(self.mlp, self.down, nn.Linear(down_proj.in_features, own.hidden_size, bias=own.mlp_out_bias))


class SlimExpert(nn.Module):
    """One expert, a gated FFN; `names` are those of its gate, up and down projections."""

    names = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, hidden_size, width, activation):
        super().__init__()
        self.intermediate_size, self.activation = width, ACT2FN[activation]
        gate, up, down = self.names
        setattr(self, gate, nn.Linear(hidden_size, width, bias=False))
        setattr(self, up, nn.Linear(hidden_size, width, bias=False))
        setattr(self, down, nn.Linear(width, hidden_size, bias=False))

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.activation(gate(x)) * up(x))


class SlimMixture(nn.Module):
    """A mixture of experts, y = Σ_e g_e E_e(x) over the `top_k` experts whose gates g are the largest.

    The experts are modules of their own, as they are in a checkpoint, and not one tensor. `normalised`: the gates of a
    token sum to 1. `rounded`: they are rounded to the dtype of x, as some families do.
    """

    def __init__(self, experts, top_k, hidden_size, normalised, rounded):
        super().__init__()
        self.top_k, self.normalised, self.rounded = top_k, normalised, rounded
        self.gate = nn.Linear(hidden_size, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)

    def route(self, x):
        """Return (number, numbers of its tokens, their gates) of every expert that has any of the tokens x, (n, D)."""
        gates, chosen = self.gate(x).softmax(-1, dtype=torch.float32).topk(self.top_k, -1)
        if self.normalised:
            gates = gates / gates.sum(-1, keepdim=True)
        gates = (gates.to(x.dtype) if self.rounded else gates).flatten()
        order = chosen.flatten().sort(stable=True).indices
        counts = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = enumerate(zip(order.div(self.top_k, rounding_mode="floor").split(counts), gates[order].split(counts)))
        return [(number, tokens, own) for number, (tokens, own) in parts if len(tokens)]

    def forward(self, hidden_states):
        x = hidden_states.flatten(0, -2)
        output = torch.zeros_like(x)
        for number, tokens, gates in self.route(x):
            own = self.experts[number](x[tokens]) * gates[:, None]
            output.index_add_(0, tokens, own.to(x.dtype))
        output = output.view_as(hidden_states)
        return output if knows_rope_parameters() else (output, None)  # transformers 4 has the router's logits, too


class SlimMixtureConfig(SlimConfig):
    """A configuration of a mixture of experts, without the router's logits, which only the family's own class has."""

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "output_router_logits": False})


@contextmanager
def without_layers(config):
    """Keep the family's own constructor from building every layer at the largest size."""
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
    """A family's causal language model, with a decoder of the class `model_class`."""

    def __init__(self, config):
        with without_layers(config):
            super().__init__(config)
        setattr(self, self.base_model_prefix, self.model_class(config))
        self.post_init()
