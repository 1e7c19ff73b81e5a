"""Models without weights: tensor shapes, modules on the meta device, and the arguments that every layer receives."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from slimllm.errors import InputError, exhausted, reason
from slimllm.models.families import Family, family_of
from slimllm.models.registration import native_classes


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model on the meta device, where it takes no memory; only the rotary embedding's tables are computed.

    A mixture of experts gets the class of the native format, in which every expert is a module, as in a checkpoint.
    """
    spec = family_of(config.model_type)
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if spec.expert and config.model_type == spec.name:
                model = AutoModelForCausalLM.from_config(_with_experts_apart(model, spec), dtype=torch.float32)
        if spec.rotary:
            _make_rotary(model, spec)
    except Exception as error:  # a setting of a wrong type can raise anything in transformers
        if exhausted(error):
            raise
        raise InputError(f"The model's configuration cannot be used: {type(error).__name__}, {reason(error)}.") from error
    if sentence := spec.why_not(config):
        raise InputError(sentence)
    if config.num_hidden_layers < 1:
        raise InputError("The model's configuration says that it has no decoder layers.")
    return model.eval().requires_grad_(False)


def _with_experts_apart(model: PreTrainedModel, spec: Family) -> PretrainedConfig:
    """Return the native format's configuration of a model of the family's own class."""
    native, _, _ = native_classes(spec.name)
    settings = {
        name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "architectures")
    }
    biased = any(name.endswith(f".{spec.o_proj}.bias") for name in model.state_dict())
    converted: PretrainedConfig = native(**settings, attention_out_bias=biased)
    return converted


def _make_rotary(model: PreTrainedModel, spec: Family) -> None:
    """Compute the tables of the rotary embedding, and of the second one that Gemma 3 has under transformers 4."""
    parent, name = spec.rotary.rsplit(".", 1)
    decoder: Any = model.get_submodule(parent)
    rotary = getattr(decoder, name)
    setattr(decoder, name, type(rotary)(config=model.config))
    if hasattr(decoder, f"{name}_local"):
        config = copy.deepcopy(model.config)
        config.rope_theta, config.rope_scaling = config.rope_local_base_freq, {"rope_type": "default"}
        setattr(decoder, f"{name}_local", type(rotary)(config=config))


def embedding_scale(model: PreTrainedModel, spec: Family) -> float:
    """Return the factor by which the embedding module multiplies its weights: √D in Gemma, 1 elsewhere."""
    plain = type(model.get_submodule(spec.embedding)) is nn.Embedding
    return 1.0 if plain else float(model.config.hidden_size**0.5)


def expected_tensors(model: PreTrainedModel, spec: Family) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors in a checkpoint of this model; a tied head is not stored."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop(f"{spec.head}.weight")
    return shapes


class _Recorder(nn.Module):
    """Stand-in for a decoder layer that records its input and arguments and returns the hidden states unchanged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # For transformers 4, which chooses a mask by this attribute and where the layers of some families return tuples.
        self.attention_type = getattr(layer, "attention_type", None)
        self._in_a_tuple = "tuple" in str(inspect.signature(layer.forward).return_annotation).lower()

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor]:
        self.hidden_states, self.kwargs = hidden_states, kwargs
        return (hidden_states,) if self._in_a_tuple else hidden_states


@contextmanager
def _recorders(model: PreTrainedModel, spec: Family) -> Iterator[list[_Recorder]]:
    parent, _, layers_name = spec.layers.rpartition(".")
    decoder, norm_name = model.get_submodule(parent), spec.final_norm.rpartition(".")[2]
    layers, norm = model.get_submodule(spec.layers), getattr(decoder, norm_name)
    assert isinstance(layers, nn.ModuleList)
    recorders = [_Recorder(layer) for layer in layers]
    try:
        setattr(decoder, layers_name, nn.ModuleList(recorders))
        setattr(decoder, norm_name, nn.Identity())
        yield recorders
    finally:
        setattr(decoder, layers_name, layers)
        setattr(decoder, norm_name, norm)


def record_layer_inputs(
    model: PreTrainedModel, spec: Family, embeddings: torch.Tensor
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Run the model's own forward pass without its decoder layers, and record how it calls them.

    Masks, rotary embeddings and anything else that a family or a version of transformers passes are the real ones.

    Args:
        embeddings: (batch, seq_len, D), the token embeddings of one batch.

    Returns:
        The hidden states that enter the first layer, and the keyword arguments of every layer.
    """
    decoder = model.get_submodule(spec.layers.rsplit(".", 1)[0])
    with _recorders(model, spec) as recorders:
        decoder(inputs_embeds=embeddings, use_cache=False)
    return recorders[0].hidden_states, [recorder.kwargs for recorder in recorders]


def empty_module(model: PreTrainedModel, name: str) -> nn.Module:
    """Copy a module of the model on the meta device; the copy is to be filled with weights."""
    return copy.deepcopy(model.get_submodule(name))
