"""One small comparison of every kernel with torch, made before a kernel is used on a GPU by default."""

from __future__ import annotations

import torch

from slimllm.ops import gram, heads, pearson, regression, tokens
from slimllm.ops.dispatch import forced
from slimllm.ops.lstsq import lstsq_ex


def difference(operation: str, device: torch.device, backend: str) -> float:
    """Largest difference between the kernel's results and torch's, relative to the largest result."""
    with forced("torch"):
        wanted = _run(operation, device)
    with forced(backend):
        got = _run(operation, device)
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30))
        for a, b in zip(got, wanted, strict=True)
    )


def _run(operation: str, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    # So many tokens that a GPU splits them over programs.
    x, weight = random(2048, 8 * 24), random(136, 8 * 24)
    if operation == "gram_":
        results = []
        weights = random(len(x)).abs()
        x = (4 * x).round()  # whole numbers, which no dtype rounds
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for pivot, by_token, deterministic in (
                (None, None, True), (None, None, False), (x[0], None, True), (None, weights, True), (x[0], weights, True)
            ):  # fmt: skip
                result = torch.zeros(192, 192, dtype=torch.float32, device=device)
                total = torch.zeros(192, dtype=torch.float64, device=device)
                gram.gram_(result, total, x.to(dtype), pivot=pivot, weight=by_token, deterministic=deterministic)
                results += [result, total]
        return results
    covariance = x.double().T @ x.double() / len(x)
    if operation == "head_covariance":
        return [heads.head_covariance(weight.to(d), covariance, 8) for d in (torch.bfloat16, torch.float32)]
    if operation == "head_covariance_of_tokens":
        return [heads.head_covariance_of_tokens(weight, x[:600], 8, method="stream")]
    if operation == "pearson_greedy":
        with forced("torch"):
            by_head = heads.head_covariance(weight, covariance, 8)
        return [pearson.pearson_greedy(by_head, 4)]
    if operation == "token_cosine":
        return [tokens.token_cosine(x, x + random(2048, 192))]
    if operation == "lstsq":
        results = []
        for size, columns, dtype in ((64, 3, torch.float32), (33, 1, torch.float64), (8, 16, torch.float32)):
            a, b = random(50, 2 * size, size).to(dtype), random(50, 2 * size, columns).to(dtype)
            start, ridge = random(50, size, columns).to(dtype), random(50).abs().double()
            results += lstsq_ex(a.mT @ a, a.mT @ b, 1e-3)
            results += lstsq_ex(a.mT @ a, a.mT @ b, ridge, absolute=True, start=start)
        return results
    if operation == "affine_fit":
        moments = [random(1000), random(1000), random(1000).abs(), random(1000)]
        moments[2][:10] = 0
        return [x for d in (torch.float32, torch.float64) for x in regression.affine_fit(*(m.to(d) for m in moments))]
    raise ValueError(f"there is no kernel of {operation}.")
