"""What methods see of a sub-layer's calibration activations, and how they say what they need."""

from __future__ import annotations

from collections.abc import Callable
from enum import Flag, auto

import torch

from slimllm import ops
from slimllm.methods.moments import OutputMoments
from slimllm.models.sublayer import Sublayer
from slimllm.runtime.distributed import Ranks
from slimllm.statistics import ColumnStatistics, GramStatistics


class Needs(Flag):
    """What a method needs of the calibration activations z that enter a sub-layer's output projection, y = W z.

    The engine streams what the methods of a run need together, and no more. The Gram of the columns of attention is always
    there; that of an FFN costs F² multiply-adds for a token and F² numbers in memory, that of the output D².
    """

    COLUMNS = auto()  # mean, variance and norm of every column of z, and the norms of the sub-layer's inputs
    OUTPUT_GRAM = auto()  # the covariance of y, (D, D)
    COLUMN_GRAM = auto()  # the covariance of z, (F, F), of which all else follows


class SublayerStatistics:
    """Statistics of a sub-layer over all calibration tokens, those of all processes.

    Args:
        sublayer: The dense sub-layer.
        columns: Of z, the inputs of the output projection, F features.
        inputs: Of what enters an FFN, D features; None for attention.
        output_covariance: Makes the covariance of y, (D, D) fp64; None: it was not streamed.
        moments: Makes the moments of y and of what the kept units put out; None: they are streamed, and given later.
        ranks: The processes of the run; all of them call a method's functions.
    """

    def __init__(
        self,
        sublayer: Sublayer,
        columns: ColumnStatistics | GramStatistics,
        inputs: ColumnStatistics | None,
        output_covariance: Callable[[], torch.Tensor] | None,
        moments: Callable[[SublayerStatistics, torch.Tensor], OutputMoments] | None,
        ranks: Ranks,
    ) -> None:
        self.sublayer, self.columns, self.ranks = sublayer, columns, ranks
        self._inputs, self._output_covariance, self._moments = inputs, output_covariance, moments
        self.streamed_moments: OutputMoments | None = None
        self._covariance: torch.Tensor | None = None
        self._by_unit: dict[bool, torch.Tensor] = {}

    @property
    def inputs(self) -> ColumnStatistics:
        """Mean, variance and norm of every dimension of what enters the FFN (the norm's output), D features."""
        if self._inputs is None:
            raise ValueError("there are no statistics of the inputs of attention; `columns` are those of its heads.")
        return self._inputs

    @property
    def gram(self) -> GramStatistics:
        """The Gram of the columns, F features; of an FFN only where a method of the run needs `Needs.COLUMN_GRAM`."""
        if not isinstance(self.columns, GramStatistics):
            raise ValueError("the Gram of the channels was not streamed; add Needs.COLUMN_GRAM to the method's needs.")
        return self.columns

    def output_covariance(self) -> torch.Tensor:
        """Cov(y) of the output projection's output, (D, D) fp64; where a method of the run needs one of the Grams."""
        if self._covariance is None:
            if self._output_covariance is None:
                raise ValueError("the Gram of the output was not streamed; add Needs.OUTPUT_GRAM to the method's needs.")
            self._covariance = self._output_covariance()
        return self._covariance

    def output_variance(self) -> torch.Tensor:
        """var(y_k), (D,) fp64; where a method of the run needs one of the Grams."""
        if self.sublayer.is_attention:
            return self.unit_covariance(effective=False).sum((0, 1))
        return self.output_covariance().diagonal()

    def unit_covariance(self, effective: bool = True) -> torch.Tensor:
        """Covariances of the units' contributions to the output, (units, units, D) fp64; see `slimllm.ops.head_covariance`.

        Args:
            effective: Of the output as the residual stream sees it, scaled by the post-norm's gain.
        """
        effective = effective and self.sublayer.post_norm is not None
        if effective not in self._by_unit:
            weight = self.sublayer.effective_weight() if effective else self.sublayer.output_projection.weight
            self._by_unit[effective] = ops.head_covariance(weight, self.gram.covariance(), self.sublayer.units)
        return self._by_unit[effective]

    def moments(self, kept: torch.Tensor) -> OutputMoments:
        """Moments of the dense output and of what the kept units put out.

        Args:
            kept: The units that were selected, sorted int64 indices.
        """
        if self.streamed_moments is not None:
            return self.streamed_moments
        if self._moments is None:
            raise ValueError("the moments of what is kept are known to a recovery, and not to a criterion.")
        return self._moments(self, kept)
