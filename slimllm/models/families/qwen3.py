"""Qwen 3 (dense): norms on the queries and keys of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimllm.models.families.base import (
    GGUF_HEAD_NORMS,
    GGUF_LAYER,
    GGUF_MODEL,
    Family,
    GGUFNames,
    has_windows,
    register_family,
    without_windows,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _not_in_gguf(config: PretrainedConfig) -> str | None:
    if has_windows(config):
        return "llama.cpp has no sliding windows for Qwen 3"
    if config.hidden_act not in ("silu", "swish"):
        return f"llama.cpp computes SiLU instead of {config.hidden_act}"
    return None


QWEN3 = register_family(
    Family(
        name="qwen3",
        gguf=GGUFNames("qwen3", GGUF_LAYER | GGUF_HEAD_NORMS, GGUF_MODEL, why_not=_not_in_gguf, decided=without_windows),
    )
)
