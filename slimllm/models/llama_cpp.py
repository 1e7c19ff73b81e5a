"""How llama.cpp reads the models of a family."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        return LLAMA.gguf
    why = "it does not compute as LLaMA does" if spec.gguf is None else spec.gguf.why_not(config)
    if spec.gguf is None or why:
        raise InputError(
            f"This {spec.name} model cannot be written as GGUF: {why}. Keep the folder; for stock architectures there is "
            "llama.cpp's own convert_hf_to_gguf.py, too."
        )
    return spec.gguf
