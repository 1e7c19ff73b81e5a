"""Greedy elimination on the device: one program takes all steps, so that the host waits for none.

Source: structured optimal brain surgeon (`slimllm.ops.greedy_elimination`, which gives the equations). The rows of A and K
that earlier steps have changed are not stored. With r_s, p_s and t_s the row, the part and the shift of step s,

    A_c: = A⁰_c: - Σ_s r_s[c] p_s,      K_c: = K⁰_c: - Σ_s (p_s[c] t_s + t_s[c] p_s),
    r = A_c:,   p = A_c: / A_cc,   t = K_c: - p K_cc / 2.

A step reads p and t of the steps before it, STEPS at a time, and column c of r: 3/2 n² p multiply-adds and 8 n² p bytes
for n of p candidates in all, most of them from the caches. All numbers are fp64.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

STEPS = 16
NUM_WARPS = 8


def greedy_elimination_reference(
    inverse: torch.Tensor, products: torch.Tensor, num: int, least: float
) -> tuple[list[int], list[float]]:
    """Choose by updating both matrices after every step, in fp64."""
    a, k = inverse.double().clone(), products.double().clone()
    free, floor = torch.ones(len(a), dtype=torch.bool), least * float(a.diagonal().max())
    chosen, costs = [], []
    for _ in range(num):
        score = torch.where(free, k.diagonal() / a.diagonal().clamp(min=floor), torch.inf)
        c = int(score.argmin())
        chosen.append(c)
        costs.append(max(0.0, float(score[c])))
        part = a[c] / a[c, c].clamp(min=floor)
        k = k - torch.outer(part, k[c]) - torch.outer(k[c], part) + k[c, c] * torch.outer(part, part)
        a = a - torch.outer(part, a[c])
        free[c] = False
    return chosen, costs


@triton.jit(do_not_specialize=["candidates", "num"])
def elimination_kernel(
    inverse,
    products,
    rows,
    parts,
    shifts,
    chosen,
    costs,
    candidates,
    num,
    least,
    CANDIDATES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Choose `num` candidates, one after the other."""
    at, few = tl.arange(0, CANDIDATES), tl.arange(0, STEPS)
    inside = at < candidates
    pivots = tl.load(inverse + at * (candidates + 1), mask=inside, other=0.0)
    errors = tl.load(products + at * (candidates + 1), mask=inside, other=0.0)
    floor = least * tl.max(pivots, axis=0)
    free = inside
    for step in range(num):
        score = errors / tl.maximum(pivots, floor, propagate_nan=tl.PropagateNan.ALL)
        tried = tl.where(free, tl.where(score == score, tl.minimum(score, 1e300), 1e300), float("inf"))
        c = tl.min(tl.where(tried == tl.min(tried, axis=0), at, CANDIDATES), axis=0)  # the first of equals
        here = at == c
        tl.store(chosen + step, c.to(tl.int64))
        cost = tl.sum(tl.where(here, score, 0.0), axis=0)
        tl.store(costs + step, tl.where(cost < 0, 0.0, cost))
        row = tl.load(inverse + c * candidates + at, mask=inside, other=0.0)
        product = tl.load(products + c * candidates + at, mask=inside, other=0.0)
        for start in range(0, step, STEPS):
            before = start + few < step
            own = (start + few) * CANDIDATES + c
            row_of_c = tl.load(rows + own, mask=before, other=0.0)
            part_of_c = tl.load(parts + own, mask=before, other=0.0)
            shift_of_c = tl.load(shifts + own, mask=before, other=0.0)
            all_of = (start + few)[:, None] * CANDIDATES + at[None, :]
            part = tl.load(parts + all_of, mask=before[:, None], other=0.0)
            shift = tl.load(shifts + all_of, mask=before[:, None], other=0.0)
            row -= tl.sum(row_of_c[:, None] * part, axis=0)
            product -= tl.sum(part_of_c[:, None] * shift + shift_of_c[:, None] * part, axis=0)
        part_now = row / tl.maximum(tl.sum(tl.where(here, pivots, 0.0), axis=0), floor)
        shift_now = product - part_now * (tl.sum(tl.where(here, product, 0.0), axis=0) / 2)
        tl.store(rows + step * CANDIDATES + at, row)
        tl.store(parts + step * CANDIDATES + at, part_now)
        tl.store(shifts + step * CANDIDATES + at, shift_now)
        pivots -= part_now * row
        errors -= 2 * part_now * shift_now
        free = free & (at != c)
        tl.debug_barrier()  # the next step reads what other threads have stored


def greedy_elimination(
    inverse: torch.Tensor, products: torch.Tensor, num: int, least: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose columns and return their positions, (num,) int64, and costs, (num,) fp64.

    Args:
        inverse: A, (p, p) fp64, contiguous.
        products: K, (p, p) fp64, contiguous.
        num: Number of columns to remove.
        least: Smallest pivot, as a fraction of the largest A_cc.
    """
    candidates = len(inverse)
    chosen, costs = torch.empty(num, dtype=torch.int64, device=inverse.device), inverse.new_empty(num)
    if num == 0:
        return chosen, costs
    padded = max(16, triton.next_power_of_2(candidates))
    rows, parts, shifts = (inverse.new_empty(num, padded) for _ in range(3))
    with torch.cuda.device(inverse.device) if inverse.is_cuda else nullcontext():
        elimination_kernel[(1,)](
            inverse,
            products,
            rows,
            parts,
            shifts,
            chosen,
            costs,
            candidates,
            num,
            least,
            CANDIDATES=padded,
            STEPS=STEPS,
            num_warps=NUM_WARPS,
        )
    return chosen, costs
