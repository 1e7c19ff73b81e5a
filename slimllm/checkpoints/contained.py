"""Folders of models that contain a language model, such as vision-language models, read as that language model.

The rest of the model stays as it is: its tensors are copied untouched, and config.json changes in the part of the language
model alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig

from slimllm.checkpoints.folder import read_settings
from slimllm.checkpoints.safetensors import SafetensorsCheckpoint
from slimllm.errors import InputError
from slimllm.models.families import CONTAINERS, Container, family_of

# Where folders of transformers 4 and 5, and of a model's authors, have the decoder, and the output head.
_DECODERS = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")
# dtypes that only tensors beside the language model may have, such as tables of positions.
_WHOLE_NUMBERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
_PARTS = ("embed_tokens.", "layers.", "norm.")  # of a decoder


def container_of(config: PretrainedConfig) -> Container | None:
    """Return the description of a model that contains a language model; None: it is a language model itself."""
    return CONTAINERS.get(config.model_type)


class ContainedCheckpoint(SafetensorsCheckpoint):
    """The language model inside a model on disk.

    Args:
        path: The folder.
        name: The model's name.
        whole: Configuration of the whole model.
    """

    def __init__(self, path: Path, name: str, whole: PretrainedConfig) -> None:
        self.whole = whole
        container = container_of(whole)
        assert container is not None
        self.container = container
        super().__init__(path, name, container.language_model(whole.text_config))
        tied = whole.tie_word_embeddings or self.config.tie_word_embeddings
        self.config.tie_word_embeddings = bool(tied)
        self._check_beside()

    def _names(self, stored: list[str]) -> dict[str, str]:
        """Return the stored names of the language model's tensors, by the family's names."""
        present = set(stored)
        prefix = next((one for one in _DECODERS if f"{one}layers.0.self_attn.q_proj.weight" in present), None)
        if prefix is None:
            raise InputError(
                f"{self.path} has no language model under {', '.join(_DECODERS)}; save the model again with "
                "save_pretrained."
            )
        names = {}
        for one in stored:
            own = one.removeprefix(prefix)
            if one.startswith(prefix) and own.startswith(_PARTS):
                names[f"model.{own}"] = one
            elif one in _HEADS:
                names["lm_head.weight"] = one
        self._beside = sorted(present - set(names.values()))
        return names

    def _check_beside(self) -> None:
        """Raise InputError if the files hold less beside the language model than the configuration describes."""
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(self.whole)
        inside = {id(one) for one in model.get_decoder().parameters()} | {id(model.get_output_embeddings().weight)}
        wanted = sum(one.numel() for one in model.parameters() if id(one) not in inside)
        found = sum(math.prod(shape) for shape in self.beside().values())
        if found < wanted:
            raise InputError(
                f"{self.path} holds {found:,} numbers beside the language model, but its config.json asks for {wanted:,}; "
                "is the checkpoint complete?"
            )

    def beside(self) -> dict[str, tuple[int, ...]]:
        return {name: self._headers.shape_of[name] for name in self._beside}

    def storage_dtype(self, name: str) -> torch.dtype:
        if name in self._beside and (dtype := _WHOLE_NUMBERS.get(self._headers.dtype_of[name])):
            return dtype
        return self._stored_dtype(name, name) if name in self._beside else super().storage_dtype(name)

    def stored_as(self, name: str) -> str:
        if name in self._stored:
            return self._stored[name]
        module, _, kind = name.rpartition(".")  # a bias that the recovery has added
        return f"{self._stored[f'{module}.weight'].removesuffix('weight')}{kind}"

    def around(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return config.json of the whole model, given that of its language model."""
        whole = {**read_settings(self.path), "tie_word_embeddings": settings["tie_word_embeddings"]}
        if "text_config" in whole:
            text = self._language_model(whole["text_config"], settings)
            result = {**whole, "text_config": text}
        else:  # older folders have the language model's settings among those of the whole
            result = text = self._language_model(whole, settings)
        for part in (result, text):
            for key in ("dtype", "torch_dtype"):
                if key in part:
                    part[key] = settings.get("dtype", part[key])
        return result

    def _language_model(self, before: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
        spec = family_of(self.config.model_type)
        if settings["model_type"] != spec.name:  # another architecture, with all of its settings
            return {name: value for name, value in settings.items() if name != "architectures"}
        sizes = {name: settings[name] for name in ("num_attention_heads", "num_key_value_heads", spec.width)}
        if (
            hasattr(self.whole.text_config, "head_dim")
            or settings["num_attention_heads"] != self.config.num_attention_heads
        ):
            sizes["head_dim"] = settings["head_dim"]
        if "tie_word_embeddings" in before:
            sizes["tie_word_embeddings"] = settings["tie_word_embeddings"]
        return {**before, **sizes}

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        beside = {name: self._headers.read(name) for name in names if name in self._beside}
        return beside | super()._read([name for name in names if name not in beside])
