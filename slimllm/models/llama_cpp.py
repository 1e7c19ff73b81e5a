"""How llama.cpp reads the models of a family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimllm.errors import InputError
from slimllm.models.families.base import Family, GGUFNames
from slimllm.models.families.llama import LLAMA

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def gguf_names(spec: Family, config: PretrainedConfig) -> GGUFNames:
    """Return llama.cpp's names of a model's architecture and modules; models that compute as LLaMA does have LLaMA's.

    Raises:
        ValueError: (as InputError) llama.cpp does not read the model, or would compute something else.
    """
    if spec.fits_llama(config):
        if config.hidden_act not in ("silu", "swish"):
            raise InputError(
                f"llama.cpp computes SiLU where this model has {config.hidden_act}; the native format keeps it."
            )
        assert LLAMA.gguf is not None
        return _with_its_rotary(LLAMA.gguf, config)
    why = "it does not compute as LLaMA does" if spec.gguf is None else spec.gguf.why_not(config)
    if spec.expert:
        raise InputError(
            f"This {spec.name} model cannot be written as GGUF: slimllm does not write mixtures of experts. Prune it with "
            "--for transformers, for llama.cpp's own convert_hf_to_gguf.py."
        )
    if spec.gguf is None or why:
        raise InputError(
            f"This {spec.name} model cannot be written as GGUF: {why}. Keep the folder; for stock architectures there is "
            "llama.cpp's own convert_hf_to_gguf.py, too."
        )
    return _with_its_rotary(spec.gguf, config)


def rope_of(config: PretrainedConfig) -> tuple[str, float, dict[str, Any]]:
    """Return the rule by which the rotary embedding is scaled, its base, and the rule's settings."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    rope = rope.get("full_attention", rope)  # of families with windows that turn otherwise
    theta = float(rope.get("rope_theta") or config.rope_theta)
    return rope.get("rope_type") or rope.get("type", "default"), theta, rope  # older configurations use "type"


def _with_its_rotary(names: GGUFNames, config: PretrainedConfig) -> GGUFNames:
    """Return the names, or raise InputError if the file could not say how the rotary embedding is scaled."""
    kind, _, _ = rope_of(config)
    if kind not in ("default", "linear", *(["llama3"] if names.architecture == "llama" else [])):
        raise InputError(
            f"Rotary embeddings scaled by the rule {kind!r} cannot be written to GGUF; the native format keeps them."
        )
    return names
