"""Covariances of the heads' contributions, C[i, j, k] = cov(o_i[:, k], o_j[:, k]) with o_i = X_i W_iᵀ, by two methods.

Source: the Pearson similarity of SlimLLM (arXiv 2505.22689), which follows from C. The product of a pair of heads is
computed once and written twice. The contributions (num_tokens, H, D) stay on the chip. Accumulation is in fp32, and
products are TF32 in three parts (about fp32's digits).

From Gram blocks: C[i, j, k] = W_i[k, :] Ĝ_ij W_j[k, :]ᵀ. A program takes a tile of outputs k and a pair i ≥ j, and loops
over tiles of Ĝ_ij: D·(H·d)²·(1 + 1/H) floating-point operations in all. Bytes: Ĝ's lower half is read D / BLOCK_K times
through L2 and about once from memory, W (H + 1)/2 · (⌈d / BLOCK_B⌉ + 1) times through L2, C (4·H²·D) is written once.

From tokens: a program takes a tile of outputs and a pair of blocks of heads, computes their contributions for BLOCK_N
tokens at a time, and multiplies them over the tokens. With B blocks of BLOCK_H heads this takes N·D·(2·B·H·d + H²)
operations, because a block's contributions are computed again for each of the B blocks. Bytes: X is read B·D / BLOCK_K
times, W B·N / BLOCK_N times through L2, C is written once.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl


def head_covariance_reference(weight: torch.Tensor, x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Compute C (H, H, D) in fp64 from the contributions themselves."""
    by_head = weight.double().view(weight.shape[0], num_heads, -1)
    outputs = torch.einsum("nhd,khd->hkn", x.double().view(x.shape[0], num_heads, -1), by_head)
    outputs = outputs - outputs.mean(-1, keepdim=True)
    return torch.einsum("ikn,jkn->ijk", outputs, outputs) / x.shape[0]


@dataclass(frozen=True)
class GramConfig:
    """Launch configuration: tile of outputs, and tile (rows, columns) of Ĝ_ij."""

    block_k: int
    block_a: int
    block_b: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class StreamConfig:
    """Launch configuration: tiles of outputs, heads, tokens, and of a head's features."""

    block_k: int
    block_h: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


# Chosen by the registers and shared memory that ptxas reports (tests/unit/ops/test_compile.py), not yet timed on a GPU.
HALF_GRAM_CONFIG = GramConfig(128, 32, 64, 8, 2)
FLOAT_GRAM_CONFIG = GramConfig(128, 16, 64, 8, 2)
UNALIGNED_GRAM_CONFIG = GramConfig(64, 16, 32, 8, 2)
STREAM_CONFIG = StreamConfig(16, 16, 16, 16, 8, 1)


def choose_config(weight_dtype: torch.dtype, aligned: bool) -> GramConfig:
    """Choose the configuration of `gram_blocks_kernel`. fp32 weights and unaligned reads take more registers.

    Args:
        aligned: Reads of 16 bytes are possible.
    """
    if not aligned:
        return UNALIGNED_GRAM_CONFIG
    return HALF_GRAM_CONFIG if weight_dtype.itemsize == 2 else FLOAT_GRAM_CONFIG


