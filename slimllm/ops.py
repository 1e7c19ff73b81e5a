"""The operations, and the only place that chooses a backend for them (environment variable SLIMLLM_BACKEND).

`torch` is the plain path and runs everywhere. `triton` runs the kernels in `kernels/`, on a GPU or, with
TRITON_INTERPRET=1, slowly on a CPU. `auto` (the default) is `torch`: no kernel takes its place before it has been
measured to be faster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from slimllm.errors import InputError

BACKENDS = ("auto", "torch", "triton")


def backend(device: torch.device | str) -> str:
    """The backend that operations on `device` use: `torch` or `triton`.

    Raises:
        ValueError: (as InputError) SLIMLLM_BACKEND names something unknown, or asks for what this machine lacks.
    """
    wanted = os.environ.get("SLIMLLM_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise InputError(f"SLIMLLM_BACKEND must be one of {', '.join(BACKENDS)}, got {wanted!r}.")
    if wanted != "triton":
        return "torch"
    try:
        import triton  # noqa: F401
    except ImportError:
        raise InputError("SLIMLLM_BACKEND=triton was asked for, but triton is not installed.") from None
    if torch.device(device).type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError("SLIMLLM_BACKEND=triton needs a GPU, or TRITON_INTERPRET=1 to interpret kernels on a CPU.")
    return "triton"


def gram_(gram: torch.Tensor, total: torch.Tensor, x: torch.Tensor) -> None:
    """gram += XᵀX and total += Σ_t x_t, in place.

    Args:
        gram: (features, features) fp32, symmetric.
        total: (features,) fp32 or fp64.
        x: (num_tokens, features), bf16, fp16 or fp32, any strides.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: gram is not fp32, or x is no floating tensor.
    """
    if x.ndim != 2 or gram.shape != (x.shape[1], x.shape[1]) or total.shape != (x.shape[1],):
        raise ValueError(
            "gram, total and x must have shapes (features, features), (features,) and (num_tokens, features), "
            f"got {tuple(gram.shape)}, {tuple(total.shape)} and {tuple(x.shape)}."
        )
    if not gram.device == total.device == x.device:
        raise ValueError(f"gram, total and x must be on one device, got {gram.device}, {total.device} and {x.device}.")
    if gram.dtype != torch.float32 or not x.is_floating_point():
        raise TypeError(f"gram must be float32 and x floating, got {gram.dtype} and {x.dtype}.")
    if x.shape[0] == 0:
        return
    if backend(x.device) == "triton":
        from slimllm.kernels.gram import gram_ as triton_gram_

        triton_gram_(gram, total, x)
        return
    x = x.float()
    with _full_precision():
        gram.addmm_(x.T, x)
    total += x.sum(0)


@contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 products in fp32, whatever the caller allows elsewhere (TF32, bf16)."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
