"""Registration of the native formats with transformers' Auto classes, so that slimllm loads them without remote code."""

from importlib import import_module
from types import ModuleType
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from slimllm.models.families import FAMILIES


def modeling_file(family: str) -> ModuleType:
    """Return the module that defines a family's native format."""
    return import_module(f"slimllm.models.modeling.modeling_slim_{family}")


def native_classes(family: str) -> tuple[Any, Any, Any]:
    """Return the classes of a family's native format: configuration, decoder and causal language model."""
    module = modeling_file(family)
    config = next(value for value in vars(module).values() if getattr(value, "model_type", None) == f"slim_{family}")
    prefix = config.__name__.removesuffix("Config")
    return config, getattr(module, f"{prefix}Model"), getattr(module, f"{prefix}ForCausalLM")


def register() -> None:
    """Register the native formats of all families that the installed transformers has."""
    for family in {spec.name: None for spec in FAMILIES.values()}:
        try:
            config, model, causal = native_classes(family)
        except ImportError:  # this transformers is older than the family
            continue
        AutoConfig.register(f"slim_{family}", config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
        # Makes save_pretrained write the modeling files next to the weights.
        config.register_for_auto_class()
        model.register_for_auto_class("AutoModel")
        causal.register_for_auto_class("AutoModelForCausalLM")


register()
