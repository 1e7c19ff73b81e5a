"""FLAP's recovery (arXiv 2312.11983): the mean output of the removed units becomes a bias."""

from __future__ import annotations

import torch

from slimllm.methods.recovery.base import Fit, Recovery, register_recovery
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_recovery("bias")
class Bias(Recovery):
    """Mean output of the removed units, added as a bias (FLAP)."""

    version = "2"  # means of the dense model, if the criterion's statistics are the dense model's
    attention_gram = False
    dense_statistics = True

    def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
        means = statistics.output_means(kept)
        return Fit.of_moments(means, torch.ones_like(means.mean_y), means.mean_y - means.mean_y_hat)
