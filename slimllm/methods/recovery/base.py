"""What a recovery is: a change of the output projection, fitted on calibration activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from slimllm.methods.moments import OutputMoments
from slimllm.methods.statistics import Needs, SublayerStatistics
from slimllm.models.slicing import OutputChange
from slimllm.models.sublayer import Sublayer
from slimllm.plugins import RECOVERIES, Method

register_recovery = RECOVERIES.register


@dataclass(frozen=True)
class Fit:
    """The change of an output projection (None: none), and the output's error relative to its variance, without the change
    and with it."""

    change: OutputChange | None
    error_before: float
    error_after: float

    @classmethod
    def of_moments(cls, moments: OutputMoments, slope: torch.Tensor, intercept: torch.Tensor) -> Fit:
        """The change W' = a ∘ W, bias' = bias + b for a slope a and an intercept b, (D,) fp64."""
        change = OutputChange(intercept, slope)
        return cls(change, moments.error_of_removal(), moments.relative_error(slope, intercept))


class Recovery(Method, ABC):
    """Changes an output projection so that the kept units make up for those that are removed.

    Attributes:
        needs: What it needs of the calibration activations. Only with `COLUMN_GRAM` may a change have a `delta`.
        attention_gram: As of a criterion.
        adds_bias: Whether it gives an output projection a bias where it had none. Where it does not, the `intercept` of its
            changes has to be None.
        shares_work: Whether the processes of a run share the work of `fit`, and all return the same. Otherwise each fits
            alone, and the first one's change holds.
    """

    needs: ClassVar[Needs] = Needs.COLUMNS
    attention_gram: ClassVar[bool] = True
    adds_bias: ClassVar[bool] = True
    shares_work: ClassVar[bool] = False

    @abstractmethod
    def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
        """Fit the change; all processes of a run call it.

        Args:
            sublayer: The dense sub-layer.
            statistics: Statistics of its calibration activations.
            kept: The units that stay, sorted int64 indices on the CPU.
        """
