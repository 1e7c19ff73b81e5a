"""Makes the native pruned formats known to transformers' Auto classes, so that no remote code is needed with slimllm."""

from importlib import import_module
from types import ModuleType
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from slimllm.models.families import FAMILIES


def modeling_file(family: str) -> ModuleType:
    """The module with the native format of a family."""
    return import_module(f"slimllm.models.modeling.modeling_slim_{family}")


def native_classes(family: str) -> tuple[Any, Any, Any]:
    """Configuration, decoder and causal language model of a family's native format."""
    module = modeling_file(family)
    config = next(value for value in vars(module).values() if getattr(value, "model_type", None) == f"slim_{family}")
    prefix = config.__name__.removesuffix("Config")
    return config, getattr(module, f"{prefix}Model"), getattr(module, f"{prefix}ForCausalLM")


def register() -> None:
    """Register all families that this version of transformers has."""
    for family in {spec.name: None for spec in FAMILIES.values()}:
        try:
            config, model, causal = native_classes(family)
        except ImportError:  # a version of transformers from before the family
            continue
        AutoConfig.register(f"slim_{family}", config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        # save_pretrained then writes the modeling files beside the weights.
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModel")
        causal.register_for_auto_class("AutoModelForCausalLM")


register()
