"""Gram accumulation in one pass over a batch: G += Σ_t w_t u_t u_tᵀ, total += Σ_t w_t u_t, with u_t = x_t - pivot.

Source: the statistics of SlimLLM (arXiv 2505.22689) in Gram form. Only tiles on and below the diagonal are computed:
N·F² floating-point operations, half of the full product. Each tile also writes its mirror image. Bytes: G is read (lower
half) and written once, 6·F². X is read F / BLOCK_F times through L2 and, because neighbouring programs share tiles,
F / (2·GROUP·BLOCK_F) times from memory. Accumulation is in fp32. With few tiles and many tokens, the tokens are split over
programs, whose partial tiles are then added in a fixed order.

Values that x's dtype cannot hold are split for the tensor cores into a high and a low part: bf16 differences from a pivot
take three products, bf16 weights two, both together three, with 16 bits of every factor. In fp16, differences and weighted
values may leave the range, so both become fp32.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from slimllm.kernels.gram_configs import TMA_MAJORS, config_of, kind_of


def gram_reference(
    x: torch.Tensor, pivot: torch.Tensor | None = None, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute Σ w u uᵀ (features, features) and Σ w u (features,) in fp64."""
    u = x.double() if pivot is None else x.double() - pivot.double()
    weighted = u if weight is None else u * weight.double()[:, None]
    return u.T @ weighted, weighted.sum(0)


GROUP = 8  # rows of tiles in a group, so that neighbouring programs share input in L2
REDUCE_ROWS = 32
# The interpreter would multiply the raw 16 bits of bf16, so factors are converted to fp32 for it.
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _tile(
    x,
    pivot,
    start,
    column,
    num_tokens,
    features,
    stride_n,
    stride_f,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    TMA: tl.constexpr,
):
    """Load u for a tile of tokens and features: x itself, or fp32 differences from the pivot."""
    if TMA:
        u = x.load([start, column])
    else:
        tokens = start + tl.arange(0, BLOCK_N)
        cols = column + tl.arange(0, BLOCK_F)
        inside = (tokens[:, None] < num_tokens) & (cols[None, :] < features)
        offsets = tokens[:, None].to(tl.int64) * stride_n + cols[None, :].to(tl.int64) * stride_f
        u = tl.load(x + offsets, mask=inside, other=0.0)
        if pivot is not None:
            shift = tl.load(pivot + cols, mask=cols < features, other=0.0)
            u = tl.where(inside, u.to(tl.float32) - shift[None, :], 0.0)
    return u


@triton.jit
def _dot(left, right, tile):
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(tl.trans(left), right, tile, input_precision="tf32x3")


@triton.jit
def _product(left, right, tile, DTYPE: tl.constexpr):
    """Return tile + leftᵀ·right for factors in DTYPE or fp32; fp32 factors are split in two parts if DTYPE is bf16."""
    if left.dtype == DTYPE and right.dtype == DTYPE:
        tile = _dot(left, right, tile)
    elif DTYPE == tl.float16:  # noqa: SIM300
        tile = _dot(left.to(tl.float32), right.to(tl.float32), tile)
    else:
        left_high, right_high = left.to(DTYPE), right.to(DTYPE)
        tile = _dot(left_high, right_high, tile)
        tile = _dot(left_high, (right - right_high.to(tl.float32)).to(DTYPE), tile)
        if left.dtype != DTYPE:
            tile = _dot((left - left_high.to(tl.float32)).to(DTYPE), right_high, tile)
    return tile


@triton.jit
def _accumulate(
    x,
    pivot,
    weight,
    row,
    col,
    first,
    last,
    num_tokens,
    features,
    stride_n,
    stride_f,
    DIAGONAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    TMA: tl.constexpr,
):
    tile = tl.zeros((BLOCK_F, BLOCK_F), dtype=tl.float32)
    sums = tl.zeros((BLOCK_F,), dtype=tl.float32)
    DTYPE: tl.constexpr = x.dtype if TMA else x.dtype.element_ty
    for start in range(first, last, BLOCK_N):
        right = _tile(x, pivot, start, col * BLOCK_F, num_tokens, features, stride_n, stride_f, BLOCK_N, BLOCK_F, TMA)
        if DIAGONAL:
            left = right
        else:
            left = _tile(x, pivot, start, row * BLOCK_F, num_tokens, features, stride_n, stride_f, BLOCK_N, BLOCK_F, TMA)
        if weight is not None:
            tokens = start + tl.arange(0, BLOCK_N)
            right = right.to(tl.float32) * tl.load(weight + tokens, mask=tokens < num_tokens, other=0.0)[:, None]
        if DIAGONAL:
            sums += tl.sum(right.to(tl.float32), axis=0)
        tile = _product(left, right, tile, DTYPE)
    return tile, sums


