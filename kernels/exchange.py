"""Greedy exchange search over heads on the device: two launches for every pruned head, without waiting for any.

Source: SlimLLM (arXiv 2505.22689). With T_i = Σ_j C[i,j] and R_i = Σ_{j∈S} C[i,j], keeping head p instead of q gives

    cov(o_S, o) + T_p - T_q   and   var(o_S) + C_pp + 2(R_p - C_pq) + C_qq - 2R_q,

and from these the similarity Σ_k |r_k|. `sums_kernel` reads C once and computes T, R and the diagonal. Then, for every p,
`score_kernel` scores all q at once, one program each, and `exchange_kernel` makes the best exchange if it raises the
similarity, and updates R, cov and var. Every p takes 14·H·D operations; C[p] (in its dtype) and R, T, own (fp64) are read
once, and R is written once if there is an exchange. Sums are fp64.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

BLOCK = 512
NUM_WARPS = 4


def exchange_reference(
    kept: torch.Tensor, covariance: torch.Tensor, pruned: torch.Tensor, group_size: int, rounding: float
) -> None:
    """Search by brute force: every exchange's similarity from all of C, in fp64; `kept` is updated in place."""

    def similarity(chosen: torch.Tensor) -> float:
        inside = chosen.double()
        with_full = torch.einsum("i,ijk->k", inside, c)
        scale = (torch.einsum("i,j,ijk->k", inside, inside, c).clamp(min=0) * c.sum((0, 1)).clamp(min=0)).sqrt()
        return float(torch.where(scale > 0, with_full.abs() / scale, 0.0).sum())

    c = covariance.double()
    best = similarity(kept)
    for p in pruned.tolist():
        tried = {}
        for q in kept.nonzero().flatten().tolist():
            if q // group_size == p // group_size:
                other = kept.clone()
                other[p], other[q] = True, False
                tried[q] = similarity(other)
        q = max(tried, key=lambda head: tried[head])
        if tried[q] > best * (1 + rounding):
            best, kept[p], kept[q] = tried[q], True, False


@triton.jit
def _similarity(cov, variance, full):
    scale = tl.sqrt(tl.maximum(variance, 0.0) * tl.maximum(full, 0.0))
    return tl.where(scale > 0, tl.abs(cov) / tl.where(scale > 0, scale, 1.0), 0.0)


@triton.jit
def sums_kernel(covariance, kept, with_full, with_kept, own, features, num_heads, stride_i, stride_j, BLOCK: tl.constexpr):
    """Compute T, R and the variances of one head for BLOCK outputs."""
    i, k = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < features
    row = covariance + i.to(tl.int64) * stride_i + k
    full, part = tl.zeros((BLOCK,), dtype=tl.float64), tl.zeros((BLOCK,), dtype=tl.float64)
    for j in range(num_heads):
        value = tl.load(row + j * stride_j, mask=inside, other=0.0).to(tl.float64)
        full += value
        part += tl.where(tl.load(kept + j) != 0, value, 0.0)
    here = i * features + k
    tl.store(with_full + here, full, mask=inside)
    tl.store(with_kept + here, part, mask=inside)
    tl.store(own + here, tl.load(row + i.to(tl.int64) * stride_j, mask=inside, other=0.0).to(tl.float64), mask=inside)


