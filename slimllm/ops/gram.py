"""Gram matrix of a stream of activations."""

from __future__ import annotations

from typing import Any

import torch

from slimllm.ops.checks import ACTIVATIONS, PRECISE, check_dtype, check_not_overlapping, check_tensors
from slimllm.ops.dispatch import backend_of_call, full_precision
from slimllm.ops.registry import Random, operator

# On a CPU only the lower half of the product is computed, in rows of blocks, and mirrored. For 1024 tokens this is 1.1
# times as fast as the whole product at 576 features, 1.4 at 1536 and 1.5 at 4096 (benchmarks/results/gram.jsonl).
_BLOCK = 256


def gram_(
    gram: torch.Tensor,
    total: torch.Tensor,
    x: torch.Tensor,
    *,
    pivot: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> None:
    """Add Σ_t w_t u_t u_tᵀ to `gram` and Σ_t w_t u_t to `total`, with u_t = x_t - pivot; by default XᵀX and Σ_t x_t.

    Args:
        gram: (features, features) fp32, symmetric up to rounding; its diagonal is the weighted sum of squares.
        total: (features,) fp32 or fp64.
        x: (num_tokens, features), bf16, fp16 or fp32, any strides.
        pivot: (features,) fp32, subtracted from every token. With a pivot near the mean, the covariance
            gram/N - (total/N)(total/N)ᵀ keeps its digits where the mean is far larger than the spread. On a GPU,
            differences and weighted values of bf16 inputs carry 16 bits, all others fp32's 24.
        weight: w, (num_tokens,) fp32, not negative; None: 1.

    Raises:
        ValueError: shapes or devices are inconsistent.
        TypeError: a dtype is not one of those above.
    """
    check_tensors(gram=gram, total=total, x=x)
    if x.ndim != 2 or gram.shape != (x.shape[1], x.shape[1]) or total.shape != (x.shape[1],):
        raise ValueError(
            "gram, total and x must have shapes (features, features), (features,) and (num_tokens, features), "
            f"got {tuple(gram.shape)}, {tuple(total.shape)} and {tuple(x.shape)}."
        )
    check_dtype("gram", gram, (torch.float32,))
    check_dtype("total", total, PRECISE)
    check_dtype("x", x, ACTIVATIONS)
    check_not_overlapping("gram", gram)
    check_not_overlapping("total", total)
    for name, vector, size in (("pivot", pivot, x.shape[1]), ("weight", weight, x.shape[0])):
        if vector is None:
            continue
        check_tensors(**{"x": x, name: vector})
        if vector.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(vector.shape)}.")
        check_dtype(name, vector, (torch.float32,))
    pivot, weight = (None if vector is None else vector.detach() for vector in (pivot, weight))
    _gram_(gram.detach(), total.detach(), x.detach(), pivot, weight)


def _cases(random: Random, tokens: int) -> list[torch.Tensor]:
    x = (4 * random(tokens, 192)).round()  # integers, which every dtype holds exactly
    pivot = (64 * random(192)).round() / 64  # differences have more digits than bf16, so that low parts count
    weights, few = random(tokens).abs(), x[:300]  # too few for a GPU to split over programs
    cases: list[tuple[torch.Tensor, dict[str, Any]]] = [(x, {})]
    cases += [(x, {"pivot": pivot}), (x, {"weight": weights}), (x, {"pivot": pivot, "weight": weights}), (few, {})]
    cases += [(few, {"pivot": pivot}), (x[:300, 1:], {}), (x[:192, :100].T, {})]
    results = []
    for dtype in ACTIVATIONS:
        for given, options in cases:
            like = torch.empty_strided(given.shape, given.stride(), dtype=dtype, device=x.device)  # same layout
            like.copy_(given)
            gram = torch.zeros(given.shape[1], given.shape[1], dtype=torch.float32, device=x.device)
            total = torch.zeros(given.shape[1], dtype=torch.float64, device=x.device)
            gram_(gram, total, like, **options)
            results += [gram, total]
    return results


@operator(
    "gram_(Tensor(a!) gram, Tensor(b!) total, Tensor x, Tensor? pivot, Tensor? weight) -> ()",
    shape=lambda *arguments: None,
    cases=_cases,
    kernel=True,
)
def _gram_(
    gram: torch.Tensor, total: torch.Tensor, x: torch.Tensor, pivot: torch.Tensor | None, weight: torch.Tensor | None
) -> None:
    if x.numel() == 0:
        return
    if backend_of_call("gram_", x.device) == "triton":
        from slimllm.kernels.gram import gram_ as kernel

        pivot, weight = (None if vector is None else vector.contiguous() for vector in (pivot, weight))
        kernel(gram, total, x, pivot, weight)
        return
    u = x.float() if pivot is None else x.float() - pivot
    weighted = u if weight is None else u * weight[:, None]
    block = _BLOCK if x.device.type == "cpu" and min(x.shape) >= 2 * _BLOCK else x.shape[1]
    with full_precision(x.device):
        for start in range(0, x.shape[1], block):
            stop = min(start + block, x.shape[1])
            gram[start:stop, :stop].addmm_(u[:, start:stop].T, weighted[:, :stop])
            gram[:start, start:stop] = gram[start:stop, :start].T
    total += weighted.sum(0)
