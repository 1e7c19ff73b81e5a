"""The size of a column for ridge regressions, and whether there are enough tokens for one."""

from __future__ import annotations

import torch

from slimllm.statistics import GramStatistics

# The part of a column's squared mean that counts as its size beside the variance, so that a column that is nearly constant
# gets no weights so large that rounding them moves the output.
MEAN_PART = 0.01


def has_few_tokens(statistics: GramStatistics) -> bool:
    """Whether there are fewer than two tokens for a column, so that a fit of all columns describes these tokens alone."""
    return statistics.count < 2 * statistics.features


def column_scale(variance: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The size d of every column for the ridge: d² = var z + 0.01 (E z)², and 0 where it is constant. (F,) fp64."""
    variance = variance.clamp(min=0)
    return torch.where(variance > 0, (variance + MEAN_PART * mean.square()).sqrt(), 0.0)
