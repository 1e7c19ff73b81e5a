"""FLAP's metric (arXiv 2312.11983) as a criterion: activations that hardly fluctuate can be replaced by their mean.

slimllm prune MODEL --out OUT --ratio 0.2 --plugin examples/flap.py --preset slimllm --criterion my-flap \\
    --allocation flap --recovery bias
"""

import torch

from slimllm.methods.criteria import Criterion, register_criterion
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_criterion("my-flap")
class MyFlap(Criterion):
    """Variance of the activations times squared weights, squared again in attention, and summed over a unit's columns."""

    attention_gram = False  # uses only the norms and variances of columns
    dense_statistics = True  # of the dense model, as published: with the recovery bias there is no second pass

    def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
        weight = sublayer.effective_weight().double()
        variance = statistics.columns.variance().to(weight.device)
        score = weight.square().sum(0) * variance
        return (score.square() if sublayer.is_attention else score).view(sublayer.units, -1).sum(1)