@triton.jit
def gram_kernel(
    x,
    tiles,
    pivot,
    weight,
    gram,
    total,
    partial,
    partial_sums,
    num_tokens,
    features,
    split_tokens,
    stride_n,
    stride_f,
    stride_row,
    stride_col,
    stride_total,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    TMA: tl.constexpr,
):
    """Accumulate one tile of the lower half over one part of the tokens.

    `partial` is None if there is one part; otherwise it has a slot of tiles for each part.
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    row, col = tl.load(tiles + 2 * pid), tl.load(tiles + 2 * pid + 1)
    first = split * split_tokens
    last = tl.minimum(first + split_tokens, num_tokens)
    rows, cols = row * BLOCK_F + tl.arange(0, BLOCK_F), col * BLOCK_F + tl.arange(0, BLOCK_F)
    if row == col:
        tile, sums = _accumulate(
            x, pivot, weight, row, col, first, last, num_tokens, features, stride_n, stride_f, True, BLOCK_N, BLOCK_F, TMA
        )
        # x_a·x_b and x_b·x_a may round differently: the half below the diagonal is used for both.
        tile = tl.where(rows[:, None] >= cols[None, :], tile, tl.trans(tile))
        if partial is not None:
            here = partial_sums + (split * tl.cdiv(features, BLOCK_F) + row) * BLOCK_F + tl.arange(0, BLOCK_F)
            tl.store(here, sums)
        else:
            total_rows = total + rows.to(tl.int64) * stride_total
            before = tl.load(total_rows, mask=rows < features, other=0.0)
            tl.store(total_rows, before + sums.to(before.dtype), mask=rows < features)
    else:
        tile, sums = _accumulate(
            x, pivot, weight, row, col, first, last, num_tokens, features, stride_n, stride_f, False, BLOCK_N, BLOCK_F, TMA
        )
    if partial is not None:
        local = tl.arange(0, BLOCK_F)
        here = partial + (split * tl.num_programs(0) + pid).to(tl.int64) * BLOCK_F * BLOCK_F
        here += local[:, None] * BLOCK_F + local[None, :]
        tl.store(here, tile)
    else:
        inside = (rows[:, None] < features) & (cols[None, :] < features)
        out = gram + rows[:, None].to(tl.int64) * stride_row + cols[None, :].to(tl.int64) * stride_col
        tile += tl.load(out, mask=inside, other=0.0)
        tl.store(out, tile, mask=inside)
        if row != col:
            mirror = gram + cols[:, None].to(tl.int64) * stride_row + rows[None, :].to(tl.int64) * stride_col
            tl.store(mirror, tl.trans(tile), mask=tl.trans(inside))


@triton.jit
def reduce_kernel(
    tiles,
    gram,
    total,
    partial,
    partial_sums,
    features,
    num_slots,
    stride_row,
    stride_col,
    stride_total,
    BLOCK_F: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Add the partial tiles of all slots to the Gram, in order. One program adds ROWS rows of a tile."""
    pid, strip = tl.program_id(0), tl.program_id(1)
    row, col = tl.load(tiles + 2 * pid), tl.load(tiles + 2 * pid + 1)
    local = strip * ROWS + tl.arange(0, ROWS)
    rows, cols = row * BLOCK_F + local, col * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (rows[:, None] < features) & (cols[None, :] < features)
    out = gram + rows[:, None].to(tl.int64) * stride_row + cols[None, :].to(tl.int64) * stride_col
    acc = tl.load(out, mask=inside, other=0.0)
    for slot in range(num_slots):
        base = (slot * tl.num_programs(0) + pid).to(tl.int64) * BLOCK_F * BLOCK_F
        acc += tl.load(partial + base + local[:, None] * BLOCK_F + tl.arange(0, BLOCK_F)[None, :])
    tl.store(out, acc, mask=inside)
    if row != col:
        mirror = gram + cols[:, None].to(tl.int64) * stride_row + rows[None, :].to(tl.int64) * stride_col
        tl.store(mirror, tl.trans(acc), mask=tl.trans(inside))
    else:
        total_rows = total + rows.to(tl.int64) * stride_total
        sums = tl.load(total_rows, mask=rows < features, other=0.0)
        for slot in range(num_slots):
            base = (slot * tl.cdiv(features, BLOCK_F) + row) * BLOCK_F
            sums += tl.load(partial_sums + base + local).to(sums.dtype)
        tl.store(total_rows, sums, mask=rows < features)


