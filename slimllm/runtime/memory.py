"""Peak memory of a run, measured by the operating system."""

from __future__ import annotations

import ctypes
import errno
import gc
import math
import sys
from pathlib import Path

import torch

from slimllm.config import GIB as GIB


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of the peaks, where the system allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # the peak is then that of the whole process, which is more, never less
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def trim() -> None:
    """Give memory that was freed back to the system; glibc keeps some of it, which would count towards the peak."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # another C library


def release() -> None:
    """Let go of models that nothing refers to any more; modules refer to each other in circles."""
    gc.collect()
    trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for other processes


def warm_up(device: torch.device) -> None:
    """Let the linear algebra libraries allocate the buffers of their own, which are not part of the memory estimate."""
    square = torch.ones(1024, 1024, device=device)
    square @ square
    torch.linalg.eigh(torch.eye(512, dtype=torch.float64, device=device))


def free_bytes(device: torch.device) -> float:
    """Memory of a device that is free now; infinity where the system does not say."""
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


def exhausted(error: BaseException) -> str | None:
    """Name the memory that an error says is not enough, `CPU` or `GPU`; None if it says something else."""
    if isinstance(error, torch.OutOfMemoryError):
        return "GPU"
    # torch has no type of its own for it on the CPU, and maps files whose memory may not be had either.
    told = isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in str(error) or "Cannot allocate" in str(error))
    told = told or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return "CPU" if told or isinstance(error, MemoryError) else None


def resident_gib() -> float:
    """Resident memory of this process now, in GiB."""
    return _status("VmRSS")


def peak_host_gib() -> float:
    """Peak resident memory of this process since `reset_peak`, in GiB."""
    return _status("VmHWM")


def peak_gpu_gib(device: torch.device) -> float:
    """Peak memory allocated on the GPU since `reset_peak`, in GiB; 0 on a CPU."""
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
