"""A GGUF file as a checkpoint: tensors are dequantised one by one when they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from slimllm.checkpoint import Checkpoint, settle_tokenizer_class
from slimllm.errors import InputError
from slimllm.families import GGUF_ARCHITECTURES, GGUF_LAYER_NAMES, GGUF_MODEL_NAMES, layer_spec
from slimllm.folder import first_line

_FLOAT_TYPES = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}

_ROWS_AT_ONCE = 2048
_LAYERS = layer_spec("llama").layers
_Q_PROJ, _K_PROJ = GGUF_LAYER_NAMES["attn_q"], GGUF_LAYER_NAMES["attn_k"]


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies in the file; `shape` is in torch order."""

    offset: int
    num_bytes: int
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]


class GGUFCheckpoint(Checkpoint):
    """A GGUF file of the LLaMA architecture, quantised or not."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.stem
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise InputError(f"{path} cannot be read as GGUF ({error}); it is damaged or truncated.") from None
        field = reader.get_field("general.architecture")
        architecture = field.contents() if field else None
        if architecture not in GGUF_ARCHITECTURES:
            raise InputError(
                f"GGUF files of architecture {architecture!r} are not supported; "
                f"supported are {', '.join(GGUF_ARCHITECTURES)}."
            )
        scaling = reader.get_field(f"{architecture}.rope.scaling.type")
        scaled = scaling is not None and scaling.contents() != "none"
        if scaled or any(tensor.name.startswith("rope_") for tensor in reader.tensors):
            raise InputError(
                f"{path} scales its rotary embedding, by a rule that cannot be read back from GGUF; "
                "prune the model's Hugging Face folder instead."
            )
        self._entries = {}
        for tensor in reader.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            entry = _Entry(tensor.data_offset, int(tensor.n_bytes), tensor.tensor_type, shape)
            self._entries[_hugging_face_name(tensor.name)] = entry
        del reader  # with it goes the mapping of the file
        try:
            self.config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            self._tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # whatever transformers raises, the file lacks what it needs
            raise InputError(f"The configuration or tokenizer in {path} cannot be used: {first_line(error)}") from error
        for leftover in ("_model_name_or_path", "unk_token_id"):
            if hasattr(self.config, leftover):
                delattr(self.config, leftover)
        self.config.tie_word_embeddings = "lm_head.weight" not in self._entries

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def storage_dtype(self, name: str) -> torch.dtype:
        kinds = {_FLOAT_TYPES.get(entry.kind, torch.bfloat16) for entry in self._entries.values() if len(entry.shape) > 1}
        # GGUF keeps norms in fp32 whatever the weights are; a model has one dtype.
        return kinds.pop() if len(kinds) == 1 else torch.bfloat16

    def dtype_in_memory(self) -> torch.dtype:
        return torch.float32

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {name: self._read_tensor(name, self._entries[name]) for name in names}

    def _read_tensor(self, name: str, entry: _Entry) -> torch.Tensor:
        rows = entry.shape[0] if len(entry.shape) > 1 else 1
        values = np.empty((rows, math.prod(entry.shape) // rows), dtype=np.float32)
        bytes_per_row = entry.num_bytes // rows
        # A few rows at a time: dequantising takes several times the memory of its result.
        for start in range(0, rows, _ROWS_AT_ONCE):
            block = values[start : start + _ROWS_AT_ONCE]
            offset, count = entry.offset + start * bytes_per_row, len(block) * bytes_per_row
            raw = np.fromfile(self.path, dtype=np.uint8, count=count, offset=offset)
            if raw.size != count:
                raise InputError(f"{self.path} ends inside tensor {name}; it is truncated.")
            if entry.kind == gguf.GGMLQuantizationType.F32:
                block[:] = raw.view(np.float32).reshape(block.shape)
            else:
                block[:] = gguf.quants.dequantize(raw.reshape(len(block), bytes_per_row), entry.kind)
        tensor = torch.from_numpy(values).view(entry.shape)
        if name.endswith(f"{_Q_PROJ}.weight"):
            return _undo_rope_order(tensor, self.config.num_attention_heads)
        if name.endswith(f"{_K_PROJ}.weight"):
            return _undo_rope_order(tensor, self.config.num_key_value_heads)
        return tensor

    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        return self._tokenizer

    def write_companions(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)
        settle_tokenizer_class(folder)


def _hugging_face_name(name: str) -> str:
    """Ours for a tensor's name in GGUF; one that LLaMA does not have keeps its own, and is refused later on."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4:
        return f"{_LAYERS}.{parts[1]}.{GGUF_LAYER_NAMES.get(parts[2], parts[2])}.{parts[3]}"
    if parts[0] in GGUF_MODEL_NAMES and len(parts) == 2:
        return f"{GGUF_MODEL_NAMES[parts[0]]}.{parts[1]}"
    return name


def rope_order(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The rows of q or k, or their bias, as llama.cpp stores them: what `_undo_rope_order` undoes."""
    pairs = tensor.view(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _undo_rope_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp stores the rows of q and k with the rotary pairs side by side; Hugging Face, half by half."""
    pairs = weight.view(num_heads, weight.shape[0] // num_heads // 2, 2, -1)
    return pairs.transpose(1, 2).reshape(weight.shape)
