"""One small comparison of every kernel with torch, made before a kernel is used on a GPU by default."""

from __future__ import annotations

import torch

from slimllm.ops import gram, heads, pearson, tokens
from slimllm.ops.dispatch import forced


def difference(operation: str, device: torch.device) -> float:
    """Largest difference between the kernel's results and torch's, relative to the largest result."""
    with forced("torch"):
        wanted = _run(operation, device)
    with forced("triton"):
        got = _run(operation, device)
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
        for a, b in zip(got, wanted, strict=True)
    )


def _run(operation: str, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, weight = random(600, 8 * 24), random(136, 8 * 24)
    if operation == "gram_":
        results = []
        x = (4 * x).round()  # whole numbers, whose differences no dtype rounds
        for dtype, pivot in ((torch.bfloat16, None), (torch.bfloat16, x[0]), (torch.float32, x[0])):
            result, total = torch.zeros(192, 192, device=device), torch.zeros(192, device=device)
            gram.gram_(result, total, x.to(dtype), pivot=pivot)
            results += [result, total]
        return results
    covariance = x.double().T @ x.double() / len(x)
    if operation == "head_covariance":
        return [heads.head_covariance(weight, covariance, 8)]
    if operation == "head_covariance_of_tokens":
        return [heads.head_covariance_of_tokens(weight, x, 8, method="stream")]
    if operation == "pearson_greedy":
        with forced("torch"):
            by_head = heads.head_covariance(weight, covariance, 8)
        return [pearson.pearson_greedy(by_head, 4)]
    assert operation == "token_cosine"
    return [tokens.token_cosine(x, x + random(600, 192))]
