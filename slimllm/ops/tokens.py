"""Per-token statistics of the residual stream."""

from __future__ import annotations

import torch

from slimllm.ops.dispatch import choose
from slimllm.ops.library import operator


def token_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """cos(a_t, b_t) for every token t; 0 where one of the two is zero.

    The mean of it over tokens, with a and b the residual stream before and behind a layer, is the layer's importance c.

    Args:
        a, b: (num_tokens, features), bf16, fp16 or fp32, any strides.

    Returns:
        (num_tokens,) fp32.

    Raises:
        ValueError: shapes or devices are not equal.
        TypeError: a dtype is none of those above.
    """
    if a.ndim != 2 or a.shape != b.shape or a.device != b.device:
        raise ValueError(
            "a and b must have one shape (num_tokens, features) and be on one device, "
            f"got {tuple(a.shape)} on {a.device} and {tuple(b.shape)} on {b.device}."
        )
    for tensor in (a, b):
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"a and b must be float32, float16 or bfloat16, got {a.dtype} and {b.dtype}.")
    return _token_cosine(a, b)


@operator("token_cosine(Tensor a, Tensor b) -> Tensor", shape=lambda a, b: a.new_empty(a.shape[0], dtype=torch.float32))
def _token_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if choose("token_cosine", a.device).backend == "triton":
        from slimllm.kernels.cosine import token_cosine as kernel

        return kernel(a, b)
    a, b = a.float(), b.float()
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return torch.linalg.vecdot(a, b) / norms.clamp(min=1e-30)
