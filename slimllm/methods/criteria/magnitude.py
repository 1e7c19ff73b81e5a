"""Magnitude: the squared norm of all weights of a unit."""

from __future__ import annotations

import torch

from slimllm.methods.criteria.base import Criterion, register_criterion
from slimllm.methods.scores import squares
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_criterion("magnitude")
class Magnitude(Criterion):
    """Squared norm of the weights in all rows and columns of a unit."""

    attention_gram = False

    def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
        weight = sublayer.effective_weight()
        rows = [squares(sublayer.weight_of(projection)) for projection in sublayer.unit_rows]
        by_column = squares(weight.T) + sum(own for own in rows if len(own) == weight.shape[1])
        by_unit = by_column.view(sublayer.units, -1).sum(1)
        for own in rows:  # k_proj and v_proj have fewer rows with grouped queries
            if len(own) != weight.shape[1]:
                by_unit += own.view(sublayer.units, -1).sum(1)
        return by_unit
