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


def gram_(
    gram: torch.Tensor,
    total: torch.Tensor,
    x: torch.Tensor,
    *,
    pivot: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    deterministic: bool = True,
) -> None:
    """gram += Σ_t w_t u_t u_tᵀ and total += Σ_t w_t u_t with u_t = x_t - pivot, in place; by default XᵀX and Σ_t x_t.

    Args:
        gram: (features, features) fp32, symmetric. Its diagonal is the weighted sum of squares of every feature.
        total: (features,) fp32 or fp64.
        x: (num_tokens, features), bf16, fp16 or fp32, any strides.
        pivot: (features,) fp32, subtracted from every token: about a pivot near the mean, the covariance
            gram/N - (total/N)(total/N)ᵀ keeps its digits where the mean is far larger than the spread.
        weight: (num_tokens,) fp32, not negative.
        deterministic: False allows additions in any order, which may be faster on a GPU; the results of two runs then
            differ by rounding.

    Raises:
        ValueError: shapes or devices do not fit together.
        TypeError: a dtype is none of those above.
    """
    if x.ndim != 2 or gram.shape != (x.shape[1], x.shape[1]) or total.shape != (x.shape[1],):
        raise ValueError(
            "gram, total and x must have shapes (features, features), (features,) and (num_tokens, features), "
            f"got {tuple(gram.shape)}, {tuple(total.shape)} and {tuple(x.shape)}."
        )
    if not gram.device == total.device == x.device:
        raise ValueError(f"gram, total and x must be on one device, got {gram.device}, {total.device} and {x.device}.")
    if gram.dtype != torch.float32 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"gram must be float32 and x float32, float16 or bfloat16, got {gram.dtype} and {x.dtype}.")
    if total.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"total must be float32 or float64, got {total.dtype}.")
    for name, vector, size in (("pivot", pivot, x.shape[1]), ("weight", weight, x.shape[0])):
        if vector is None:
            continue
        if vector.shape != (size,) or vector.device != x.device:
            raise ValueError(
                f"{name} must have shape ({size},) and be on {x.device}, got {tuple(vector.shape)} on {vector.device}."
            )
        if vector.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {vector.dtype}.")
    if x.shape[0] == 0:
        return
    if backend(x.device) == "triton":
        from slimllm.kernels.gram import gram_ as triton_gram_

        pivot, weight = (None if vector is None else vector.contiguous() for vector in (pivot, weight))
        triton_gram_(gram, total, x, pivot, weight, deterministic)
        return
    u = x.float() if pivot is None else x.float() - pivot
    weighted = u if weight is None else u * weight[:, None]
    with full_precision():
        gram.addmm_(u.T, weighted)
    total += weighted.sum(0)


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, whatever the caller allows elsewhere (TF32, bf16)."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
