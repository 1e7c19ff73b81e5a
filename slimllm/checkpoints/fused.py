"""Families with fused projections, read as what they compute with a projection for each of q, k, v, gate and up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.native import head_dim_of
from slimllm.errors import InputError
from slimllm.models.families import LayerSpec, layer_spec
from slimllm.models.modeling.modeling_slim_bloom import SlimBloomConfig

Rows = slice | torch.Tensor


class FusedCheckpoint(Checkpoint):
    """A checkpoint with its fused projections taken apart.

    Args:
        fused: The checkpoint as it is on the disk.
        config: Of what it is read as.
        rows: By the name of a fused projection in a layer, its parts, and which of its rows each of them has.
    """

    def __init__(self, fused: Checkpoint, config: PretrainedConfig, rows: dict[str, dict[str, Rows]]) -> None:
        self._fused, self.name, self.path, self.config = fused, fused.name, fused.path, config
        self._places = {part: (whole, own) for whole, parts in rows.items() for part, own in parts.items()}
        self._parts = {whole: list(parts) for whole, parts in rows.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        result: dict[str, tuple[int, ...]] = {}
        for name, shape in self._fused.shapes().items():
            module, _, kind = name.rpartition(".")
            for whole, parts in self._parts.items():
                if module.endswith(f".{whole}"):
                    numbers = [_length(self._places[part][1]) for part in parts]
                    if (asked := sum(numbers)) != shape[0]:
                        raise InputError(
                            f"Tensor {name} in {self.path} has {shape[0]} rows, but its config.json asks for {asked}."
                        )
                    for part, number in zip(parts, numbers):
                        result[f"{module.removesuffix(whole)}{part}.{kind}"] = (number, *shape[1:])
                    break
            else:
                result[name] = shape
        return result

    def storage_dtype(self, name: str) -> torch.dtype:
        return self._fused.storage_dtype(self._place(name)[0])

    def _place(self, name: str) -> tuple[str, Rows | None]:
        """The tensor on the disk that holds one of ours, and which of its rows; None: all."""
        module, _, kind = name.rpartition(".")
        for part, (whole, rows) in self._places.items():
            if module.endswith(f".{part}"):
                return f"{module.removesuffix(part)}{whole}.{kind}", rows
        return name, None

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        places = {name: self._place(name) for name in names}
        stored = self._fused._read(sorted({place for place, _ in places.values()}))
        result = {}
        for name, (place, rows) in places.items():
            part = stored[place] if rows is None else stored[place][rows]
            result[name] = part.clone() if isinstance(rows, slice) else part  # a slice would keep all of it in memory
        return result

    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        return self._fused.tokenizer(trust_remote_code)

    def left_out(self) -> list[str]:
        return self._fused.left_out()

    def write_companions(self, folder: Path) -> None:
        self._fused.write_companions(folder)


def _length(rows: Rows) -> int:
    return int(rows.stop - rows.start) if isinstance(rows, slice) else len(rows)


# What Mistral's configuration has from Phi-3's.
_KEPT_OF_PHI3 = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "original_max_position_embeddings",
    "sliding_window",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)


def read_as(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of what a model with fused projections is read as; that of any other as it is.

    Raises:
        ValueError: (as InputError) its rotary embedding turns a part of each head only, as in Phi-4-mini; or its residual
            connections go by what a norm has made of the stream, as an option of BLOOM's has it.
    """
    if config.model_type == "bloom":
        if config.apply_residual_connection_post_layernorm:
            raise InputError("This BLOOM model adds to the residual stream behind a norm, which is not supported.")
        kept = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "architectures")}
        biases = {"attention_out_bias": True, "mlp_out_bias": True}
        return SlimBloomConfig(**kept, **biases, architectures=["SlimBloomForCausalLM"])
    if config.model_type != "phi3":
        return config
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) not in (None, 1.0):
        raise InputError(
            "This Phi model turns only a part of each head by its rotary embedding, for which the pruned model has no form;"
            " models that turn all of it, such as Phi-3-mini and Phi-3.5-mini, can be pruned."
        )
    settings = {name: getattr(config, name) for name in _KEPT_OF_PHI3 if hasattr(config, name)}
    return MistralConfig(**settings, head_dim=head_dim_of(config), architectures=["MistralForCausalLM"])


def take_apart(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with fused projections as what it is read as; any other as it is."""
    kind, config = checkpoint.config.model_type, read_as(checkpoint.config)
    if config is checkpoint.config:
        return checkpoint
    spec, width = layer_spec(config.model_type), config.num_attention_heads * head_dim_of(config)
    qkv = (spec.q_proj, spec.k_proj, spec.v_proj)
    if kind == "bloom":
        return BloomCheckpoint(checkpoint, config, spec)
    kv_width, channels = config.num_key_value_heads * head_dim_of(config), config.intermediate_size
    return FusedCheckpoint(
        checkpoint,
        config,
        {
            "self_attn.qkv_proj": _one_behind_the_other(qkv, (width, kv_width, kv_width)),
            "mlp.gate_up_proj": _one_behind_the_other(spec.into_ffn, (channels, channels)),
        },
    )


def _one_behind_the_other(parts: tuple[str, ...], numbers: tuple[int, ...]) -> dict[str, Rows]:
    ends = torch.tensor(numbers).cumsum(0).tolist()
    return {part: slice(end - number, end) for part, number, end in zip(parts, numbers, ends)}


class BloomCheckpoint(FusedCheckpoint):
    """BLOOM, whose q, k and v are interleaved by head, with the slopes of its position bias, one for each head."""

    def __init__(self, fused: Checkpoint, config: PretrainedConfig, spec: LayerSpec) -> None:
        heads = config.num_attention_heads
        rows = torch.arange(3 * heads * config.head_dim).view(heads, 3, config.head_dim)
        qkv: dict[str, Rows] = {
            part: rows[:, i].flatten() for i, part in enumerate((spec.q_proj, spec.k_proj, spec.v_proj))
        }
        super().__init__(fused, config, {"self_attention.query_key_value": qkv})
        biases = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # slope times position
        self._slopes = biases.view(heads, 2)[:, 1].clone()
        self._names = [f"{spec.layers}.{i}.{spec.slopes}" for i in range(config.num_hidden_layers)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return super().shapes() | {name: tuple(self._slopes.shape) for name in self._names}

    def storage_dtype(self, name: str) -> torch.dtype:
        return self._slopes.dtype if name in self._names else super().storage_dtype(name)

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        made = {name: self._slopes.clone() for name in names if name in self._names}
        return super()._read([name for name in names if name not in made]) | made
