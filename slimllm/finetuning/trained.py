"""What a training changes: LoRA factors beside the projections, or weights of the layers themselves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from slimllm.finetuning.config import FinetuneConfig


class Trained(Protocol):
    """Parameters to train.

    Attributes:
        model: The model that computes with them.
        parameters: The parameters, which require a gradient, by name.
        tensors: Names of the model's tensors that change.
    """

    model: Any
    parameters: dict[str, nn.Parameter]
    tensors: set[str]

    def begin_step(self) -> None:
        """Prepare for a step, after the model has been put into evaluation mode."""

    def value(self, name: str, before: torch.Tensor) -> torch.Tensor:
        """Return the new value of one of `tensors`, fp32 on the CPU, given its value before the training."""


def trained(model: PreTrainedModel, layers: str, outputs: Sequence[str], config: FinetuneConfig) -> Trained:
    """Prepare a model for a training, in place.

    Args:
        model: The model, for LoRA in the dtype of the computation, or else in float32.
        layers: The name of its list of layers.
        outputs: Names of the output projections in a layer, which `output` trains.
        config: The settings.

    Raises:
        ValueError: there is nothing of what should be trained.
    """
    if config.train == "lora":
        return _Factors(model, layers, config)
    every = {name: parameter for name, parameter in model.named_parameters() if name.startswith(f"{layers}.")}
    if config.train == "output":
        ends = tuple(f".{output}.weight" for output in outputs)
        if not any(name.endswith(ends) for name in every):
            raise ValueError(f"{layers} has no output projections named {', '.join(outputs)}.")
        every = {name: parameter for name, parameter in every.items() if name.endswith(ends) or parameter.ndim == 1}
    return _Weights(model, every)


class _Factors:
    """LoRA factors of all projections of the layers (arXiv 2106.09685); the weights stay as they are until the end."""

    def __init__(self, model: PreTrainedModel, layers: str, config: FinetuneConfig) -> None:
        from peft import LoraConfig, get_peft_model  # an extra, which other trainings do without
        from peft.tuners.lora import LoraLayer

        modules = model.get_submodule(layers).named_modules()
        targets = [f"{layers}.{name}" for name, module in modules if isinstance(module, nn.Linear)]
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng([]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # raised because of peft
            torch.manual_seed(config.seed)  # for the factors, which are initialised on the CPU
            self.model: Any = get_peft_model(model, lora)
        base: Any = self.model.base_model.model
        self._projections = {f"{name}.weight": part for name, part in base.named_modules() if isinstance(part, LoraLayer)}
        self.parameters = {name: factor for name, factor in self.model.named_parameters() if factor.requires_grad}
        self.tensors = set(self._projections)

    def begin_step(self) -> None:
        for projection in self._projections.values():
            projection.lora_dropout.train()

    def value(self, name: str, before: torch.Tensor) -> torch.Tensor:
        layer: Any = self._projections[name]
        (adapter,) = layer.active_adapters
        change: torch.Tensor = layer.get_delta_weight(adapter)
        return before.float() + change.detach().float().cpu()


class _Weights:
    """Weights of the layers themselves."""

    def __init__(self, model: PreTrainedModel, parameters: dict[str, nn.Parameter]) -> None:
        self.model: Any = model.requires_grad_(False)
        self.parameters = parameters
        for parameter in parameters.values():
            parameter.requires_grad_()
        self.tensors = set(parameters)

    def begin_step(self) -> None:
        pass

    def value(self, name: str, before: torch.Tensor) -> torch.Tensor:
        return self.parameters[name].detach().float().cpu()
