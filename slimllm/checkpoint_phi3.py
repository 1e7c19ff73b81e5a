"""Phi-3 as what it computes: Mistral, with q, k and v in one projection and gate and up in another, taken apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig, PretrainedConfig, PreTrainedTokenizerBase

from slimllm.checkpoint import Checkpoint
from slimllm.errors import InputError
from slimllm.families import layer_spec
from slimllm.native import head_dim_of

_SPEC = layer_spec("mistral")
# Fused projections, and what their rows are, one behind the other.
_FUSED = {
    "self_attn.qkv_proj": (_SPEC.q_proj, _SPEC.k_proj, _SPEC.v_proj),
    "mlp.gate_up_proj": (_SPEC.gate_proj, _SPEC.up_proj),
}
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
    "rope_parameters", "rope_theta", "rope_scaling", "original_max_position_embeddings", "sliding_window",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
)  # fmt: skip


class Phi3Checkpoint(Checkpoint):
    """A Phi-3 checkpoint, with the names and the configuration of Mistral.

    Args:
        fused: The checkpoint as it is on the disk.

    Raises:
        ValueError: (as InputError) its rotary embedding turns a part of each head only, as in Phi-4-mini.
    """

    def __init__(self, fused: Checkpoint) -> None:
        self._fused, self.name, self.path = fused, fused.name, fused.path
        self.config = as_mistral(fused.config)
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        self._rows = {
            _SPEC.q_proj: heads * self.config.head_dim, _SPEC.k_proj: kv_heads * self.config.head_dim,
            _SPEC.v_proj: kv_heads * self.config.head_dim, _SPEC.gate_proj: self.config.intermediate_size,
            _SPEC.up_proj: self.config.intermediate_size,
        }  # fmt: skip

    def shapes(self) -> dict[str, tuple[int, ...]]:
        result: dict[str, tuple[int, ...]] = {}
        for name, shape in self._fused.shapes().items():
            parts = _parts(name)
            if parts and sum(self._rows[part] for part in _FUSED[parts[1]]) == shape[0]:
                result |= {f"{parts[0]}{part}.weight": (self._rows[part], shape[1]) for part in _FUSED[parts[1]]}
            else:
                result[name] = shape
        return result

    def storage_dtype(self, name: str) -> torch.dtype:
        return self._fused.storage_dtype(self._where(name)[0])

    def _where(self, name: str) -> tuple[str, slice | None]:
        """The tensor on the disk that holds one of ours, and which of its rows; None: all."""
        for fused, parts in _FUSED.items():
            for number, part in enumerate(parts):
                if name.endswith(f"{part}.weight"):
                    start = sum(self._rows[before] for before in parts[:number])
                    prefix = name[: name.index(part)]
                    return f"{prefix}{fused}.weight", slice(start, start + self._rows[part])
        return name, None

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        places = {name: self._where(name) for name in names}
        stored = self._fused._read(sorted({place for place, _ in places.values()}))
        return {
            name: stored[place] if rows is None else stored[place][rows].clone() for name, (place, rows) in places.items()
        }

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._fused.tokenizer()

    def write_companions(self, folder: Path) -> None:
        self._fused.write_companions(folder)


def _parts(name: str) -> tuple[str, str] | None:
    """The layer's prefix, and the fused projection, of a tensor's name."""
    for fused in _FUSED:
        if name.endswith(f"{fused}.weight"):
            return name.removesuffix(f"{fused}.weight"), fused
    return None


def as_mistral(config: PretrainedConfig) -> PretrainedConfig:
    """A Phi-3 configuration as that of the Mistral model that computes the same.

    Raises:
        ValueError: (as InputError) there is none.
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) not in (None, 1.0):
        raise InputError(
            "This Phi model turns only a part of each head by its rotary embedding, for which the pruned model has no form;"
            " models that turn all of it, such as Phi-3-mini and Phi-3.5-mini, can be pruned."
        )
    settings = {name: getattr(config, name) for name in _KEPT if hasattr(config, name)}
    return MistralConfig(**settings, head_dim=head_dim_of(config), architectures=["MistralForCausalLM"])
