"""Gram accumulation: G += XᵀX and total += Σ_t x_t for a batch of tokens X (num_tokens, features).

Source: the statistics of SlimLLM (arXiv 2505.22689) in Gram form. Only tiles on and below the diagonal are computed;
each writes its mirror image too. Work: N·F² multiply-adds (half of the full product); bytes: every X element is read
F / BLOCK_F times through L2, G is read and written once. Accumulation in fp32, in a fixed order: deterministic.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl


def gram_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """XᵀX (features, features) and Σ_t x_t (features,) in fp64, plainly."""
    x = x.double()
    return x.T @ x, x.sum(0)


BLOCK_F, BLOCK_N = 64, 64


@triton.jit
def _gram_kernel(
    x_ptr, gram_ptr, total_ptr, num_tokens, features, stride_n, stride_f, stride_row, stride_col,
    BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0), tl.program_id(1)
    if col <= row:
        rows = (row * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
        cols = (col * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
        tile = tl.zeros((BLOCK_F, BLOCK_F), dtype=tl.float32)
        row_sum = tl.zeros((BLOCK_F,), dtype=tl.float32)
        for start in range(0, num_tokens, BLOCK_N):
            tokens = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            in_stream = tokens[:, None] < num_tokens
            left_ptr = x_ptr + tokens[:, None] * stride_n + rows[None, :] * stride_f
            right_ptr = x_ptr + tokens[:, None] * stride_n + cols[None, :] * stride_f
            left = tl.load(left_ptr, mask=in_stream & (rows[None, :] < features), other=0.0).to(tl.float32)
            right = tl.load(right_ptr, mask=in_stream & (cols[None, :] < features), other=0.0).to(tl.float32)
            tile += tl.dot(tl.trans(left), right, input_precision="ieee")
            row_sum += tl.sum(left, axis=0)
        if col == row:  # a product need not round x_a·x_b and x_b·x_a alike: the half below the diagonal counts
            tile = tl.where(rows[:, None] >= cols[None, :], tile, tl.trans(tile))
        inside = (rows[:, None] < features) & (cols[None, :] < features)
        out_ptr = gram_ptr + rows[:, None] * stride_row + cols[None, :] * stride_col
        tile += tl.load(out_ptr, mask=inside, other=0.0)
        tl.store(out_ptr, tile, mask=inside)
        if col < row:
            mirror_ptr = gram_ptr + cols[:, None] * stride_row + rows[None, :] * stride_col
            tl.store(mirror_ptr, tl.trans(tile), mask=(cols[:, None] < features) & (rows[None, :] < features))
        else:
            sums = tl.load(total_ptr + rows, mask=rows < features, other=0.0)
            tl.store(total_ptr + rows, sums + row_sum.to(sums.dtype), mask=rows < features)


def gram_(gram: torch.Tensor, total: torch.Tensor, x: torch.Tensor) -> None:
    """Add one batch in place; arguments as in `slimllm.ops.gram_`, which checks them."""
    num_tokens, features = x.shape
    blocks = triton.cdiv(features, BLOCK_F)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _gram_kernel[(blocks, blocks)](
            x, gram, total, num_tokens, features, *x.stride(), *gram.stride(), BLOCK_F=BLOCK_F, BLOCK_N=BLOCK_N
        )
