"""Per-feature sums over the tokens of a batch: Σ w u and Σ w u² of one stream, or Σ w v² and Σ w u v of two.

Source: the norms of channels and the moments of the affine recovery in SlimLLM (arXiv 2505.22689). u and v are fp32
differences from a pivot. The kernel is limited by memory: it reads every element once, 2 bytes each in half precision, for
4 operations. Each program sums part of the tokens in fp32, a lane at a time. The few partial sums are added in fp64 in a
fixed order.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

BLOCK_N, BLOCK_F = 16, 128
NUM_WARPS = 4


def column_sums_reference(
    x: torch.Tensor, pivot: torch.Tensor | None = None, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute Σ w u and Σ w u² in fp64."""
    u = x.double() if pivot is None else x.double() - pivot.double()
    weighted = u if weight is None else u * weight.double()[:, None]
    return weighted.sum(0), (weighted * u).sum(0)


@triton.jit
def columns_kernel(
    x,
    pivot_x,
    y,
    pivot_y,
    weight,
    partial,
    num_tokens,
    features,
    split_tokens,
    stride_xn,
    stride_xf,
    stride_yn,
    stride_yf,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Compute two sums for BLOCK_F features over one part of the tokens; of x alone if y is None."""
    cols = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    known = cols < features
    center_x = tl.zeros((BLOCK_F,), dtype=tl.float32)
    center_y = tl.zeros((BLOCK_F,), dtype=tl.float32)
    if pivot_x is not None:
        center_x = tl.load(pivot_x + cols, mask=known, other=0.0)
    if pivot_y is not None:
        center_y = tl.load(pivot_y + cols, mask=known, other=0.0)
    first = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    begin = tl.program_id(1) * split_tokens
    end = tl.minimum(begin + split_tokens, num_tokens)
    for start in range(begin, end, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        inside = (tokens[:, None] < end) & known[None, :]
        rows, across = tokens[:, None].to(tl.int64), cols[None, :].to(tl.int64)
        u = tl.load(x + rows * stride_xn + across * stride_xf, mask=inside, other=0.0).to(tl.float32)
        u = tl.where(inside, u - center_x[None, :], 0.0)
        weighted = u
        if weight is not None:
            weighted = u * tl.load(weight + tokens, mask=tokens < end, other=0.0)[:, None]
        if y is None:
            first += weighted
            second += weighted * u
        else:
            v = tl.load(y + rows * stride_yn + across * stride_yf, mask=inside, other=0.0).to(tl.float32)
            v = tl.where(inside, v - center_y[None, :], 0.0)
            second += weighted * v
            if weight is not None:
                first += v * v * tl.load(weight + tokens, mask=tokens < end, other=0.0)[:, None]
            else:
                first += v * v
    here = partial + tl.program_id(1).to(tl.int64) * 2 * features + cols
    tl.store(here, tl.sum(first, axis=0), mask=known)
    tl.store(here + features, tl.sum(second, axis=0), mask=known)


def column_sums(
    x: torch.Tensor,
    pivot_x: torch.Tensor | None,
    y: torch.Tensor | None,
    pivot_y: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Return (2, features) fp64: Σ w u and Σ w u² of one stream, or Σ w v² and Σ w u v of two.

    `slimllm.ops` checks the arguments.

    Args:
        splits: Number of parts of the tokens that are summed separately; None: as many as fill the GPU.
    """
    num_tokens, features = x.shape
    blocks = triton.cdiv(features, BLOCK_F)
    if splits is None:
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        splits = max(1, min(8 * processors // blocks, num_tokens // (4 * BLOCK_N)))
    split_tokens = triton.cdiv(triton.cdiv(num_tokens, splits), BLOCK_N) * BLOCK_N
    splits = triton.cdiv(num_tokens, split_tokens)
    partial = x.new_empty(splits, 2, features, dtype=torch.float32)
    strides = (0, 0) if y is None else y.stride()
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        columns_kernel[(blocks, splits)](
            x,
            pivot_x,
            y,
            pivot_y,
            weight,
            partial,
            num_tokens,
            features,
            split_tokens,
            *x.stride(),
            *strides,
            BLOCK_N=BLOCK_N,
            BLOCK_F=BLOCK_F,
            num_warps=NUM_WARPS,
        )
    return partial.sum(0, dtype=torch.float64)