@triton.jit(do_not_specialize=["step"])
def score_kernel(
    covariance,
    own,
    with_full,
    with_kept,
    cov_kept,
    variance,
    full_variance,
    kept,
    pruned,
    scores,
    step,
    features,
    group_size,
    stride_i,
    stride_j,
    BLOCK: tl.constexpr,
):
    """Score the exchange of the step's head p with this program's head q: its similarity, or -inf if not allowed."""
    q = tl.program_id(0)
    p = tl.load(pruned + step).to(tl.int32)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, features, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < features
        row, here_p, here_q = covariance + p.to(tl.int64) * stride_i, p * features + k, q * features + k
        both = tl.load(row + q.to(tl.int64) * stride_j + k, mask=inside, other=0.0).to(tl.float64)
        cov = tl.load(cov_kept + k, mask=inside, other=0.0) + tl.load(with_full + here_p, mask=inside, other=0.0)
        cov -= tl.load(with_full + here_q, mask=inside, other=0.0)
        change = tl.load(own + here_p, mask=inside, other=0.0) + tl.load(own + here_q, mask=inside, other=0.0)
        change += 2 * (tl.load(with_kept + here_p, mask=inside, other=0.0) - both)
        change -= 2 * tl.load(with_kept + here_q, mask=inside, other=0.0)
        new_variance = tl.load(variance + k, mask=inside, other=0.0) + change
        total += _similarity(cov, new_variance, tl.load(full_variance + k, mask=inside, other=0.0))
    allowed = (tl.load(kept + q) != 0) & (p // group_size == q // group_size)
    tl.store(scores + q, tl.where(allowed, tl.sum(total, axis=0), float("-inf")))


@triton.jit(do_not_specialize=["step"])
def exchange_kernel(
    covariance,
    own,
    with_full,
    with_kept,
    cov_kept,
    variance,
    kept,
    pruned,
    scores,
    best,
    step,
    features,
    num_heads,
    stride_i,
    stride_j,
    rounding,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make the step's best exchange if it raises best[step] by more than rounding; store the result in best[step + 1]."""
    heads = tl.arange(0, HEADS)
    score = tl.load(scores + heads, mask=heads < num_heads, other=float("-inf"))
    top = tl.max(score, axis=0)
    q = tl.min(tl.where(score == top, heads, HEADS), axis=0)  # the first of equals
    before = tl.load(best + step)
    better = top > before + before * rounding
    p = tl.load(pruned + step).to(tl.int32)
    if tl.program_id(0) == 0:
        tl.store(best + step + 1, tl.where(better, top, before))
    if better:
        k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = k < features
        here_p, here_q = p * features + k, q * features + k
        row_p, row_q = covariance + p.to(tl.int64) * stride_i, covariance + q.to(tl.int64) * stride_i
        both = tl.load(row_p + q.to(tl.int64) * stride_j + k, mask=inside, other=0.0).to(tl.float64)
        cov = tl.load(cov_kept + k, mask=inside, other=0.0) + tl.load(with_full + here_p, mask=inside, other=0.0)
        tl.store(cov_kept + k, cov - tl.load(with_full + here_q, mask=inside, other=0.0), mask=inside)
        change = tl.load(own + here_p, mask=inside, other=0.0) + tl.load(own + here_q, mask=inside, other=0.0)
        change += 2 * (tl.load(with_kept + here_p, mask=inside, other=0.0) - both)
        change -= 2 * tl.load(with_kept + here_q, mask=inside, other=0.0)
        tl.store(variance + k, tl.load(variance + k, mask=inside, other=0.0) + change, mask=inside)
        for head in range(num_heads):
            gained = tl.load(row_p + head * stride_j + k, mask=inside, other=0.0).to(tl.float64)
            lost = tl.load(row_q + head * stride_j + k, mask=inside, other=0.0).to(tl.float64)
            here = head * features + k
            tl.store(with_kept + here, tl.load(with_kept + here, mask=inside, other=0.0) + gained - lost, mask=inside)
        if tl.program_id(0) == 0:
            tl.store(kept + p, 1)
            tl.store(kept + q, 0)


def exchange_(kept: torch.Tensor, covariance: torch.Tensor, pruned: torch.Tensor, group_size: int, rounding: float) -> None:
    """Run the search; `kept` is updated in place.

    Args:
        kept: (H,) bool.
        covariance: C (H, H, D), fp64 or fp32; copied if its stride along D is not 1.
        pruned: Heads that are not kept, in the order in which they are tried, int64.
        group_size: Number of heads in a group; heads are exchanged within groups.
        rounding: An exchange must raise the similarity by more than this fraction of it.
    """
    num_heads, features = covariance.shape[0], covariance.shape[2]
    if covariance.stride(2) != 1:
        covariance = covariance.contiguous()
    strides, blocks = covariance.stride()[:2], triton.cdiv(features, BLOCK)
    with_full, with_kept, own = (
        torch.empty(num_heads, features, dtype=torch.float64, device=kept.device) for _ in range(3)
    )
    scores = torch.empty(num_heads, dtype=torch.float64, device=kept.device)
    best = torch.empty(len(pruned) + 1, dtype=torch.float64, device=kept.device)
    flags = kept.view(torch.uint8)
    with torch.cuda.device(kept.device) if kept.is_cuda else nullcontext():
        sums_kernel[(num_heads, blocks)](
            covariance, flags, with_full, with_kept, own, features, num_heads, *strides, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
        cov_kept, variance = (with_full * kept[:, None]).sum(0), (with_kept * kept[:, None]).sum(0)
        full_variance = with_full.sum(0)
        scale = (variance.clamp(min=0) * full_variance.clamp(min=0)).sqrt()
        best[:1] = torch.where(scale > 0, cov_kept.abs() / scale, 0.0).sum()
        for step in range(len(pruned)):
            score_kernel[(num_heads,)](
                covariance,
                own,
                with_full,
                with_kept,
                cov_kept,
                variance,
                full_variance,
                flags,
                pruned,
                scores,
                step,
                features,
                group_size,
                *strides,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
            exchange_kernel[(blocks,)](
                covariance,
                own,
                with_full,
                with_kept,
                cov_kept,
                variance,
                flags,
                pruned,
                scores,
                best,
                step,
                features,
                num_heads,
                *strides,
                rounding,
                HEADS=triton.next_power_of_2(num_heads),
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
