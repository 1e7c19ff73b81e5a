"""A decoder layer: its tensors and the module that computes with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimllm.models.families import Family
from slimllm.models.slicing import LayerSizes, Tensors, install, layer_sizes


@dataclass
class Layer:
    """A decoder layer: `module` computes, `tensors` are its weights in the dtype in which they are stored."""

    module: nn.Module
    tensors: Tensors
    spec: Family
    head_dim: int
    device: torch.device
    dtype: torch.dtype

    def replace(self, tensors: Tensors) -> None:
        """Install these tensors; those that are already in place are not copied again."""
        changed = {name for name, tensor in tensors.items() if self.tensors.get(name) is not tensor}
        self.tensors = tensors
        install(self.module, self.spec, tensors, changed, self.device, self.dtype)

    def linear(self, name: str) -> nn.Linear:
        """Return one of the layer's projections, by name."""
        module = self.module.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def sizes(self) -> LayerSizes:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return layer_sizes(shapes, self.spec, self.head_dim)


def run_layer(layer: Layer, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """Run the layer's own forward pass and return the hidden states."""
    output = layer.module(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output
