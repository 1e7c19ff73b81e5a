"""FLAP's allocation (arXiv 2312.11983): one threshold for its scores, standardised in every sub-layer.

Scores are standardised over the columns of each sub-layer and, in attention, averaged over the columns of a unit. A curve
sums the scores of the removed units times their parameters, so that all sub-layers are pruned at the same threshold.
"""

from __future__ import annotations

import torch

from slimllm.methods.allocation.base import (
    Allocation,
    DenseSublayer,
    Removals,
    Request,
    register_allocation,
    spend_at_least_cost,
)
from slimllm.methods.scores import flap
from slimllm.methods.statistics import Needs


@register_allocation("flap")
class FlapAllocation(Allocation):
    """FLAP: one threshold for its scores over the whole model."""

    needs = Needs.COLUMNS
    version = "2"  # squares in attention, as in FLAP's code

    def costs(self, dense: DenseSublayer) -> torch.Tensor:
        sublayer = dense.sublayer
        weight = sublayer.effective_weight()
        spread = dense.columns.variance()
        if not sublayer.takes_bias:  # nothing replaces the mean
            spread = spread + dense.columns.mean().square()
        score = flap(weight, spread.to(weight.device), sublayer.is_attention).cpu()
        deviation = float(score.std())  # of a sample, as in FLAP's code
        score = (score - score.mean()) / deviation if deviation > 0 else torch.zeros_like(score)
        if not sublayer.is_attention:
            return score.sort().values * dense.shape.channel_params
        by_unit = score.view(sublayer.units, -1).mean(1).view(sublayer.groups, -1).sort(1).values.mean(0)
        return by_unit * dense.shape.unit_params

    def allocate(self, request: Request) -> Removals:
        return spend_at_least_cost(request)
