"""Vision-language models: their language model is of a known family, and the rest is copied as it is.

Positions of text tokens are the same in every part of Qwen's rotary embeddings (`mrope`), which then turn as usual.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from slimllm.errors import InputError
from slimllm.models.families.base import FAMILIES, Container, register_container

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _as_it_is(config: PretrainedConfig) -> PretrainedConfig:
    if config.model_type not in FAMILIES:
        raise InputError(
            f"The language model in this model is of type {config.model_type!r}, which is not supported; supported types "
            f"are {', '.join(sorted(FAMILIES))}."
        )
    return copy.deepcopy(config)


def _without_parts_of_the_rotary(config: PretrainedConfig, model_type: str) -> PretrainedConfig:
    """Return the configuration of the language model's family, for text alone."""
    from transformers import AutoConfig

    settings = config.to_dict()
    rope: dict[str, Any] = dict(settings.pop("rope_parameters", None) or {})
    for name in ("mrope_section", "mrope_interleaved", "type"):
        rope.pop(name, None)
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    for name in ("model_type", "architectures", "transformers_version", "rope_scaling", "rope_theta"):
        settings.pop(name, None)
    return AutoConfig.for_model(model_type, **settings, rope_parameters=rope)


def _all_heads(config: PretrainedConfig, num_heads: int) -> bool:
    """Return whether a model that computes the size of a head from the number of heads takes a number."""
    return bool(num_heads == config.num_attention_heads)


for _name in ("gemma3", "mistral3", "llava", "llava_next", "llava_onevision", "internvl"):
    register_container(Container(_name, _as_it_is))
for _name in ("qwen2_vl", "qwen2_5_vl"):
    register_container(
        Container(
            _name, lambda config: _without_parts_of_the_rotary(config, "qwen2"), takes_heads=_all_heads, one_class=True
        )
    )
register_container(Container("qwen3_vl", lambda config: _without_parts_of_the_rotary(config, "qwen3"), one_class=True))
