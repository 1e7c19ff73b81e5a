"""`slimllm doctor`: versions and devices of this machine, and the backend of each operation with the reason."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

from slimllm.errors import InputError, exhausted
from slimllm.ops.dispatch import check_setting, choose, extension_is_missing
from slimllm.ops.registry import OPERATIONS
from slimllm.runtime.memory import GIB

PACKAGES = ("torch", "triton", "transformers", "safetensors", "gguf", "datasets", "peft")


@dataclass(frozen=True)
class Diagnosis:
    """Result of `diagnose`.

    Attributes:
        versions: Versions by package; `not installed` if it is missing.
        devices: Descriptions by the name that `--device` takes.
        extension: Whether slimllm._C is built, by which compiler and for which devices.
        operations: (operation, device, backend, reason) for every operation and device.
    """

    versions: dict[str, str]
    devices: dict[str, str]
    extension: str
    operations: list[tuple[str, str, str, str]]


def diagnose() -> Diagnosis:
    """Inspect the machine.

    On a GPU every kernel is compiled and compared with torch, which takes some seconds the first time.

    Raises:
        ValueError: (as InputError) SLIMLLM_BACKEND names an unknown backend.
    """
    check_setting()
    versions = {"slimllm": _version("slimllm-engine"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    devices = {"cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        memory = f"{properties.total_memory / GIB:.0f} GiB"
        devices[f"cuda:{index}"] = f"{properties.name}, compute capability {capability}, {memory}"
    operations = [(operation, device, *_choice(operation, device)) for device in devices for operation in OPERATIONS]
    return Diagnosis(versions, devices, _extension(), operations)


def settings() -> dict[str, str]:
    """Return the environment variables that affect slimllm and are set."""
    names = ("SLIMLLM_BACKEND", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    return {name: os.environ[name] for name in names if name in os.environ}


def _choice(operation: str, device: str) -> tuple[str, str]:
    try:
        choice = choose(operation, device)
    except InputError as error:  # SLIMLLM_BACKEND requests a backend that this machine lacks: report it
        return "none", str(error)
    except RuntimeError as error:
        if exhausted(error) is None:
            raise
        return "undecided", "not enough free memory on this GPU for the comparison with torch"
    return choice.backend, choice.reason


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    missing = extension_is_missing()
    if missing:
        return f"{missing}; everything works without it"
    info = importlib.import_module("slimllm._C").build_info()
    architectures = ", ".join(info["cuda_architectures"])
    devices = f"for CPUs and GPUs (CUDA {info['cuda']}, architectures {architectures})"
    if not architectures:
        devices = f"for CPUs (without CUDA: {info['without_cuda']})"
    return f"built by {info['compiler']}, {devices}: {', '.join(info['operations'])}"
