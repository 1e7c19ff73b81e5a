"""Wanda-sp (arXiv 2306.11695, 2312.11983) as a criterion: mean absolute weight times norm of the activations.

slimllm prune MODEL --out OUT --ratio 0.2 --plugin examples/wanda_sp.py --preset slimllm \\
    --criterion my-wanda-sp --allocation uniform --recovery none
"""

import torch

from slimllm.methods.criteria import Criterion, register_criterion
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_criterion("my-wanda-sp")
class MyWandaSp(Criterion):
    """Wanda-sp, summed over the columns of a head or channel."""

    attention_gram = False  # uses only the norms of columns

    def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
        weight = sublayer.effective_weight().double()  # (D, F), the output projection
        norms = statistics.columns.norms().to(weight.device)  # ‖z[:, c]‖₂ of its inputs z, (F,)
        return (weight.abs().mean(0) * norms).view(sublayer.units, -1).sum(1)
