"""Peak memory of a run, measured by the operating system."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import re
import sys
from functools import cache
from pathlib import Path

import torch

from slimllm.checks import GIB as GIB
from slimllm.errors import exhausted
from slimllm.runtime.precision import has_slow_fp64

_log = logging.getLogger("slimllm")


def reset_peak(device: torch.device) -> None:
    """Reset the peak measurements, where the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak is then that of the whole process, an upper bound
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def trim() -> None:
    """Return freed memory to the system; glibc keeps some of it, which would count towards the peak."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another C library


def release() -> None:
    """Free models that nothing refers to any more; modules form reference cycles."""
    gc.collect()
    trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for other processes


def warm_up(device: torch.device) -> None:
    """Make the linear algebra libraries allocate their own buffers, which are not part of the memory estimate.

    The device's speed in fp64 is measured as well, while there is room for it.
    """
    square = torch.ones(1024, 1024, device=device)
    square @ square
    torch.linalg.eigh(torch.eye(512, dtype=torch.float64, device=device))
    has_slow_fp64(device)


def free_bytes(device: torch.device) -> float:
    """Return the free memory of a device in bytes; infinity if the system does not report it."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = math.inf
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                free = int(line.split()[1]) * 1024.0
        group = Path("/sys/fs/cgroup")  # of a container
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # ValueError: no limit, "max"
        pass
    return free


def moved(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor on a device in a dtype.

    It is cast on the device: a cast on the host would go to memory that is not pinned. The host does not wait for a copy
    from pinned memory.
    """
    return tensor.to(device, non_blocking=device.type == "cuda").to(dtype)


def pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return uninitialised host memory for a tensor, pinned, so that copies to and from a GPU do not stop the host.

    The system limits how much memory can be pinned. Beyond that the memory is pageable: slower, and a warning says so.
    """
    shape, dtype = tensor.shape, tensor.dtype
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        if exhausted(error) is None and not re.search("pin|regist", str(error)):
            raise  # such as a fault of a kernel that shows here
        _warn_of_pageable_memory(str(error).partition("\n")[0])
        return torch.empty(shape, dtype=dtype)


@cache
def _warn_of_pageable_memory(reason: str) -> None:
    _log.warning("Host memory is not pinned, so copies are slower: %s", reason)


def resident_gib() -> float:
    """Return the resident memory of this process, in GiB."""
    return _status("VmRSS")


def peak_host_gib() -> float:
    """Return the peak resident memory of this process since `reset_peak`, in GiB."""
    return _status("VmHWM")


def peak_gpu_gib(device: torch.device) -> float:
    """Return the peak memory allocated on the GPU since `reset_peak`, in GiB; 0 for a CPU."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def _status(field: str) -> float:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024 / GIB
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB
