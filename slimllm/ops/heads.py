"""Covariances of the attention heads' contributions to the output (SlimLLM, arXiv 2505.22689)."""

from __future__ import annotations

import torch

from slimllm.ops.checks import ACTIVATIONS, PRECISE, check_dtype, check_floating, check_integer, check_tensors
from slimllm.ops.dispatch import backend_of_call, choose, full_precision
from slimllm.ops.gram import gram_
from slimllm.ops.registry import Random, operator

_OUTPUTS = 256  # outputs at a time; bounds the memory beyond the result
CONTRIBUTIONS = 2**21  # numbers that streaming in torch computes at once; they fit the caches of a CPU


def head_covariance(weight: torch.Tensor, covariance: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Compute the covariances of the heads' contributions to the attention output, without those contributions.

    With o_i = X_i W_iᵀ the output of head i:

        C[i, j, k] = cov(o_i[:, k], o_j[:, k]) = W_i[k, :] Cov(X)_ij W_j[k, :]ᵀ.

    Work: D·(H·d)²·(1 + 1/H)/2 multiply-adds for any number of tokens; each product also serves as its mirror image.

    Args:
        weight: o_proj.weight (D, H·d), torch layout, any floating dtype.
        covariance: Cov(X) of the inputs of o_proj, (H·d, H·d), symmetric, fp64 or fp32.
        num_heads: H, the number of units. With `kv-group` a unit is a KV group, and d the total width of its query heads.

    Returns:
        C, (H, H, D), of the dtype of `covariance`. The kernel computes in fp32, torch in that dtype.

    Raises:
        ValueError: shapes or devices are inconsistent.
        TypeError: a dtype is not one of those above.
    """
    check_tensors(weight=weight, covariance=covariance)
    check_heads(weight, num_heads)
    if covariance.shape != (weight.shape[1],) * 2:
        raise ValueError(
            f"covariance must be (H·d, H·d), with H·d = {weight.shape[1]} inputs of weight, got {tuple(covariance.shape)}."
        )
    check_dtype("covariance", covariance, PRECISE)
    return _head_covariance(weight.detach(), covariance.detach(), num_heads)


def _cases(random: Random, tokens: int) -> list[torch.Tensor]:
    x, weight = random(tokens, 8 * 24), random(136, 8 * 24)
    covariance = x.double().T @ x.double() / len(x)
    return [head_covariance(weight.to(dtype), covariance, 8) for dtype in (torch.bfloat16, torch.float32)]


@operator(
    "head_covariance(Tensor weight, Tensor covariance, int num_heads) -> Tensor",
    shape=lambda weight, covariance, num_heads: covariance.new_empty(num_heads, num_heads, weight.shape[0]),
    cases=_cases,
    kernel=True,
)
def _head_covariance(weight: torch.Tensor, covariance: torch.Tensor, num_heads: int) -> torch.Tensor:
    if backend_of_call("head_covariance", weight.device) == "triton":
        from slimllm.kernels.pearson import head_covariance as kernel

        return kernel(weight if weight.dtype in ACTIVATIONS else weight.float(), covariance, num_heads)
    out_features, in_features = weight.shape
    width = in_features // num_heads
    result = covariance.new_empty(num_heads, num_heads, out_features)
    with full_precision(weight.device):
        for start in range(0, out_features, _OUTPUTS):
            some = weight[start : start + _OUTPUTS].to(covariance.dtype)
            by_head, part = some.view(len(some), num_heads, width), result[..., start : start + _OUTPUTS]
            for i in range(num_heads):
                rows = covariance[i * width : (i + 1) * width, : (i + 1) * width]  # Cov(X)_ij for j ≤ i
                projected = (by_head[:, i] @ rows).view(len(some), i + 1, width)  # W_i Cov(X)_ij
                part[i, : i + 1] = projected.mul_(by_head[:, : i + 1]).sum(-1).T
                part[:i, i] = part[i, :i]
    return result


def head_covariance_of_tokens(
    weight: torch.Tensor, x: torch.Tensor, num_heads: int, *, method: str | None = None
) -> torch.Tensor:
    """Compute the covariances of `head_covariance` from one batch of inputs of o_proj instead of their Gram.

    Two methods give the same result. Their multiply-adds, with symmetric halves counted once:

        stream:  contributions for a tile of outputs, then their products over the tokens:  N·D·(H·d + H²/2)
        gram:    the Gram of x, then `head_covariance`:                                     (N + D·(1 + 1/H))/2·(H·d)²

    The streaming kernel takes 16 heads at a time, and widths in steps of 16. With B = ⌈H/16⌉ blocks of heads it takes
    N·D·(B²·16·16⌈d/16⌉ + 128·B·(B + 1)). Torch streams at two thirds of the rate of a large product (measured on a CPU).
    Adding up the (H, H, D) results of batches costs about 1000·H²·D multiply-adds a batch in torch, and 200·H²·D in the
    kernel, estimated from the bytes. Streaming wins for few tokens: with 32 heads of width 128, up to N = 1567 in torch and
    1221 in the kernel.

    Memory beyond the result: none for the streaming kernel; three tiles of 2²¹ numbers and two fp32 copies of x for
    streaming in torch; the (H·d, H·d) Gram and an fp32 copy of x for `gram`.

    Args:
        weight: o_proj.weight (D, H·d), torch layout, any floating dtype.
        x: Inputs of o_proj (N, H·d), bf16, fp16 or fp32; at least one token.
        num_heads: H, the number of units.
        method: `stream`, `gram`, or None for the cheaper of the two.

    Returns:
        C, (H, H, D) fp32, population covariances (1/N).

    Raises:
        ValueError: shapes or devices are inconsistent, or the method is unknown.
        TypeError: a dtype is not one of those above.
    """
    check_tensors(weight=weight, x=x)
    check_heads(weight, num_heads)
    if x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be (N, H·d) with H·d = {weight.shape[1]}, the inputs of weight, got {tuple(x.shape)}.")
    if x.shape[0] == 0:
        raise ValueError("x has no tokens; a covariance needs at least one.")
    check_dtype("x", x, ACTIVATIONS)
    weight, x = weight.detach(), x.detach()
    if method not in (None, "stream", "gram"):
        raise ValueError(f"method must be stream, gram or None, got {method!r}.")
    return _head_covariance_of_tokens(weight, x, num_heads, method)


def _cases_of_tokens(random: Random, tokens: int) -> list[torch.Tensor]:
    x, weight = random(tokens, 8 * 24), random(136, 8 * 24)
    return [head_covariance_of_tokens(weight, x[:600], 8, method="stream")]


@operator(
    "head_covariance_of_tokens(Tensor weight, Tensor x, int num_heads, str? method) -> Tensor",
    shape=lambda weight, x, num_heads, method: x.new_empty(num_heads, num_heads, weight.shape[0], dtype=torch.float32),
    cases=_cases_of_tokens,
    kernel=True,
)
def _head_covariance_of_tokens(weight: torch.Tensor, x: torch.Tensor, num_heads: int, method: str | None) -> torch.Tensor:
    fused = choose("head_covariance_of_tokens", x.device).backend == "triton"
    streams = (method or cheaper_method(x.shape[0], weight.shape[0], weight.shape[1], num_heads, fused)) == "stream"
    backend_of_call("head_covariance_of_tokens", x.device, streams)
    if streams:
        return _stream_head_covariance(weight, x, num_heads, fused)
    mean = x.mean(0, dtype=torch.float32)
    gram, total = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float32), torch.zeros_like(mean)
    gram_(gram, total, x.float(), pivot=mean)
    total /= x.shape[0]
    return head_covariance(weight, gram.div_(x.shape[0]).addr_(total, total, alpha=-1), num_heads)


def cheaper_method(
    num_tokens: int, out_features: int, in_features: int, num_heads: int, fused: bool, num_batches: int = 1
) -> str:
    """Return the cheaper of `stream` and `gram`, by the multiply-adds and rates in `head_covariance_of_tokens`.

    Args:
        fused: The kernel streams, not torch.
        num_batches: Number of batches that the tokens come in; their results are summed.
    """
    per_output, per_sum = 1.5 * (in_features + num_heads**2 / 2), 1000
    if fused:
        blocks, steps = -(-num_heads // 16), -(-in_features // num_heads // 16)
        per_output, per_sum = blocks**2 * 16 * 16 * steps + 128 * blocks * (blocks + 1), 200
    gram = (num_tokens + out_features * (1 + 1 / num_heads)) * in_features**2 / 2
    stream = out_features * (num_tokens * per_output + num_batches * num_heads**2 * per_sum)
    return "stream" if stream < gram else "gram"


def _stream_head_covariance(weight: torch.Tensor, x: torch.Tensor, num_heads: int, fused: bool) -> torch.Tensor:
    mean = x.mean(0, dtype=torch.float32)
    if fused:
        from slimllm.kernels.pearson import stream_head_covariance as kernel

        return kernel(weight if weight.dtype in ACTIVATIONS else weight.float(), x, mean, num_heads)
    num_tokens, out_features = x.shape[0], weight.shape[0]
    u = (x.float() - mean).view(num_tokens, num_heads, -1).permute(1, 2, 0).contiguous()  # (H, d, N)
    u -= u.mean(-1, keepdim=True)  # removes what rounding left, so that every contribution has mean 0
    by_head = weight.float().view(out_features, num_heads, -1).transpose(0, 1)  # (H, D, d), not a copy if it is fp32
    result = x.new_empty(num_heads, num_heads, out_features, dtype=torch.float32)
    at_once = max(1, CONTRIBUTIONS // (num_tokens * num_heads))
    with full_precision(weight.device):
        for start in range(0, out_features, at_once):
            here = slice(start, start + at_once)
            contributions = (by_head[:, here] @ u).transpose(0, 1).contiguous()  # (outputs, H, N)
            products = (contributions @ contributions.transpose(1, 2)).div_(num_tokens).tril()
            result[:, :, here] = (products + products.tril(-1).transpose(1, 2)).permute(1, 2, 0)
    return result


def check_heads(weight: torch.Tensor, num_heads: int) -> None:
    """Raise ValueError or TypeError if a weight is not (D, H·d) for H = num_heads, or not floating."""
    check_integer("num_heads", num_heads)
    if weight.ndim != 2 or num_heads < 1 or weight.shape[1] % num_heads:
        raise ValueError(
            f"weight must be (D, H·d), its inputs divisible by num_heads = {num_heads}, got {tuple(weight.shape)}."
        )
    check_floating(weight=weight)
