"""Opening of a model by its name: a Hugging Face folder, a hub id or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.companions import PATTERNS, files_to_fetch
from slimllm.checkpoints.contained import ContainedCheckpoint, container_of
from slimllm.checkpoints.folder import read_config
from slimllm.checkpoints.fused import take_apart
from slimllm.checkpoints.safetensors import SafetensorsCheckpoint
from slimllm.errors import InputError, first_line


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a Hugging Face folder, a GGUF file or a model of the hub (only its safetensors and tokenizer are fetched).

    Raises:
        ValueError: (as InputError) there is no such model, it is not a causal language model, it is quantised, or one of
            its files cannot be read.
    """
    path = Path(model).expanduser()
    if path.is_file():
        try:  # folders are read without the package gguf
            from slimllm.checkpoints.gguf import GGUFCheckpoint
        except ModuleNotFoundError as error:
            raise InputError(f"A GGUF file is read with the package {error.name}, which is not installed.") from None
        return GGUFCheckpoint(path)
    folder, name = (path, path.resolve().name) if path.is_dir() else (download(str(model)), str(model))
    config = read_config(folder)
    if container_of(config):
        return ContainedCheckpoint(folder, name, config)
    return take_apart(SafetensorsCheckpoint(folder, name, config))


def download(model: str, code: bool = False, only: tuple[str, ...] = ()) -> Path:
    """Return the local folder of a model on the hub, and fetch it if necessary.

    Args:
        model: The hub id, `NAME` or `NAME@REVISION`.
        code: Whether to fetch its Python files as well.
        only: Files to fetch instead of the usual ones; empty: the usual ones.

    Raises:
        ValueError: (as InputError) there is no such model, or the hub cannot be reached.
    """
    name, _, revision = model.partition("@")
    patterns = ["*.safetensors", "*.safetensors.index.json", "config.json", *PATTERNS, *(["*.py"] if code else [])]

    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(only) or patterns))
        asked: set[str] = set()
        while not only and (more := files_to_fetch(folder) - asked):  # fetched code may import more
            snapshot_download(name, revision=folder.name, allow_patterns=sorted(more))  # of the same commit
            asked |= more
        return folder
    except HFValidationError:
        raise InputError(f"There is no folder or file {model}, and it cannot be the name of a model on the hub.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = f"the hub returned no model of that name ({first_line(error)})"
        if type(error) is LocalEntryNotFoundError and not isinstance(error.__cause__, HfHubHTTPError):
            reason = "the hub, where it may be a model, cannot be reached (or HF_HUB_OFFLINE is set)."
        raise InputError(f"There is no folder or file {model}, and {reason}") from None
