"""Column scales for ridge regressions, and whether there are enough tokens for one."""

from __future__ import annotations

import torch

from slimllm.statistics import GramStatistics

# Fraction of a column's squared mean that is added to its variance. It bounds the weights of a nearly constant column,
# which could otherwise be so large that rounding them moves the output.
MEAN_PART = 0.01


def has_few_tokens(statistics: GramStatistics) -> bool:
    """Return whether there are fewer than two tokens per column; a fit of all columns then describes only these tokens."""
    return statistics.count < 2 * statistics.features


def column_scale(variance: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Compute the size d of every column for the ridge, (F,) fp64: d² = var z + 0.01 (E z)², and 0 if it is constant."""
    variance = variance.clamp(min=0)
    return torch.where(variance > 0, (variance + MEAN_PART * mean.square()).sqrt(), 0.0)
