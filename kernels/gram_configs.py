"""Launch configurations of the Gram kernel by kind of input, and what differs on a chip."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Launch configuration: result tiles of BLOCK_F × BLOCK_F, tokens BLOCK_N at a time."""

    block_f: int
    block_n: int
    num_warps: int
    num_stages: int


# By kind of input, see `kind_of`. Chosen by the registers and shared memory that ptxas reports
# (tests/unit/ops/test_compile.py), not yet timed on a GPU.
CONFIGS = {
    "tma": Config(128, 64, 8, 4),
    "plain": Config(128, 64, 8, 3),
    "parts": Config(64, 32, 8, 2),
    "float": Config(64, 16, 8, 2),
    "unaligned": Config(64, 32, 8, 2),
    "narrow": Config(64, 16, 8, 1),
}
# What differs by compute capability: where the general configuration spills (benchmarks/kernels_report.py), or where
# benchmarks/tune_gram.py measured another one to be faster; it prints the lines to put here.
CONFIGS_OF_CHIP: dict[tuple[int, int], dict[str, Config]] = {
    (12, 0): {"float": Config(64, 16, 4, 2), "narrow": Config(64, 16, 4, 2)}  # compiled, not timed
}
TMA_MAJORS = (9, 10)  # major compute capabilities on which tensor descriptors pay; on 12.0 they spill


def kind_of(dtype: torch.dtype, parts: bool, tma: bool, aligned: bool) -> str:
    """Return the kind of an input. `parts`: there is a pivot or weights; `aligned`: reads of 16 bytes are possible."""
    full = dtype == torch.float32 or (dtype == torch.float16 and parts)
    if not aligned:
        return "narrow" if full or parts else "unaligned"
    if full:
        return "float"
    return "parts" if parts else "tma" if tma else "plain"


def config_of(kind: str, capability: tuple[int, int] | None = None) -> Config:
    """Return the configuration for a kind of input on GPUs of a compute capability; None: the general one."""
    return CONFIGS_OF_CHIP.get(capability or (0, 0), {}).get(kind, CONFIGS[kind])
