"""Model families, one file each: the only place that knows the names inside a model. New files are found automatically."""

from __future__ import annotations

import importlib
import pkgutil

from slimllm.errors import InputError
from slimllm.models.families.base import (
    CONTAINERS,
    FAMILIES,
    READ_AS,
    Biases,
    Container,
    Family,
    GGUFNames,
    ReadAs,
    Rows,
    head_dim_of,
)

__all__ = [
    "CONTAINERS",
    "FAMILIES",
    "READ_AS",
    "Biases",
    "Container",
    "Family",
    "GGUFNames",
    "ReadAs",
    "Rows",
    "family_of",
    "head_dim_of",
]

_REASONS = {
    "gpt_neox": "its attention and its FFN run in parallel rather than one after the other",
    **dict.fromkeys(("qwen2_moe", "deepseek_v2", "deepseek_v3", "llama4"), "some of its experts see all tokens"),
    "gpt_oss": "its experts have biases, and store their weights as one tensor",
    "olmoe": "it normalises the queries and keys of all heads together, so that no head can go alone",
    "mllama": "its language model sees images in layers of its own",
}

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def family_of(model_type: str) -> Family:
    """Return the family of a model type.

    Raises:
        ValueError: (as InputError) the type is not supported; the message lists the supported types.
    """
    if model_type not in FAMILIES and model_type not in READ_AS:
        known = ", ".join(sorted({*FAMILIES, *READ_AS}))
        if model_type in CONTAINERS:
            raise InputError(
                f"A model of type {model_type} contains more than a language model; save it with save_pretrained, and "
                "prune the folder, of which only the language model changes."
            )
        reason = f" ({_REASONS[model_type]})" if model_type in _REASONS else ""
        raise InputError(f"Models of type {model_type!r} are not supported{reason}; supported types are {known}.")
    return FAMILIES[READ_AS[model_type].family if model_type in READ_AS else model_type]
