"""Seeded random choice, as a baseline for comparisons."""

from __future__ import annotations

import torch

from slimllm.methods.criteria.base import Criterion, register_criterion
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_criterion("random")
class Random(Criterion):
    """Random scores, reproducible by the run's seed."""

    attention_gram = False

    def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sublayer.seed)
        return torch.rand(sublayer.units, generator=generator, dtype=torch.float64)
