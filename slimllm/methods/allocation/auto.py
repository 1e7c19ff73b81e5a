"""Allocation that removes parameters where `obs` measures the least error per parameter, weighted by output sensitivity.

A curve is J of `slimllm.methods.elimination` over how much is removed, from the dense model's activations, divided by the
mean square of the residual stream after the sub-layer. With token weights `norm`, each token is divided by its own mean
square, as the next norm does.
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
from slimllm.methods.elimination import eliminate_channels, eliminate_heads
from slimllm.methods.statistics import Needs
from slimllm.methods.surgeon import Surgeon, surgeon_for
from slimllm.statistics import GramStatistics

# Factor on the loss of attention: heads that one text does not need may be needed by another. With 1 instead, SmolLM2
# mostly loses more on text of another kind than the calibration's, up to half as much again (benchmarks/NOTES.md).
ATTENTION_WEIGHT = 2.0


@register_allocation("auto")
class Auto(Allocation):
    """Allocation by measured error: every step is taken where a parameter costs least, weighted by output sensitivity."""

    needs = Needs.COLUMN_GRAM
    version = "3"  # fewer probed layers, larger blocks; half of the inverse
    by_sensitivity = True
    shares_work = True

    def costs(self, dense: DenseSublayer) -> torch.Tensor:
        sublayer, statistics = dense.sublayer, dense.columns
        assert isinstance(statistics, GramStatistics)
        if not sublayer.takes_bias:
            statistics = statistics.about_zero()
        weight, units, groups = sublayer.effective_weight(), sublayer.units, sublayer.groups
        if sublayer.is_attention:
            found = (
                eliminate_heads(Surgeon(weight, statistics), units, units // groups, groups).costs.view(-1, groups).sum(1)
            )
        else:
            found = eliminate_channels(surgeon_for(weight, statistics, dense.ranks), units).costs
        # J is a mean over tokens, weighted or not, of a square summed over the outputs.
        factor = statistics.mass if dense.weighted else statistics.mass * dense.tokens / dense.stream_square
        factor *= ATTENTION_WEIGHT if sublayer.is_attention else 1.0
        return found * (factor / dense.tokens / sublayer.output_projection.out_features)

    def allocate(self, request: Request) -> Removals:
        return spend_at_least_cost(request)
