"""One small comparison of every kernel with torch, made before a kernel is used on a GPU by default."""

from __future__ import annotations

from typing import Any

import torch

from slimllm.ops import columns, gram, heads, pearson, regression, tokens
from slimllm.ops.checks import ACTIVATIONS
from slimllm.ops.dispatch import forced

# So many that a GPU splits them over programs; 300 are so few that it does not.
MANY_TOKENS = 2048


def difference(operation: str, device: torch.device, backend: str) -> float:
    """Largest difference between the kernel's results and torch's, relative to the largest result."""
    with forced("torch"):
        wanted = _run(operation, device)
    with forced(backend):
        got = _run(operation, device)
    differences = [
        (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
        for a, b in zip(got, wanted, strict=True)
    ]
    return float(torch.stack(differences).max())  # NaN where one is, unlike Python's max


def _run(operation: str, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    x, weight = random(MANY_TOKENS, 8 * 24), random(136, 8 * 24)
    if operation == "gram_":
        x = (4 * x).round()  # whole numbers, which no dtype rounds
        pivot = (64 * random(192)).round() / 64  # differences from it have more digits than bf16: the low parts count
        weights, few = random(len(x)).abs(), x[:300]
        cases: list[tuple[torch.Tensor, dict[str, Any]]] = [(x, {}), (x, {"deterministic": False})]
        cases += [(x, {"pivot": pivot}), (x, {"weight": weights}), (x, {"pivot": pivot, "weight": weights}), (few, {})]
        cases += [(few, {"pivot": pivot}), (x[:300, 1:], {}), (x[:192, :100].T, {})]
        return [tensor for dtype in ACTIVATIONS for x, options in cases for tensor in _gram(x, dtype, options)]
    if operation in ("column_sums_", "column_products_"):
        results = []
        for dtype in ACTIVATIONS:
            first, second = torch.zeros(2, 192, dtype=torch.float64, device=device)
            y, pivot = x.to(dtype), random(192)
            if operation == "column_sums_":
                columns.column_sums_(first, second, y, pivot=pivot)
            else:
                columns.column_products_(first, second, y, y.flip(0), pivot_y=pivot, pivot_y_hat=pivot)
            results += [first, second]
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
        return [tokens.token_cosine(x, x + random(len(x), 192))]
    if operation == "lstsq":
        results, lstsq = [], torch.ops.slimllm.lstsq
        for size, rights, dtype in ((64, 3, torch.float32), (33, 1, torch.float64), (8, 16, torch.float32)):
            a, b = random(50, 2 * size, size).to(dtype), random(50, 2 * size, rights).to(dtype)
            start, ridge = random(50, size, rights).to(dtype), random(50).abs().double()
            # Not by lstsq_ex, which would solve again what a kernel has failed to.
            results += lstsq(a.mT @ a, a.mT @ b, 1e-3 * ridge, False, None)
            results += lstsq(a.mT @ a, a.mT @ b, ridge, True, start)
        return results
    if operation == "affine_fit":
        moments = [random(1000), random(1000), random(1000).abs(), random(1000)]
        moments[2][:10] = 0
        return [x for d in (torch.float32, torch.float64) for x in regression.affine_fit(*(m.to(d) for m in moments))]
    raise ValueError(f"there is no kernel of {operation}.")


def _gram(x: torch.Tensor, dtype: torch.dtype, options: dict[str, Any]) -> list[torch.Tensor]:
    """Gram and sums; in a dtype of few digits of x as it holds it, laid out as x is."""
    like = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)
    like.copy_(x)
    result = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    gram.gram_(result, total, like, **options)
    return [result, total]
