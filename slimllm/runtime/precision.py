"""Speed of a device in fp64, which decides the precision of large solves."""

from __future__ import annotations

from functools import cache
from time import perf_counter

import torch

from slimllm.ops.dispatch import full_precision

# How many times faster than fp64 products those in fp32 must be for a factor in fp32 to pay. With k unknowns and m
# right-hand sides, fp64 takes k³/6 + k²m multiply-adds, and fp32 k³/6 + 2k²m and k²m more in fp64; m is about 0.4 k.
PAYS = 6.0


@cache
def has_slow_fp64(device: torch.device) -> bool:
    """Return whether fp32 products are so much faster than fp64 products that a factor in fp32, refined in fp64, pays.

    GPUs for data centres have a ratio of 2, others of 32 or 64. On a CPU it is 2.
    """
    if device.type == "cpu":
        return False
    seconds = {}
    with full_precision(device):
        for dtype in (torch.float32, torch.float64):
            square = torch.ones(1024, 1024, dtype=dtype, device=device)
            square @ square
            torch.cuda.synchronize(device)
            started = perf_counter()
            for _ in range(4):
                square @ square
            torch.cuda.synchronize(device)
            seconds[dtype] = perf_counter() - started
    return seconds[torch.float64] > PAYS * seconds[torch.float32]
