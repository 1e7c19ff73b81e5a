"""FLAP's score (arXiv 2312.11983)."""

from __future__ import annotations

import torch

from slimllm.methods.criteria.base import Criterion, register_criterion
from slimllm.methods.scores import fluctuation
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_criterion("flap")
class Flap(Criterion):
    """FLAP: variance of the activations times squared weights, summed over a unit's columns.

    Statistics are those of the dense model, as in FLAP's own code, if the recovery accepts them (`bias`, `none`).
    """

    version = "2"  # statistics of the dense model, as published
    attention_gram = False
    dense_statistics = True

    def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
        weight, columns = sublayer.effective_weight(), statistics.columns
        # Without a bias nothing replaces the mean.
        spread = columns.variance() if sublayer.takes_bias else columns.variance() + columns.mean().square()
        return fluctuation(weight, spread.to(weight.device)).view(sublayer.units, -1).sum(1)
