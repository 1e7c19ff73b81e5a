"""Custom score with an option of its own: the power to which the activations' norm is raised.

slimllm prune MODEL --out OUT --ratio 0.2 --plugin examples/own_score.py --criterion own-score --own-score.power 0.5
"""

from dataclasses import dataclass

import torch

from slimllm.methods.criteria import Criterion, register_criterion
from slimllm.methods.statistics import SublayerStatistics
from slimllm.models.sublayer import Sublayer


@register_criterion("own-score")
class OwnScore(Criterion):
    """Norm of a unit's weights times the norm of its activations to some power."""

    attention_gram = False  # uses only the norms of columns

    @dataclass(frozen=True)
    class Settings:
        """power: Power of the norm; 0 uses the weights alone."""

        power: float = 1.0

    def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
        weight = sublayer.effective_weight().double()
        norms = statistics.columns.norms().to(weight.device) ** self.settings.power
        return (weight.norm(dim=0) * norms).view(sublayer.units, -1).sum(1)
