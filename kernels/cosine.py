"""Cosine of two streams for every token, from one read of both: 2·N·F elements in, 4·N bytes out, 6·N·F operations.

Source: the layer importance of SlimLLM (arXiv 2505.22689). The kernel is limited by memory and accumulates in fp32.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

BLOCK_N, BLOCK_F = 8, 256
NUM_WARPS = 8


def token_cosine_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute the cosines in fp64."""
    a, b = a.double(), b.double()
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-30)


@triton.jit
def cosine_kernel(
    a,
    b,
    result,
    num_tokens,
    features,
    stride_an,
    stride_af,
    stride_bn,
    stride_bf,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Compute the cosines of BLOCK_N tokens."""
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_rows, b_rows = a + tokens[:, None].to(tl.int64) * stride_an, b + tokens[:, None].to(tl.int64) * stride_bn
    dot = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    aa = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    bb = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    for start in range(0, features, BLOCK_F):
        f = (start + tl.arange(0, BLOCK_F))[None, :]
        inside = (tokens[:, None] < num_tokens) & (f < features)
        u = tl.load(a_rows + f.to(tl.int64) * stride_af, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(b_rows + f.to(tl.int64) * stride_bf, mask=inside, other=0.0).to(tl.float32)
        dot += u * v
        aa += u * u
        bb += v * v
    # One root for each sum: the product of the sums may leave the range of fp32.
    norms = tl.sqrt(tl.sum(aa, axis=1)) * tl.sqrt(tl.sum(bb, axis=1))
    tl.store(result + tokens, tl.sum(dot, axis=1) / tl.maximum(norms, 1e-30), mask=tokens < num_tokens)


def token_cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the cosines, (num_tokens,) fp32; `slimllm.ops.token_cosine` documents and checks the arguments."""
    result = a.new_empty(a.shape[0], dtype=torch.float32)
    if a.shape[0]:
        with torch.cuda.device(a.device) if a.is_cuda else nullcontext():
            cosine_kernel[(triton.cdiv(a.shape[0], BLOCK_N),)](
                a, b, result, *a.shape, *a.stride(), *b.stride(), BLOCK_N=BLOCK_N, BLOCK_F=BLOCK_F, num_warps=NUM_WARPS
            )
    return result