@lru_cache(maxsize=64)
def _tiles(blocks: int, device: torch.device) -> torch.Tensor:
    """List (row, col) of every tile on and below the diagonal, int32, by columns within groups of GROUP rows."""
    order = [
        (row, col)
        for group in range(0, blocks, GROUP)
        for col in range(min(group + GROUP, blocks))
        for row in range(max(group, col), min(group + GROUP, blocks))
    ]
    return torch.tensor(order, dtype=torch.int32, device=device)


def choose_splits(num_tiles: int, num_tokens: int, processors: int) -> int:
    """Return the fewest parts, with 512 tokens or more each, whose waves of programs cost at most 10 % over the best."""
    most = max(1, min(num_tokens // 512, 8 * processors // num_tiles, 64))
    cost = {splits: triton.cdiv(num_tiles * splits, processors) / splits for splits in range(1, most + 1)}
    return min(splits for splits, waves in cost.items() if waves <= 1.1 * min(cost.values()))


def _is_aligned(x: torch.Tensor) -> bool:
    """Return whether reads of 16 bytes are possible: unit stride, and rows that begin at multiples of 16 elements."""
    return x.stride(1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0


def _can_use_tma(x: torch.Tensor) -> bool:
    """Return whether tensor descriptors pay: on 9.x and 10.x, for aligned rows that do not overlap; on 12.0 they spill."""
    able = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in TMA_MAJORS
    return able and _is_aligned(x) and x.stride(0) >= x.shape[1]


def gram_(
    gram: torch.Tensor,
    total: torch.Tensor,
    x: torch.Tensor,
    pivot: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    splits: int | None = None,
) -> None:
    """Add one batch in place. `slimllm.ops.gram_` documents and checks the other arguments.

    Args:
        splits: Number of parts of the tokens that are summed separately; None: as many as fill the GPU.
    """
    num_tokens, features = x.shape
    parts = pivot is not None or weight is not None
    # Unaligned results need more registers too, for addresses and masks.
    aligned = _is_aligned(x) and _is_aligned(gram) and features % 16 == 0
    tma = aligned and x.dtype != torch.float32 and not parts and _can_use_tma(x)
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    config = config_of(kind_of(x.dtype, parts, tma, aligned), capability)
    tiles = _tiles(triton.cdiv(features, config.block_f), x.device)
    if splits is None:
        splits = 1
        if x.is_cuda:
            processors = torch.cuda.get_device_properties(x.device).multi_processor_count
            splits = choose_splits(len(tiles), num_tokens, processors)
    split_tokens = triton.cdiv(triton.cdiv(num_tokens, splits), config.block_n) * config.block_n
    splits = triton.cdiv(num_tokens, split_tokens)
    partial = sums = None
    if splits > 1:
        partial = x.new_empty(splits, len(tiles), config.block_f, config.block_f, dtype=torch.float32)
        sums = x.new_empty(splits, triton.cdiv(features, config.block_f), config.block_f, dtype=torch.float32)
    source = TensorDescriptor.from_tensor(x, [config.block_n, config.block_f]) if tma else x
    outputs = (*gram.stride(), total.stride(0))
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        gram_kernel[(len(tiles), splits)](
            source,
            tiles,
            pivot,
            weight,
            gram,
            total,
            partial,
            sums,
            num_tokens,
            features,
            split_tokens,
            *x.stride(),
            *outputs,
            BLOCK_N=config.block_n,
            BLOCK_F=config.block_f,
            TMA=tma,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if partial is not None:
            reduce_kernel[(len(tiles), config.block_f // REDUCE_ROWS)](
                tiles,
                gram,
                total,
                partial,
                sums,
                features,
                len(partial),
                *outputs,
                BLOCK_F=config.block_f,
                ROWS=REDUCE_ROWS,
            )
