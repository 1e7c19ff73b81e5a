# SPDX-License-Identifier: Apache-2.0
"""Mixtral with per-layer numbers of heads and of channels of every expert; see slim_layers.py in this folder."""

from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralForCausalLM,
    MixtralModel,
    MixtralPreTrainedModel,
)

from .slim_layers import SlimDecoderLayer, SlimExpert, SlimForCausalLM, SlimMixture, SlimMixtureConfig, SlimModel


class SlimMixtralConfig(SlimMixtureConfig, MixtralConfig):
    model_type = "slim_mixtral"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)  # transformers generates an __init__ for configuration classes without one


class SlimMixtralExpert(SlimExpert):
    names = ("w1", "w3", "w2")


class SlimMixtralDecoderLayer(SlimDecoderLayer, MixtralDecoderLayer):
    @property
    def mlp(self):
        """The mixture, by the name that transformers 5 has for it; checkpoints have the other one.

        Before `set_ffn`, nn.Module finds the family's own module of this name.
        """
        return self.block_sparse_moe

    def set_ffn(self, own):
        self._modules.pop("mlp", None)
        sizes = own.hidden_size, own.intermediate_size, own.hidden_act
        experts = [SlimMixtralExpert(*sizes) for _ in range(own.num_local_experts)]
        self.block_sparse_moe = SlimMixture(experts, own.num_experts_per_tok, own.hidden_size, True, False)


class SlimMixtralPreTrainedModel(MixtralPreTrainedModel):
    config_class = SlimMixtralConfig
    config: SlimMixtralConfig
    _no_split_modules = ["SlimMixtralDecoderLayer"]
    _can_compile_fullgraph = False  # the number of an expert's tokens is not known before
    _can_record_outputs = {"hidden_states": SlimMixtralDecoderLayer, "attentions": MixtralAttention}


class SlimMixtralModel(SlimModel, SlimMixtralPreTrainedModel, MixtralModel):
    layer_class = SlimMixtralDecoderLayer


class SlimMixtralForCausalLM(SlimForCausalLM, SlimMixtralPreTrainedModel, MixtralForCausalLM):
    model_class = SlimMixtralModel
