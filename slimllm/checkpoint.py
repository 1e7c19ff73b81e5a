"""Lazy, checked reading of a checkpoint: a Hugging Face folder of safetensors, a hub id or a GGUF file.

Only the tensors asked for are read, and no mapping of the file outlives the call. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from slimllm.companions import PATTERNS, copy_companions, files_to_fetch, left_out
from slimllm.errors import HopelessError, InputError
from slimllm.families import LayerSpec, layer_spec
from slimllm.folder import (
    first_line,
    name_some,
    read_config,
    reason,
    weight_files,
)
from slimllm.foreign_json import find_object
from slimllm.headers import SAFETENSORS_DTYPES, Headers
from slimllm.tokenizer import load_tokenizer

_MAPPED_BYTES = 64 * 2**20  # of a file that is open


class Checkpoint(ABC):
    """A model on disk: its configuration, its tensors by their Hugging Face names, its tokenizer."""

    name: str
    path: Path
    config: PretrainedConfig

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, from the headers alone."""

    @abstractmethod
    def storage_dtype(self, name: str) -> torch.dtype:
        """dtype in which a tensor is stored, bfloat16 if quantised; of a bias that is new, that of its weight."""

    def dtype_in_memory(self) -> torch.dtype:
        """What the weights are once they are read, by the embeddings."""
        return self.storage_dtype(f"{layer_spec(self.config.model_type).embedding}.weight")

    @abstractmethod
    def _read(self, names: list[str]) -> dict[str, torch.Tensor]: ...

    @abstractmethod
    def tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        """Load the tokenizer; code that comes with it runs only if it is trusted."""

    @abstractmethod
    def write_companions(self, folder: Path) -> None:
        """Put what comes along with the weights into a folder: tokenizer, chat templates, generation settings."""

    def left_out(self) -> list[str]:
        """Sentences about what should come along but does not."""
        return []

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The tensors, on the CPU, as they are stored (fp32 if quantised).

        Raises:
            ValueError: (as InputError) a tensor holds NaN or infinity, or its file cannot be read.
        """
        tensors = self._read(list(names))
        for name, tensor in tensors.items():
            # Either of them is NaN if any value is; and unlike a sum they are found without a copy.
            if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
                raise HopelessError(
                    f"Tensor {name} of {self.path} holds NaN or infinite values; the checkpoint is damaged."
                )
        return tensors

    def check(self, expected: dict[str, tuple[int, ...]], spec: LayerSpec) -> None:
        """Compare the headers with what the configuration says, before any weight is read.

        What a checkpoint holds besides must be without meaning: tables of the rotary embedding, biases that are zero, a
        stored output head that equals the embeddings it is tied to.

        Args:
            expected: Names and shapes of the model's tensors.
            spec: Names of its family.

        Raises:
            ValueError: (as InputError) tensors are missing, have another shape or dtype, or have no place in the model; the
                sentence names the first and counts the rest.
        """
        found = self.shapes()
        if missing := [name for name in expected if name not in found]:
            other = next((name for name in found if name.endswith(f".{missing[0]}")), None)
            advice = f"it has {other}: save the model inside of that one" if other else "is the checkpoint complete?"
            raise InputError(f"{name_some(missing, 'is', 'are')} missing in {self.path}; {advice}")
        if other_shape := [name for name in expected if found[name] != expected[name]]:
            name, *more = other_shape
            others = f"; {len(more)} more do not fit either" if more else ""
            raise InputError(
                f"Tensor {name} in {self.path} has shape {found[name]}, but its config.json asks for {expected[name]}"
                f"{others}."
            )
        for name in expected:
            self.storage_dtype(name)  # refuses what is quantised
        unexpected = [name for name in sorted(set(found) - set(expected)) if not self._is_meaningless(name, spec)]
        if unexpected:
            raise InputError(
                f"{name_some(unexpected, 'has', 'have')} no place in the model that the configuration in {self.path} "
                "describes; left out, the result would be wrong."
            )

    def _is_meaningless(self, name: str, spec: LayerSpec) -> bool:
        if name.endswith("rotary_emb.inv_freq"):  # it follows from the configuration
            return True
        if name == f"{spec.head}.weight":  # one that differs from the embeddings is not tied, see `CheckpointModel`
            return self.config.tie_word_embeddings
        return name.endswith(".bias") and not self.read([name])[name].any()


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face folder with one or many safetensors shards.

    Tensors that are named as those of the decoder alone, without the language model around it, are found as well.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.config = read_config(path)
        self._headers = Headers(weight_files(path))
        self._headers.check(path)
        self._headers.check_layers(self.config.to_dict(), path)
        spec = layer_spec(self.config.model_type)
        prefix = f"{spec.layers.partition('.')[0]}."
        stored = self._headers.shape_of
        bare = any(name.startswith(f"{spec.layers.removeprefix(prefix)}.") for name in stored) and not any(
            name.startswith(prefix) for name in stored
        )
        self._stored = {name if not bare or name.startswith(f"{spec.head}.") else prefix + name: name for name in stored}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self._headers.shape_of[stored] for name, stored in self._stored.items()}

    def storage_dtype(self, name: str) -> torch.dtype:
        stored = self._headers.dtype_of[self._stored.get(name) or self._stored[name.removesuffix("bias") + "weight"]]
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
                        while waiting and mapped < _MAPPED_BYTES:  # the mapped file counts as memory, too
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
    """Make a fast tokenizer load alike in transformers 4 and 5.

    Version 5 writes a class name that version 4 does not know; and version 4's own class returns token_type_ids, which
    LLaMA does not take, unless it is told what the model's inputs are.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = find_object(path)
    if settings.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file or a model of the hub (only its safetensors and tokenizer are fetched).

    Raises:
        ValueError: (as InputError) there is no such model, it is no causal language model, it is quantised, or a file
            of it cannot be read.
    """
    path = Path(model).expanduser()
    if path.is_file():
        from slimllm.checkpoint_gguf import GGUFCheckpoint

        return GGUFCheckpoint(path)
    if path.is_dir():
        checkpoint = SafetensorsCheckpoint(path, path.resolve().name)
    else:
        checkpoint = SafetensorsCheckpoint(download(str(model)), str(model))
    from slimllm.checkpoint_fused import take_apart

    return take_apart(checkpoint)


def download(model: str, code: bool = False, only: tuple[str, ...] = ()) -> Path:
    """The folder of a model of the hub, fetched if it is not there yet; with its code only if `code`.

    Args:
        model: The hub id, `NAME` or `NAME@REVISION`.
        code: Fetch its Python files, too.
        only: Fetch these files and no others.

    Raises:
        ValueError: (as InputError) there is no such model, or the hub cannot be reached.
    """
    name, _, revision = model.partition("@")
    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", *PATTERNS, *(["*.py"] if code else [])]

    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(only) or patterns))
        asked: set[str] = set()
        while not only and (more := files_to_fetch(folder) - asked):  # code that has come may name more code
            snapshot_download(name, revision=folder.name, allow_patterns=sorted(more))  # of the same commit
            asked |= more
        return folder
    except HFValidationError:
        raise InputError(f"There is no folder or file {model}, and it cannot be the name of a model on the hub.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = f"the hub gave no model of that name ({first_line(error)})"
        if type(error) is LocalEntryNotFoundError and not isinstance(error.__cause__, HfHubHTTPError):
            reason = "the hub, where it may be a model, cannot be reached (or is not to be: HF_HUB_OFFLINE)."
        raise InputError(f"There is no folder or file {model}, and {reason}") from None
