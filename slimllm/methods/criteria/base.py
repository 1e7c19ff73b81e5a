"""What a criterion is: a score of every unit of a sub-layer, or a choice among them."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

import torch

from slimllm.methods.selection import Selection, select_units
from slimllm.methods.statistics import Needs, SublayerStatistics
from slimllm.models.sublayer import Sublayer
from slimllm.plugins import CRITERIA, Method

register_criterion = CRITERIA.register


class Criterion(Method, ABC):
    """Chooses which units of a sub-layer stay: heads or KV groups of attention, channels of an FFN.

    A criterion that weighs units one by one defines `scores`; one that chooses them jointly defines `select`.

    Attributes:
        needs: What it needs of the calibration activations.
        attention_gram: Whether it uses the Gram of attention's columns (`gram`, `output_covariance()`). If no method of a
            run does, the covariances of the heads may be streamed without it, which for few tokens is less work.
        needs_recovery: Whether its choice is only good once the rest has been fitted anew.
    """

    needs: ClassVar[Needs] = Needs.COLUMNS
    attention_gram: ClassVar[bool] = True
    needs_recovery: ClassVar[bool] = False

    def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
        """Importance of every unit, (units,); the lowest are removed first.

        Args:
            sublayer: The dense sub-layer.
            statistics: Statistics of its calibration activations.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define scores() or select().")

    def select(self, sublayer: Sublayer, statistics: SublayerStatistics, num_removed: int) -> Selection:
        """Choose the units that stay.

        Args:
            sublayer: The dense sub-layer.
            statistics: Statistics of its calibration activations.
            num_removed: How many units are removed, of every group of the sub-layer.
        """
        scores = self.scores(sublayer, statistics)
        if scores.shape != (sublayer.units,):
            raise ValueError(
                f"scores of the criterion {self.name} must have shape ({sublayer.units},), one for each unit of the "
                f"{sublayer.kind}, got {tuple(scores.shape)}."
            )
        if not bool(scores.isfinite().all()):
            raise ValueError(f"scores of the criterion {self.name} must be finite, got NaN or infinity.")
        return Selection(select_units(scores, num_removed, sublayer.groups), scores)
