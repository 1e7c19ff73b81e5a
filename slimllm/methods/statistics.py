"""What methods see of a sub-layer's calibration activations, and how they say what they need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from enum import Flag, auto
from typing import Any

import torch

from slimllm import ops
from slimllm.methods.moments import OutputMoments
from slimllm.models.sublayer import Sublayer
from slimllm.runtime.distributed import Ranks
from slimllm.statistics import ColumnStatistics, GramStatistics, HeadStatistics


class Needs(Flag):
    """What a method needs of the calibration activations z that enter a sub-layer's output projection, y = W z.

    The engine streams what the methods of a run need together, and no more. The Gram of attention's columns is there for a
    method with `attention_gram = True`, the default; that of an FFN costs F² multiply-adds for a token and F² numbers in
    memory, that of the output D².
    """

    COLUMNS = auto()  # mean, variance and norm of every column of z, and the norms of the sub-layer's inputs
    OUTPUT_GRAM = auto()  # the covariance of y, (D, D)
    COLUMN_GRAM = auto()  # the covariance of z, (F, F), of which all else follows


class Columns:
    """Mean, variance and norm of every column, whichever statistics they are taken from."""

    def __init__(self, statistics: ColumnStatistics | GramStatistics) -> None:
        self._statistics = statistics

    def mean(self) -> torch.Tensor:
        """Mean over tokens: (F,) fp64."""
        return self._statistics.mean()

    def variance(self) -> torch.Tensor:
        """Population variance: (F,) fp64."""
        return self._statistics.variance()

    def norms(self) -> torch.Tensor:
        """(Σ_t w_t x_tj²)^½, without weights ‖X[:,j]‖₂: (F,) fp64."""
        return self._statistics.norms()


class SublayerStatistics:
    """Statistics of a sub-layer over all calibration tokens, those of all processes.

    Tensors are on the layer's device, but for those of an FFN's Gram, which a budget of GPU memory may put on the CPU.

    Args:
        sublayer: The dense sub-layer.
        columns: Statistics of z, the inputs of the output projection, F features.
        inputs: Statistics of what enters an FFN, D features; None for attention.
        output_covariance: Makes the covariance of y, (D, D) fp64; None: it was not streamed.
        moments: Makes the moments of y and of what the kept units put out; None: they are streamed, and given later.
        ranks: The processes of the run. A criterion is called in the first one alone; a recovery in all of them.
    """

    def __init__(
        self,
        sublayer: Sublayer,
        columns: ColumnStatistics | GramStatistics | HeadStatistics,
        inputs: ColumnStatistics | None,
        output_covariance: Callable[[], torch.Tensor] | None,
        moments: Callable[[SublayerStatistics, torch.Tensor], OutputMoments] | None,
        ranks: Ranks,
    ) -> None:
        self.sublayer, self.ranks, self._columns = sublayer, ranks, columns
        self._inputs, self._output_covariance, self._moments = inputs, output_covariance, moments
        self._allowed, self._attention_gram = ~Needs(0), True
        self._made: dict[str, torch.Tensor] = {}  # shared by what `seen_by` returns
        self._streamed: list[tuple[torch.Tensor, OutputMoments]] = []

    def seen_by(self, method: Any) -> SublayerStatistics:
        """The same, of which only what a criterion or recovery has declared to need can be used, whatever others need."""
        return self._seen(method.needs, method.attention_gram)

    def _seen(self, allowed: Needs, attention_gram: bool) -> SublayerStatistics:
        seen = copy.copy(self)
        seen._allowed, seen._attention_gram = allowed, attention_gram
        return seen

    def _check(self, needed: Needs, what: str) -> None:
        if self.sublayer.is_attention and not self._attention_gram:
            raise ValueError(f"{what} of attention is there for a method with attention_gram = True.")
        if not self.sublayer.is_attention and not needed & self._allowed:
            names = " or ".join(f"Needs.{flag.name}" for flag in Needs if flag in needed)
            raise ValueError(f"{what} of an FFN is there for a method that declares {names} in its needs.")

    @property
    def inputs(self) -> ColumnStatistics:
        """Mean, variance and norm of every dimension of what enters the FFN (the norm's output), D features."""
        if self._inputs is None:
            raise ValueError("there are no statistics of the inputs of attention; `columns` are those of its heads.")
        return self._inputs

    @property
    def columns(self) -> Columns:
        """Mean, variance and norm of every column of z, F features."""
        return Columns(self._columns)

    @property
    def gram(self) -> GramStatistics:
        """The Gram of the columns, F features; of an FFN with `Needs.COLUMN_GRAM`, of attention with `attention_gram`."""
        self._check(Needs.COLUMN_GRAM, "the Gram of the columns")
        assert isinstance(self._columns, GramStatistics)
        return self._columns

    def output_covariance(self) -> torch.Tensor:
        """Cov(y) of the output projection's output, (D, D) fp64; of an FFN with one of the Grams, of attention with
        `attention_gram`."""
        self._check(Needs.OUTPUT_GRAM | Needs.COLUMN_GRAM, "the covariance of the output")
        if "output" not in self._made:
            assert self._output_covariance is not None
            self._made["output"] = self._output_covariance()
        return self._made["output"]

    def output_variance(self) -> torch.Tensor:
        """var(y_k), (D,) fp64; of an FFN with one of the Grams."""
        if self.sublayer.is_attention:
            return self.unit_covariance(effective=False).sum((0, 1))
        return self.output_covariance().diagonal()

    def unit_covariance(self, effective: bool = True) -> torch.Tensor:
        """Covariances of the heads' (or KV groups') contributions to the output of attention, (units, units, D) fp64.

        See `slimllm.ops.head_covariance`.

        Args:
            effective: For the output as the residual stream sees it, scaled by the post-norm's gain.
        """
        if not self.sublayer.is_attention:
            raise ValueError("the covariances of an FFN's channels are as large as I²·D; use `gram`.")
        effective = effective and self.sublayer.post_norm is not None
        name = "units, effective" if effective else "units"
        if name not in self._made:
            self._made[name] = self._unit_covariance(effective)
        return self._made[name]

    def _unit_covariance(self, effective: bool) -> torch.Tensor:
        gain = self.sublayer.post_norm_gain() if effective else None
        if isinstance(self._columns, HeadStatistics):
            covariance = self._columns.head_covariance()
            return covariance if gain is None else covariance * gain.double().square()
        assert isinstance(self._columns, GramStatistics)
        weight = self.sublayer.effective_weight() if effective else self.sublayer.output_projection.weight
        return ops.head_covariance(weight, self._columns.covariance(), self.sublayer.units)

    def give_moments(self, kept: torch.Tensor, moments: OutputMoments) -> None:
        """The moments that were streamed for the units that were kept."""
        self._streamed.append((kept, moments))

    def moments(self, kept: torch.Tensor) -> OutputMoments:
        """Moments of the dense output and of what the kept units put out, for a recovery.

        Args:
            kept: The units that were selected, sorted int64 indices; others where the Gram of the columns is there.
        """
        if self._moments is not None:
            return self._moments(self._seen(~Needs(0), True), kept)
        for streamed, moments in self._streamed:
            if torch.equal(streamed, kept):
                return moments
        raise ValueError(
            "without Needs.COLUMN_GRAM the moments of an FFN's output are known to a recovery, and for what was kept."
        )
