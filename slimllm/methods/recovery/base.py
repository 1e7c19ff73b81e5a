"""Base class of recoveries: changes of the output projection, fitted on calibration activations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from slimllm.methods.moments import OutputMeans
from slimllm.methods.statistics import Needs, SublayerStatistics
from slimllm.models.slicing import OutputChange
from slimllm.models.sublayer import Sublayer
from slimllm.plugins import RECOVERIES, Method

register_recovery = RECOVERIES.register


@dataclass(frozen=True)
class Fit:
    """A fitted change of an output projection.

    Attributes:
        change: The change; None: there is none.
        error_before, error_after: The output's error relative to its variance, without and with the change; None: it was
            not measured.
    """

    change: OutputChange | None
    error_before: float | None
    error_after: float | None

    @classmethod
    def of_moments(cls, moments: OutputMeans, slope: torch.Tensor, intercept: torch.Tensor) -> Fit:
        """Make the change W' = a ∘ W, bias' = bias + b from a slope a and an intercept b, (D,) fp64."""
        change = OutputChange(intercept, slope)
        return cls(change, moments.error_of_removal(), moments.relative_error(slope, intercept))


class Recovery(Method, ABC):
    """Method that changes an output projection so that the kept units make up for the removed ones.

    Attributes:
        needs: The statistics of the calibration activations that it needs. A change may have a `delta` only with
            `COLUMN_GRAM`.
        attention_gram: As for a criterion.
        adds_bias: Whether it adds a bias to an output projection without one. If not, the `intercept` of its changes must
            be None.
        goes_without_bias: Whether it gives no intercept for a sub-layer whose `takes_bias` is False (`bias` `no`).
        dense_statistics: Whether it accepts statistics of the dense model, if the criterion's are such. The moments of the
            output are then only its means (`output_means`).
        shares_work: Whether the processes of a run share the work of `fit` and all return the same fit. Otherwise each
            process fits alone, and the change of the first one is used.
    """

    needs: ClassVar[Needs] = Needs.COLUMNS
    attention_gram: ClassVar[bool] = True
    adds_bias: ClassVar[bool] = True
    goes_without_bias: ClassVar[bool] = False
    dense_statistics: ClassVar[bool] = False
    shares_work: ClassVar[bool] = False

    @abstractmethod
    def fit(self, sublayer: Sublayer, statistics: SublayerStatistics, kept: torch.Tensor) -> Fit:
        """Fit the change; all processes of a run call this.

        Args:
            sublayer: The dense sub-layer.
            statistics: Statistics of its calibration activations.
            kept: The units that stay, sorted int64 indices on the CPU.
        """
