"""Choice of the backend of every operation (environment variable SLIMLLM_BACKEND). No other module chooses.

- `torch` is the plain path and runs everywhere.
- `triton` runs the kernels in `kernels/`, on a GPU or, with TRITON_INTERPRET=1, slowly on a CPU.
- `extension` requires the compiled extension (csrc/) for the operations that it has.
- `auto`, the default, is the extension if it has the operation and was built for the device, `triton` on GPUs of compute
  capability 8.0 or later, and `torch` otherwise. On a GPU, `auto` first compares the extension or kernel with torch, once.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from slimllm.errors import InputError, exhausted
from slimllm.ops import selfcheck
from slimllm.ops.registry import OPERATIONS, forced_backend, without_autocast

BACKENDS = ("auto", "torch", "triton", "extension")

_log = logging.getLogger("slimllm.ops")


@dataclass(frozen=True)
class Choice:
    """Backend of an operation on a device, `torch`, `triton` or `extension`, and the reason for it."""

    backend: str
    reason: str


def check_setting() -> str:
    """Return SLIMLLM_BACKEND, or `auto` if it is not set.

    Raises:
        ValueError: (as InputError) its value is unknown.
    """
    wanted = os.environ.get("SLIMLLM_BACKEND") or "auto"
    if wanted not in BACKENDS:
        raise InputError(f"SLIMLLM_BACKEND must be one of {', '.join(BACKENDS)}, got {wanted!r}.")
    return wanted


def choose(operation: str, device: torch.device | str) -> Choice:
    """Return the backend that `operation` uses on `device`.

    Raises:
        ValueError: (as InputError) the value of SLIMLLM_BACKEND is unknown, or this machine lacks that backend.
    """
    if (forced := forced_backend()) is not None:
        return Choice(forced, "being compared")
    wanted, known = check_setting(), OPERATIONS[operation]
    if known.only_torch:
        return Choice("torch", known.only_torch)
    device = torch.device(device)
    if wanted == "torch":
        return Choice("torch", "SLIMLLM_BACKEND=torch")
    if wanted == "triton" and known.kernel:
        missing = triton_is_missing()
        if missing:
            raise InputError(f"SLIMLLM_BACKEND=triton was asked for, but {missing}.")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError("SLIMLLM_BACKEND=triton needs a GPU, or TRITON_INTERPRET=1 to interpret kernels on a CPU.")
        return Choice("triton", "SLIMLLM_BACKEND=triton")
    if device.type in known.extension or not known.kernel:
        return _extension(operation, device, wanted)
    if device.type != "cuda":
        return Choice("torch", "kernels are for GPUs")
    return _automatic(operation, _index(device))


_ran: dict[str, set[str]] = {}


def backend_of_call(operation: str, device: torch.device, fits: bool = True) -> str:
    """Return the backend for one call, and remember it for `ran`.

    Args:
        operation, device: As for `choose`.
        fits: Whether the kernel or the extension supports these arguments; if not, torch is used.
    """
    name = choose(operation, device).backend if fits else "torch"
    if forced_backend() is None:
        _ran.setdefault(operation, set()).add(name)
    return name


def ran() -> dict[str, str]:
    """Return the backends that every operation has used in this process since `forget`, such as `extension, torch`."""
    return {operation: ", ".join(sorted(names)) for operation, names in sorted(_ran.items())}


def forget() -> None:
    """Begin a new record of the backends in use."""
    _ran.clear()


def _index(device: torch.device) -> int:
    if device.index is not None:
        return device.index
    if not torch.cuda.is_available():
        raise InputError(f"there is no CUDA GPU that torch {torch.__version__} can use, but the device is {device}.")
    return torch.cuda.current_device()


def _extension(operation: str, device: torch.device, wanted: str) -> Choice:
    known = OPERATIONS[operation].extension
    if device.type not in known:
        return Choice("torch", "the extension supports CPUs and NVIDIA GPUs")
    missing = extension_is_missing(device.type)
    if missing and wanted == "extension":
        raise InputError(f"SLIMLLM_BACKEND=extension was asked for, but slimllm._C {missing}.")
    if missing:
        return Choice("torch", f"slimllm._C {missing}")
    if device.type == "cpu" or wanted == "extension":
        return Choice("extension", known[device.type])
    return _automatic(operation, _index(device))


@cache
def extension_is_missing(device_type: str = "cpu") -> str:
    """Load the compiled extension; return why it is missing for a device type, or an empty string."""
    try:
        module = importlib.import_module("slimllm._C")
    except ImportError as error:
        return f"was not built or does not load ({error})"
    names = ("small_lstsq", "greedy_elimination", "half_solve_", "quadratic_forms")
    known = all(hasattr(torch.ops.slimllm_C, name) for name in names)
    if not known or "without_cuda" not in (info := module.build_info()):
        return "was built by an older version; reinstall slimllm to rebuild it"
    if device_type == "cuda" and not info["cuda_architectures"]:
        return f"was built without CUDA ({info['without_cuda']})"
    return ""


def backend(device: torch.device | str, operations: Sequence[str] | None = None) -> str:
    """Summarise what these operations use on `device`: `torch`, `triton`, or `triton; torch for …`.

    Args:
        operations: Names of operations; None: those with a Triton kernel that the extension lacks for this device.

    Raises:
        ValueError: an operation is unknown, the device does not exist, or SLIMLLM_BACKEND requires a missing backend.
    """
    if operations is None:
        kind = torch.device(device).type
        operations = [name for name, known in OPERATIONS.items() if known.kernel and kind not in known.extension]
    if isinstance(operations, str) or not set(operations) <= set(OPERATIONS):
        raise ValueError(f"operations must be a list of {', '.join(sorted(OPERATIONS))}, got {operations!r}.")
    choices = {operation: choose(operation, device).backend for operation in operations}
    exceptions = [operation for operation, name in choices.items() if name == "torch"]
    others = " and ".join(sorted(set(choices.values()) - {"torch"}))
    if not others:
        return "torch"
    return others + (f"; torch for {', '.join(exceptions)}" if exceptions else "")


@cache
def _automatic(operation: str, index: int) -> Choice:
    """Choose the backend on a GPU, once, and log the choice."""
    choice = _by_trying(operation, index)
    level = logging.WARNING if "disagrees with torch" in choice.reason or "does not run" in choice.reason else logging.INFO
    _log.log(level, "%s on cuda:%d: %s (%s)", operation, index, choice.backend, choice.reason)
    return choice


def _by_trying(operation: str, index: int) -> Choice:
    backend = "extension" if "cuda" in OPERATIONS[operation].extension else "triton"
    if backend == "triton":
        major, minor = torch.cuda.get_device_capability(index)
        if torch.version.hip or major < 8:
            return Choice("torch", f"kernels need an NVIDIA GPU of compute capability 8.0 or later, not {major}.{minor}")
        missing = triton_is_missing()
        if missing:
            return Choice("torch", missing)
    try:
        worst = selfcheck.difference(operation, torch.device("cuda", index), backend)
    except Exception as error:  # compilers and drivers raise many types
        if exhausted(error):
            raise  # not a fault of the kernel
        return Choice("torch", f"the kernel does not run here: {type(error).__name__}: {str(error)[:200]}")
    if not worst <= 2e-5:  # fp32 in another order of summation; plain TF32 products are off by 1e-3
        return Choice("torch", f"the kernel disagrees with torch on this GPU: relative difference {worst:.1e}")
    return Choice(backend, f"agrees with torch on this GPU to {worst:.0e}")


def triton_is_missing() -> str:
    """Return why the kernels cannot run, or an empty string."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):  # older versions spill registers in some kernels
        return f"triton {triton.__version__} is too old, 3.6 or later is needed"
    return ""


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute fp32 products in fp32, even if the caller allows TF32, bf16 or autocast."""
    settings: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    with without_autocast(device):
        if not all(hasattr(setting, "fp32_precision") for setting in settings):  # torch before 2.9
            allowed = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(allowed)
            return
        before = [setting.fp32_precision for setting in settings]
        for setting in settings:
            setting.fp32_precision = "ieee"
        try:
            yield
        finally:
            for setting, value in zip(settings, before):
                setting.fp32_precision = value
