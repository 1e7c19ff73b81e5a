"""Statistics of a sub-layer's calibration activations, and the flags by which methods declare what they need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from enum import Flag, auto
from typing import Any

import torch

from slimllm import ops
from slimllm.methods.moments import OutputMeans, OutputMoments
from slimllm.models.sublayer import Sublayer
from slimllm.runtime.distributed import Ranks
from slimllm.statistics import ColumnStatistics, GramStatistics, HeadStatistics


class Needs(Flag):
    """Statistics that a method needs of the calibration activations z that enter an output projection, y = W z.

    The engine streams only what the methods of a run need. The Gram of attention's columns is available to methods with
    `attention_gram = True`, the default. The Gram of an FFN's columns costs F² multiply-adds per token and F² numbers in
    memory; the Gram of its output costs D² of each.
    """

    COLUMNS = auto()  # mean, variance and norm of every column of z, and of the inputs of an FFN
    OUTPUT_GRAM = auto()  # the covariance of y, (D, D)
    COLUMN_GRAM = auto()  # the covariance of z, (F, F), from which all else follows


class Columns:
    """Mean, variance and norm of every column, from either kind of statistics."""

    def __init__(self, statistics: ColumnStatistics | GramStatistics) -> None:
        self._statistics = statistics

    def mean(self) -> torch.Tensor:
        """Return the mean over tokens: (F,) fp64."""
        return self._statistics.mean()

    def variance(self) -> torch.Tensor:
        """Return the population variance: (F,) fp64."""
        return self._statistics.variance()

    def norms(self) -> torch.Tensor:
        """Return (Σ_t w_t x_tj²)^½, or without weights ‖X[:,j]‖₂: (F,) fp64."""
        return self._statistics.norms()


class SublayerStatistics:
    """Statistics of a sub-layer over the calibration tokens of all processes.

    Tensors are on the layer's device, except those of an FFN's Gram, which a budget of GPU memory may put on the CPU.

    Args:
        sublayer: The dense sub-layer.
        columns: Statistics of z, the inputs of the output projection, F features.
        inputs: Statistics of an FFN's inputs, D features; None for attention.
        output_covariance: Computes the covariance of y, (D, D) fp64; None: it was not streamed.
        moments: Computes the moments of y and of the kept units' output, or only their means if the statistics are those of
            the dense model; None: they are streamed later (`give_moments`).
        ranks: The processes of the run. A recovery is called in all of them, a criterion in the first one only, unless
            it shares its work.
        outputs: Statistics of every dimension of y; None: its variance follows from the covariance.
    """

    def __init__(
        self,
        sublayer: Sublayer,
        columns: ColumnStatistics | GramStatistics | HeadStatistics,
        inputs: ColumnStatistics | None,
        output_covariance: Callable[[], torch.Tensor] | None,
        moments: Callable[[SublayerStatistics, torch.Tensor], OutputMeans] | None,
        ranks: Ranks,
        outputs: ColumnStatistics | None = None,
    ) -> None:
        self.sublayer, self.ranks, self._columns, self._outputs = sublayer, ranks, columns, outputs
        self._inputs, self._output_covariance, self._moments = inputs, output_covariance, moments
        self._allowed, self._attention_gram = ~Needs(0), True
        self._made: dict[str, torch.Tensor] = {}  # shared with what `seen_by` returns
        self._streamed: list[tuple[torch.Tensor, OutputMoments]] = []

    def seen_by(self, method: Any) -> SublayerStatistics:
        """Return these statistics, limited to those that a criterion or recovery has declared to need."""
        return self._seen(method.needs, method.attention_gram)

    def _seen(self, allowed: Needs, attention_gram: bool) -> SublayerStatistics:
        seen = copy.copy(self)
        seen._allowed, seen._attention_gram = allowed, attention_gram
        return seen

    def _check(self, needed: Needs, what: str) -> None:
        if self.sublayer.is_attention and not self._attention_gram:
            raise ValueError(f"{what} of attention is available only to a method with attention_gram = True.")
        if not self.sublayer.is_attention and not needed & self._allowed:
            names = " or ".join(f"Needs.{flag.name}" for flag in Needs if flag in needed)
            raise ValueError(f"{what} of an FFN is available only to a method that declares {names} in its needs.")

    @property
    def inputs(self) -> ColumnStatistics:
        """Mean, variance and norm of every dimension of the FFN's inputs (the norm's output), D features."""
        if self._inputs is None:
            raise ValueError("there are no statistics of the inputs of attention; use `columns`, those of its heads.")
        return self._inputs

    @property
    def columns(self) -> Columns:
        """Mean, variance and norm of every column of z, F features."""
        return Columns(self._columns)

    @property
    def gram(self) -> GramStatistics:
        """The Gram of the columns, F features; an FFN's needs `Needs.COLUMN_GRAM`, attention's `attention_gram`."""
        self._check(Needs.COLUMN_GRAM, "the Gram of the columns")
        assert isinstance(self._columns, GramStatistics)
        return self._columns

    def output_covariance(self) -> torch.Tensor:
        """Return Cov(y) of the output projection's output, (D, D) fp64.

        For an FFN, the method must need one of the Grams; for attention, it must have `attention_gram`.
        """
        self._check(Needs.OUTPUT_GRAM | Needs.COLUMN_GRAM, "the covariance of the output")
        if "output" not in self._made:
            assert self._output_covariance is not None
            self._made["output"] = self._output_covariance()
        return self._made["output"]

    def output_variance(self) -> torch.Tensor:
        """Return var(y_k), (D,) fp64; for an FFN, the method must need one of the Grams."""
        if not self.sublayer.is_attention:
            self._check(Needs.OUTPUT_GRAM | Needs.COLUMN_GRAM, "the variance of the output")
        if self._outputs is not None:
            return self._outputs.variance()
        if self.sublayer.is_attention:
            return self.unit_covariance(effective=False).sum((0, 1))
        return self.output_covariance().diagonal()

    def unit_covariance(self, effective: bool = True) -> torch.Tensor:
        """Return covariances of the heads' (or KV groups') contributions to attention's output, (units, units, D) fp64.

        See `slimllm.ops.head_covariance`.

        Args:
            effective: Whether the output is scaled by the post-norm's gain, as in the residual stream.
        """
        if not self.sublayer.is_attention:
            raise ValueError("the covariances of an FFN's channels would have I²·D elements; use `gram`.")
        if not isinstance(self._columns, (GramStatistics, HeadStatistics)):
            raise ValueError("with statistics of the dense model, there are no covariances of the heads; use `columns`.")
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
        """Store the moments that were streamed for the kept units."""
        self._streamed.append((kept, moments))

    def moments(self, kept: torch.Tensor) -> OutputMoments:
        """Return moments of the dense output and of the kept units' output, for a recovery.

        Args:
            kept: The selected units, sorted int64 indices. Other units are allowed in attention, and in an FFN whose Gram
                of the columns was streamed.
        """
        moments = self.output_means(kept)
        if not isinstance(moments, OutputMoments):
            raise ValueError("with statistics of the dense model, only the means of the output are known: `output_means`.")
        return moments

    def output_means(self, kept: torch.Tensor) -> OutputMeans:
        """Return `moments`, or only the means if the statistics are those of the dense model (`dense_statistics`)."""
        if self._moments is not None:
            return self._moments(self._seen(~Needs(0), True), kept)
        for streamed, moments in self._streamed:
            if torch.equal(streamed, kept):
                return moments
        raise ValueError(
            "without Needs.COLUMN_GRAM, the moments of an FFN's output are available only to a recovery, and only for the "
            "selected units."
        )
