"""Wanda-sp (arXiv 2306.11695, made structured in arXiv 2312.11983)."""

from __future__ import annotations

import torch

from slimllm.methods.criteria.base import Criterion, register_criterion
from slimllm.methods.scores import wanda
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_criterion("wanda-sp")
class WandaSp(Criterion):
    """Wanda-sp: mean absolute weight times norm of the activations, summed over a unit's columns."""

    attention_gram = False

    def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
        weight = sublayer.effective_weight()
        return wanda(weight, statistics.columns.norms().to(weight.device)).view(sublayer.units, -1).sum(1)
