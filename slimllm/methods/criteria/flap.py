"""FLAP's score (arXiv 2312.11983)."""

from __future__ import annotations

import torch

from slimllm.methods.criteria.base import Criterion, register_criterion
from slimllm.methods.scores import flap
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_criterion("flap")
class Flap(Criterion):
    """FLAP: variance of the activations times squared weights, squared in attention, summed over a unit's columns.

    Statistics are those of the dense model, as in FLAP's own code, if the recovery accepts them (`bias`, `none`).
    """

    version = "3"  # squares in attention, as in FLAP's code
    attention_gram = False
    dense_statistics = True

    def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
        weight, columns = sublayer.effective_weight(), statistics.columns
        # Without a bias nothing replaces the mean.
        spread = columns.variance() if sublayer.takes_bias else columns.variance() + columns.mean().square()
        return flap(weight, spread.to(weight.device), sublayer.is_attention).view(sublayer.units, -1).sum(1)
