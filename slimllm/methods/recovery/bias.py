"""FLAP's recovery (arXiv 2312.11983): the mean output of the removed units becomes a bias."""

from __future__ import annotations

import torch

from slimllm.methods.recovery.base import Fit, Recovery, register_recovery
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_recovery("bias")
class Bias(Recovery):
    """Mean output of the removed units, added as a bias (FLAP)."""

    attention_gram = False

    def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
        moments = statistics.moments(kept)
        return Fit.of_moments(moments, torch.ones_like(moments.mean_y), moments.mean_y - moments.mean_y_hat)
