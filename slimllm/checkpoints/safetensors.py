"""Hugging Face folders of safetensors: only the requested tensors are read, and no mapping outlives the call."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.companions import copy_companions, left_out
from slimllm.checkpoints.folder import weight_files
from slimllm.checkpoints.foreign_json import find_object
from slimllm.checkpoints.headers import SAFETENSORS_DTYPES, Headers
from slimllm.checkpoints.tokenizer import load_tokenizer
from slimllm.errors import InputError, reason
from slimllm.models.families import family_of

_MAPPED_BYTES = 64 * 2**20  # of a file, before it is closed and opened again


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face folder with one or many safetensors shards.

    Tensors named as in the decoder alone, without the prefix of the language model around it, are found as well.

    Args:
        path: The folder.
        name: The model's name.
        config: The model's configuration, as from `read_config`.
    """

    def __init__(self, path: Path, name: str, config: PretrainedConfig) -> None:
        self.path, self.name, self.config = path, name, config
        self._headers = Headers(weight_files(path))
        self._headers.check(path)
        self._headers.check_layers(self.config.to_dict(), path)
        self._stored = self._names(list(self._headers.shape_of))

    def _names(self, stored: list[str]) -> dict[str, str]:
        """Return the stored names by those that the model has."""
        spec = family_of(self.config.model_type)
        prefix = f"{spec.layers.partition('.')[0]}."
        bare = any(name.startswith(f"{spec.layers.removeprefix(prefix)}.") for name in stored) and not any(
            name.startswith(prefix) for name in stored
        )
        return {name if not bare or name.startswith(f"{spec.head}.") else prefix + name: name for name in stored}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._headers.shape_of[stored] for name, stored in self._stored.items()}

    def storage_dtype(self, name: str) -> torch.dtype:
        return self._stored_dtype(name, self._stored.get(name) or self._stored[name.removesuffix("bias") + "weight"])

    def _stored_dtype(self, name: str, at: str) -> torch.dtype:
        stored = self._headers.dtype_of[at]
        dtype = SAFETENSORS_DTYPES.get(stored)
        if dtype is None:
            raise InputError(
                f"Tensor {name} of {self.path} is stored as {stored}; only unquantised float checkpoints can be pruned."
            )
        return dtype

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = {}
        shard_of = {name: self._headers.file_of[self._stored[name]] for name in names}
        for shard in sorted(set(shard_of.values())):
            waiting = [name for name in names if shard_of[name] == shard]
            try:
                while waiting:
                    with safe_open(shard, framework="pt") as file:
                        mapped = 0
                        while waiting and mapped < _MAPPED_BYTES:  # mapped pages count as memory, too
                            name = waiting.pop()
                            result[name] = file.get_tensor(self._stored[name]).clone()
                            mapped += result[name].nbytes
            except (SafetensorError, OSError) as error:
                raise InputError(f"Shard {shard} cannot be read ({reason(error)}); it is damaged or truncated.") from None
        return result

    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path, trust_remote_code)

    def left_out(self) -> list[str]:
        return left_out(self.path)

    def write_companions(self, folder: Path) -> None:
        copy_companions(self.path, folder)
        settle_tokenizer_class(folder)


def settle_tokenizer_class(folder: Path) -> None:
    """Make a fast tokenizer load the same way in transformers 4 and 5.

    Version 5 writes a class name that version 4 does not know. Version 4's own class returns token_type_ids, which LLaMA
    does not accept, unless the settings name the model's inputs.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = find_object(path)
    if settings.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
