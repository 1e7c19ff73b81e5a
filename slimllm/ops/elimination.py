"""Greedy elimination among a few candidates (structured optimal brain surgeon, see `slimllm.methods.elimination`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from slimllm.ops.checks import PRECISE, check_dtype, check_integer, check_tensors
from slimllm.ops.dispatch import backend_of_call, choose
from slimllm.ops.registry import Random, operator

LEAST = 1e-7  # fraction of the largest A_cc; smaller pivots are rounding errors
MOST = 256  # candidates of the kernel, whose rows a program holds in registers


def greedy_elimination(inverse: torch.Tensor, products: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove columns one by one, each time the one whose removal adds least to J after all others are refitted.

    With A = H⁻¹ and K = V Vᵀ of the candidates, removing c costs K_cc / A_cc and updates the others by

        A ← A - A_:c A_c: / A_cc,    V ← V - A_:c V_c / A_cc.

    The matrices are not updated: a chosen column's rows follow from its original rows and those of the columns chosen
    before it, as in a Cholesky factorisation. All of it is in fp64, whatever the dtype. Work: 3/2 n² p multiply-adds for n
    of p candidates.

    Args:
        inverse: A, (p, p) fp32 or fp64, symmetric positive definite.
        products: K, (p, p) of the same dtype, symmetric.
        num: n, the number of columns to remove, at most p.

    Returns:
        The positions of the removed columns, first to last, (n,) int64, and what each adds to J, (n,) fp64. Values are not
        checked: NaN gives costs that are NaN.

    Raises:
        ValueError: shapes or devices are inconsistent, or num is out of range.
        TypeError: a dtype is not one of those above.
    """
    check_tensors(inverse=inverse, products=products)
    if inverse.ndim != 2 or inverse.shape[0] != inverse.shape[1] or products.shape != inverse.shape:
        raise ValueError(
            f"inverse and products must both be (p, p), got {tuple(inverse.shape)} and {tuple(products.shape)}; give the "
            "parts of the candidates."
        )
    check_dtype("inverse", inverse, PRECISE)
    check_dtype("products", products, (inverse.dtype,))
    check_integer("num", num)
    if not 0 <= num <= len(inverse):
        raise ValueError(f"num must be from 0 to the number of candidates, {len(inverse)}, got {num}.")
    return _greedy_elimination(inverse.detach(), products.detach(), num)


def _cases(random: Random, tokens: int) -> list[torch.Tensor]:
    results: list[torch.Tensor] = []
    for candidates, num in ((200, 100), (33, 33), (1, 1)):
        x, weight = random(4 * candidates, candidates).double(), random(candidates, 3 * candidates).double()
        system = x.T @ x / len(x)
        system.diagonal().add_(1)
        inverse, products = torch.linalg.inv(system), weight @ weight.T
        for dtype in PRECISE:
            results += greedy_elimination(inverse.to(dtype), products.to(dtype), num)
    return results


@operator(
    "greedy_elimination(Tensor inverse, Tensor products, int num) -> (Tensor, Tensor)",
    shape=lambda inverse, products, num: (
        inverse.new_empty(num, dtype=torch.int64),
        inverse.new_empty(num, dtype=torch.float64),
    ),
    cases=_cases,
    kernel=True,
    extension={"cpu": "float32 and float64"},
)
def _greedy_elimination(inverse: torch.Tensor, products: torch.Tensor, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    fits = len(inverse) <= MOST or choose("greedy_elimination", inverse.device).backend != "triton"
    backend = backend_of_call("greedy_elimination", inverse.device, fits)
    a, k = inverse.double().contiguous(), products.double().contiguous()
    if backend == "extension":
        return torch.ops.slimllm_C.greedy_elimination(a, k, num, LEAST)  # type: ignore[no-any-return]
    if backend == "triton":
        from slimllm.kernels.elimination import greedy_elimination as kernel

        return kernel(a, k, num, LEAST)
    with np.errstate(all="ignore"):  # NaN is passed on
        chosen, costs = _one_by_one(a.cpu().numpy(), k.cpu().numpy(), num)
    return torch.from_numpy(chosen).to(a.device), torch.from_numpy(costs).to(a.device)


def _one_by_one(a: Any, k: Any, num: int) -> tuple[Any, Any]:
    """Choose on the host, with numpy, whose operations on few numbers take a fifth of torch's time."""
    pivots, errors, gone = a.diagonal().copy(), k.diagonal().copy(), np.zeros(len(a), dtype=bool)
    least = LEAST * pivots.max(initial=0.0)
    rows, parts, shifts = (np.empty((num, len(a))) for _ in range(3))  # A_c:, A_c:/A_cc, and what K loses with it
    chosen, costs = np.empty(num, dtype=np.int64), np.empty(num)
    for step in range(num):
        score = errors / np.maximum(pivots, least)
        c = int(np.argmin(np.where(gone, np.inf, np.nan_to_num(score, nan=1e300, posinf=1e300))))
        chosen[step], costs[step], gone[c] = c, max(score[c], 0.0), True
        row = a[c] - rows[:step, c] @ parts[:step]
        product = k[c] - parts[:step, c] @ shifts[:step] - shifts[:step, c] @ parts[:step]
        part = row / max(pivots[c], least)
        shift = product - part * (product[c] / 2)
        rows[step], parts[step], shifts[step] = row, part, shift
        pivots -= part * row
        errors -= 2 * part * shift
    return chosen, costs
