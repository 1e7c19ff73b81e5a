"""Lazy, checked reading of a checkpoint: a Hugging Face folder of safetensors, a hub id or a GGUF file.

Only the tensors asked for are read, and no mapping of the file outlives the call. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

import slimllm.registration  # noqa: F401  (so that pruned checkpoints are known to the Auto classes)
from slimllm.companions import PATTERNS, copy_companions, files_to_fetch
from slimllm.errors import HopelessError, InputError
from slimllm.families import layer_spec
from slimllm.modeling.slim_layers import knows_rope_parameters, rope_of_transformers_4

SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

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
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @abstractmethod
    def write_companions(self, folder: Path) -> None:
        """Put what comes along with the weights into a folder: tokenizer, chat templates, generation settings."""

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

    def check(self, expected: dict[str, tuple[int, ...]], layers: str) -> list[str]:
        """Compare the headers with what the configuration says, before anything is read.

        Args:
            expected: Names and shapes of the model's tensors.
            layers: Name of the decoder layers' list, `model.layers`.

        Returns:
            Names of tensors in the checkpoint that the model has no place for.

        Raises:
            ValueError: (as InputError) a tensor is missing or has another shape, or a decoder layer has one, such as a
                bias, that the configuration says nothing of; names it.
        """
        found = self.shapes()
        for name, shape in expected.items():
            if name not in found:
                raise InputError(f"Tensor {name} is missing in {self.path}; is the checkpoint complete?")
            if found[name] != shape:
                raise InputError(
                    f"Tensor {name} in {self.path} has shape {found[name]}, but its config.json asks for {shape}."
                )
        unexpected = sorted(set(found) - set(expected))
        for name in unexpected:
            # Old checkpoints hold the tables of the rotary embedding, which follow from the configuration.
            if name.startswith(f"{layers}.") and not name.endswith("rotary_emb.inv_freq"):
                raise InputError(
                    f"Tensor {name} of {self.path} has no place in the model that its configuration describes; "
                    "without it the result would be wrong."
                )
        return unexpected


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face folder with one or many safetensors shards."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.config = read_config(path)
        self._shard_of: dict[str, Path] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        self._dtype_of: dict[str, str] = {}
        for shard in _shards(path):
            try:
                with safe_open(shard, framework="pt") as file:
                    for tensor in file.keys():
                        view = file.get_slice(tensor)
                        self._shard_of[tensor] = shard
                        self._shape_of[tensor] = tuple(view.get_shape())
                        self._dtype_of[tensor] = view.get_dtype()
            except (SafetensorError, OSError) as error:
                raise InputError(f"Shard {shard} cannot be read ({error}); it is damaged or truncated.") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shape_of)

    def storage_dtype(self, name: str) -> torch.dtype:
        stored = self._dtype_of.get(name) or self._dtype_of[name.removesuffix("bias") + "weight"]
        dtype = SAFETENSORS_DTYPES.get(stored)
        if dtype is None:
            raise InputError(
                f"Tensor {name} of {self.path} is stored as {stored}; only unquantised float checkpoints can be pruned."
            )
        return dtype

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = {}
        for shard in sorted({self._shard_of[name] for name in names}):
            waiting = [name for name in names if self._shard_of[name] == shard]
            try:
                while waiting:
                    with safe_open(shard, framework="pt") as file:
                        mapped = 0
                        while waiting and mapped < _MAPPED_BYTES:  # the mapped file counts as memory, too
                            name = waiting.pop()
                            result[name] = file.get_tensor(name).clone()
                            mapped += result[name].nbytes
            except (SafetensorError, OSError) as error:
                raise InputError(f"Shard {shard} cannot be read ({error}); it is damaged or truncated.") from None
        return result

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(self.path)
        except Exception as error:  # whatever a tokenizer library raises, the user's question is "which folder?"
            raise InputError(f"The tokenizer in {self.path} cannot be loaded: {first_line(error)}") from error

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
    settings = json.loads(path.read_text(encoding="utf-8"))
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
        if path.suffix != ".gguf":
            raise InputError(f"{path} is a file, but not a .gguf file; give a model folder, a GGUF file or a hub id.")
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
        model: The hub id.
        code: Fetch its Python files, too.
        only: Fetch these files and no others.

    Raises:
        ValueError: (as InputError) there is no such model, or the hub cannot be reached.
    """
    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", *PATTERNS, *(["*.py"] if code else [])]
    try:
        folder = Path(snapshot_download(model, allow_patterns=list(only) or patterns))
        asked: set[str] = set()
        while not only and (more := files_to_fetch(folder) - asked):  # code that has come may name more code
            folder = Path(snapshot_download(model, allow_patterns=sorted(more)))
            asked |= more
        return folder
    except HFValidationError:
        raise InputError(f"There is no folder or file {model}, and it cannot be the name of a model on the hub.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = f"the hub gave no model of that name ({first_line(error)})"
        if type(error) is LocalEntryNotFoundError and not isinstance(error.__cause__, HfHubHTTPError):
            reason = "the hub, where it may be a model, cannot be reached (or is not to be: HF_HUB_OFFLINE)."
        raise InputError(f"There is no folder or file {model}, and {reason}") from None


def read_config(path: Path) -> PretrainedConfig:
    """The configuration in a folder.

    Raises:
        ValueError: (as InputError) there is none, or it is not of an unquantised causal language model that can be pruned.
    """
    if not (path / "config.json").is_file():
        raise InputError(f"{path} holds no config.json; give the folder of a Hugging Face model.")
    try:
        raw: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path / 'config.json'} is not valid JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path / 'config.json'} is not a JSON object.")
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "quantised") if isinstance(quantization, dict) else "quantised"
        raise InputError(f"{path} holds {method} weights; prune the unquantised model and quantise the result.")
    layer_spec(str(raw.get("model_type")))
    architectures = raw.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise InputError(f"{path} is no causal language model, but {', '.join(map(str, architectures))}.")
    try:
        return _with_known_rope(AutoConfig.from_pretrained(path))
    except Exception as error:  # its settings are checked by transformers, with many types of errors
        raise InputError(f"The configuration in {path} cannot be used: {first_line(error)}") from error


def _with_known_rope(config: PretrainedConfig) -> PretrainedConfig:
    """Under transformers 4, the rotary settings of a configuration that version 5 wrote, which it would ignore silently."""
    if not knows_rope_parameters() and getattr(config, "rope_parameters", None):
        for name, value in rope_of_transformers_4(config.rope_parameters).items():
            setattr(config, name, value)
        del config.rope_parameters
    return config


def _shards(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = [path / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is no index of shards ({first_line(error)}).") from None
    else:
        shards = [path / "model.safetensors"]
    for shard in shards:
        if not shard.is_file():
            if any(path.glob("*.bin")):
                raise InputError(
                    f"{path} holds its weights as pickled .bin files, which are never read; convert them to safetensors."
                )
            raise InputError(f"Shard {shard} is missing.")
    return shards


def first_line(error: BaseException) -> str:
    """An error of another library as the end of a sentence of ours; it may say what matters in its second line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]).rstrip(".") + "."
