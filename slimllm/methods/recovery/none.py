"""No recovery: the kept weights stay as they are."""

from __future__ import annotations

import torch

from slimllm.methods.recovery.base import Fit, Recovery, register_recovery
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_recovery("none")
class NoRecovery(Recovery):
    """The kept weights stay as they are."""

    attention_gram = False
    dense_statistics = True
    adds_bias = False

    def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
        error = statistics.output_means(kept).error_of_removal()
        return Fit(None, error, error)
