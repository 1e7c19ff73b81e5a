"""Peak memory of a run, measured by the operating system, and the account of what it should be."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch
from transformers import PretrainedConfig

from slimllm.layer import KEEP_INNER_BYTES
from slimllm.slicing import LayerSizes

GIB = 2**30


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


def warm_up(device: torch.device) -> None:
    """Let the linear algebra libraries allocate the buffers of their own, which are no part of a run's account."""
    square = torch.ones(1024, 1024, device=device)
    square @ square
    torch.linalg.eigh(torch.eye(512, dtype=torch.float64, device=device))


def resident_gib() -> float:
    """Resident memory of this process now, in GiB."""
    return _status("VmRSS")


def peak_host_gib() -> float:
    """Peak resident memory of this process since `reset_peak`, in GiB."""
    return _status("VmHWM")


def peak_gpu_gib(device: torch.device) -> float:
    """Peak memory allocated on the GPU since `reset_peak`, in GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0


def account(
    config: PretrainedConfig,
    sizes: list[LayerSizes],
    tokens: int,
    batch_tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    recovery: str,
) -> dict[str, float]:
    """The parts of a run's peak beside the runtime, in GiB: embeddings, two layers, statistics and hidden states.

    Args:
        config: The model's configuration.
        sizes: Sizes of its decoder layers.
        tokens: Number of calibration tokens.
        batch_tokens: Tokens that go through a layer together.
        head_dim: Size of an attention head.
        dtype: dtype of the forward passes.
        recovery: `lstsq` has a Gram of the channels.
    """
    hidden_size, item = config.hidden_size, dtype.itemsize
    heads = max(size.num_heads for size in sizes) * head_dim
    widest = max(size.intermediate_size for size in sizes)
    square = max(hidden_size, heads) ** 2
    channels, across = (widest**2, 4 * 8 * widest * hidden_size) if recovery == "lstsq" else (0, 0)
    num_bytes = {
        # The output head, as it is stored and as it computes; it stays behind no longer than it is needed.
        "embeddings": config.vocab_size * hidden_size * (2 + 4),
        "two_layers": 2 * max(size.params for size in sizes) * 4,
        # A Gram in fp32, its centred copy, eigenvectors and the decomposition's workspace in fp64.
        # `lstsq`: the Gram of the channels, what of it belongs to the kept ones, in fp32 and fp64, and the system, which
        # its factor replaces; and the weight's size in fp64 for right-hand sides, solution and change.
        "statistics": max(square * (4 + 5 * 8), channels * (2 * 4 + 2 * 8) + across),
        # The residual stream, the dense outputs of the sub-layer at work, the inputs of its output projection where
        # they are kept, and one batch's activations inside the FFN (gate, its activation, up, their product).
        "hidden_states": tokens * item * 2 * hidden_size
        + min(tokens * widest * item, KEEP_INNER_BYTES)
        + 4 * batch_tokens * widest * item,
    }
    return {name: size / GIB for name, size in num_bytes.items()}


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
