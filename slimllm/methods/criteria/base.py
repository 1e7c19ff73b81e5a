"""Base class of criteria: scores of a sub-layer's units, or a choice among them."""

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
    """Method that chooses which units of a sub-layer stay: heads or KV groups of attention, channels of an FFN.

    A criterion that scores units one by one defines `scores`; a criterion that chooses them jointly defines `select`.

    Attributes:
        needs: The statistics of the calibration activations that it needs.
        attention_gram: Whether it uses the Gram of attention's columns (`gram`, `output_covariance()`). If no method of a
            run does, the covariances of the heads may be streamed without the Gram, which is less work for few tokens.
        needs_recovery: Whether its choice is only good after a refit of the remaining weights.
        dense_statistics: Whether its statistics are those of the dense model, not of the model pruned so far. If the
            recovery accepts them, too, the dense pass is the only pass over the windows. It must not need a Gram.
        shares_work: Whether the processes of a run share the work of `select`: all of them call it, and the first one's
            choice is used. Otherwise only the first one calls it.
    """

    needs: ClassVar[Needs] = Needs.COLUMNS
    attention_gram: ClassVar[bool] = True
    needs_recovery: ClassVar[bool] = False
    dense_statistics: ClassVar[bool] = False
    shares_work: ClassVar[bool] = False

    def scores(self, sublayer: Sublayer, statistics: SublayerStatistics) -> torch.Tensor:
        """Return the importance of every unit, (units,); units with the lowest are removed first.

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
            num_removed: Number of units to remove from every group of the sub-layer.
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