@triton.jit
def gram_blocks_kernel(
    weight,
    covariance,
    pairs,
    result,
    out_features,
    width,
    stride_wk,
    stride_wf,
    stride_row,
    stride_col,
    stride_i,
    stride_j,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Compute C of one pair of heads for one tile of outputs."""
    # Neighbouring programs share a pair, so its block of the covariance is read from memory once.
    pair, tile = tl.program_id(0) // tl.cdiv(out_features, BLOCK_K), tl.program_id(0) % tl.cdiv(out_features, BLOCK_K)
    i, j = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    outputs = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    within = outputs < out_features
    weight_rows = weight + outputs[:, None].to(tl.int64) * stride_wk
    sums = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start_b in range(0, width, BLOCK_B):
        b = start_b + tl.arange(0, BLOCK_B)
        projected = tl.zeros((BLOCK_K, BLOCK_B), dtype=tl.float32)
        for start_a in range(0, width, BLOCK_A):
            a = start_a + tl.arange(0, BLOCK_A)
            left = tl.load(
                weight_rows + (i * width + a)[None, :].to(tl.int64) * stride_wf,
                mask=within[:, None] & (a < width)[None, :],
                other=0.0,
            )
            down, across = (i * width + a)[:, None].to(tl.int64), (j * width + b)[None, :].to(tl.int64)
            block = tl.load(
                covariance + down * stride_row + across * stride_col,
                mask=(a < width)[:, None] & (b < width)[None, :],
                other=0.0,
            )
            projected = tl.dot(left.to(tl.float32), block.to(tl.float32), projected, input_precision="tf32x3")
        right = tl.load(
            weight_rows + (j * width + b)[None, :].to(tl.int64) * stride_wf,
            mask=within[:, None] & (b < width)[None, :],
            other=0.0,
        )
        sums += tl.sum(projected * right.to(tl.float32), axis=1)
    value = sums.to(result.dtype.element_ty)
    tl.store(result + i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j + outputs, value, mask=within)
    tl.store(result + j.to(tl.int64) * stride_i + i.to(tl.int64) * stride_j + outputs, value, mask=within)


@triton.jit
def _contributions(
    x,
    mean,
    weight,
    head_block,
    start,
    outputs,
    num_tokens,
    num_heads,
    out_features,
    width,
    stride_n,
    stride_f,
    stride_wk,
    stride_wf,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute o[h, t, k] of a block of heads, about the mean: (BLOCK_H, BLOCK_N, BLOCK_K)."""
    heads = head_block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None, None]
    tokens = start + tl.arange(0, BLOCK_N)[None, :, None]
    columns = outputs[None, None, :]
    result = tl.zeros((BLOCK_H, BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start_d in range(0, width, BLOCK_D):
        d = start_d + tl.arange(0, BLOCK_D)
        across, down = d[None, None, :], d[None, :, None]
        known = (heads < num_heads) & (across < width)
        u = tl.load(
            x + tokens.to(tl.int64) * stride_n + (heads * width + across).to(tl.int64) * stride_f,
            mask=known & (tokens < num_tokens),
            other=0.0,
        )
        center = tl.load(mean + heads * width + across, mask=known, other=0.0)
        u = tl.where(tokens < num_tokens, u.to(tl.float32) - center, 0.0)
        w = tl.load(
            weight + columns.to(tl.int64) * stride_wk + (heads * width + down).to(tl.int64) * stride_wf,
            mask=(heads < num_heads) & (down < width) & (columns < out_features),
            other=0.0,
        )
        result = tl.dot(u, w.to(tl.float32), result, input_precision="tf32x3")
    return result


@triton.jit
def stream_kernel(
    x,
    mean,
    weight,
    pairs,
    result,
    num_tokens,
    num_heads,
    out_features,
    width,
    stride_n,
    stride_f,
    stride_wk,
    stride_wf,
    stride_i,
    stride_j,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute C of one pair of blocks of heads for one tile of outputs, over all tokens."""
    pair, tile = tl.program_id(0) // tl.cdiv(out_features, BLOCK_K), tl.program_id(0) % tl.cdiv(out_features, BLOCK_K)
    row, col = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    outputs = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_K, BLOCK_H, BLOCK_H), dtype=tl.float32)
    for start in range(0, num_tokens, BLOCK_N):
        left = _contributions(
            x,
            mean,
            weight,
            row,
            start,
            outputs,
            num_tokens,
            num_heads,
            out_features,
            width,
            stride_n,
            stride_f,
            stride_wk,
            stride_wf,
            BLOCK_K,
            BLOCK_H,
            BLOCK_N,
            BLOCK_D,
        )
        right = left
        if row != col:
            right = _contributions(
                x,
                mean,
                weight,
                col,
                start,
                outputs,
                num_tokens,
                num_heads,
                out_features,
                width,
                stride_n,
                stride_f,
                stride_wk,
                stride_wf,
                BLOCK_K,
                BLOCK_H,
                BLOCK_N,
                BLOCK_D,
            )
        sums = tl.dot(tl.permute(left, (2, 0, 1)), tl.permute(right, (2, 1, 0)), sums, input_precision="tf32x3")
    sums = sums / num_tokens
    i = (row * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
    j = (col * BLOCK_H + tl.arange(0, BLOCK_H))[None, None, :]
    k = outputs[:, None, None]
    inside = (k < out_features) & (i < num_heads) & (j <= i)  # a product and its mirror image may round differently
    tl.store(result + i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j + k, sums, mask=inside)
    tl.store(result + j.to(tl.int64) * stride_i + i.to(tl.int64) * stride_j + k, sums, mask=inside)


@lru_cache(maxsize=64)
def _pairs(count: int, device: torch.device) -> torch.Tensor:
    """Return all (i, j) with i ≥ j, int32. The copy to the device is synchronous, so that any stream may use it."""
    return torch.tril_indices(count, count, dtype=torch.int32).T.contiguous().to(device)


def head_covariance(weight: torch.Tensor, covariance: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Compute C (H, H, D) from the inputs' covariance; `slimllm.ops.head_covariance` documents and checks arguments."""
    out_features, in_features = weight.shape
    width = in_features // num_heads
    aligned = all(t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (weight, covariance))
    config = choose_config(weight.dtype, aligned and width % 16 == 0)
    result = covariance.new_empty(num_heads, num_heads, out_features)
    pairs = _pairs(num_heads, weight.device)
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        gram_blocks_kernel[(len(pairs) * triton.cdiv(out_features, config.block_k),)](
            weight,
            covariance,
            pairs,
            result,
            out_features,
            width,
            *weight.stride(),
            *covariance.stride(),
            *result.stride()[:2],
            BLOCK_K=config.block_k,
            BLOCK_A=config.block_a,
            BLOCK_B=config.block_b,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return result


def stream_head_covariance(weight: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Compute C (H, H, D) from a batch of inputs and their mean (H·d,) fp32; `slimllm.ops` checks the arguments."""
    num_tokens, in_features = x.shape
    config = STREAM_CONFIG
    result = x.new_empty(num_heads, num_heads, weight.shape[0], dtype=torch.float32)
    pairs = _pairs(triton.cdiv(num_heads, config.block_h), x.device)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        stream_kernel[(len(pairs) * triton.cdiv(weight.shape[0], config.block_k),)](
            x,
            mean,
            weight,
            pairs,
            result,
            num_tokens,
            num_heads,
            weight.shape[0],
            in_features // num_heads,
            *x.stride(),
            *weight.stride(),
            *result.stride()[:2],
            BLOCK_K=config.block_k,
            BLOCK_H=config.block_h,
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return result
