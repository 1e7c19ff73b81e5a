"""The paper's recovery (SlimLLM, arXiv 2505.22689, "linear regression"): a slope and an intercept for every output."""

from __future__ import annotations

import torch

from slimllm.methods.recovery.base import Fit, Recovery, register_recovery
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_recovery("affine")
class Affine(Recovery):
    """The paper's regression of every output dimension on its pruned value, y_k ≈ a_k ŷ_k + b_k."""

    attention_gram = False

    def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
        moments = statistics.moments(kept)
        return Fit.of_moments(moments, *moments.affine_fit())
