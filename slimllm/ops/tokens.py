"""Per-token statistics of the residual stream."""

from __future__ import annotations

import torch

from slimllm.ops.checks import ACTIVATIONS, check_dtype, check_tensors
from slimllm.ops.dispatch import backend_of_call
from slimllm.ops.registry import Random, operator


def token_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return cos(a_t, b_t) for every token t, or 0 where a_t or b_t is zero.

    If a and b are the residual stream before and after a layer, its mean over tokens is the layer's importance c.

    Args:
        a, b: (num_tokens, features), bf16, fp16 or fp32, any strides.

    Returns:
        (num_tokens,) fp32.

    Raises:
        ValueError: shapes or devices are not equal.
        TypeError: a dtype is not one of those above.
    """
    check_tensors(a=a, b=b)
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must have one shape (num_tokens, features), got {tuple(a.shape)} and {tuple(b.shape)}.")
    check_dtype("a", a, ACTIVATIONS)
    check_dtype("b", b, ACTIVATIONS)
    return _token_cosine(a.detach(), b.detach())


def _cases(random: Random, tokens: int) -> list[torch.Tensor]:
    x = random(tokens, 192)
    return [token_cosine(x, x + random(tokens, 192))]


@operator(
    "token_cosine(Tensor a, Tensor b) -> Tensor",
    shape=lambda a, b: a.new_empty(a.shape[0], dtype=torch.float32),
    cases=_cases,
    kernel=True,
)
def _token_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if backend_of_call("token_cosine", a.device) == "triton":
        from slimllm.kernels.cosine import token_cosine as kernel

        return kernel(a, b)
    a, b = a.float(), b.float()
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return torch.linalg.vecdot(a, b) / norms.clamp(min=1e-30)
