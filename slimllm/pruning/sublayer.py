"""Pruning of one sub-layer: stream its activations, select, recover, slice, and let the residual stream pass what is left.

The statistics are streamed in one of three ways. Where a method needs the Gram of the columns (and for attention, where it
is small), all else follows from it: N·F² multiply-adds, and neither y nor ŷ is made. Otherwise an FFN needs the Gram of its
output y or not even that, N·D² at most, and, once the kept channels are known, the moments of (y, ŷ). Of few tokens the
covariances of attention's heads are less work from the tokens themselves.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import linear

from slimllm.methods.moments import OutputMoments, channel_moments, unit_moments
from slimllm.methods.recovery import Fit, Recovery
from slimllm.methods.statistics import Needs, SublayerStatistics
from slimllm.models.slicing import OutputChange, slice_output
from slimllm.models.sublayer import InnerActivations, Sublayer
from slimllm.plugins import calling
from slimllm.pruning.context import RunContext
from slimllm.pruning.shapes import streams_heads
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.hidden_states import Stored, Stream
from slimllm.runtime.memory import trim
from slimllm.statistics import ColumnStatistics, GramStatistics, HeadStatistics, PairedMoments, mean_output


@dataclass(frozen=True)
class PrunedSublayer:
    """What became of a sub-layer.

    Attributes:
        kept: The units that are left, sorted int64 indices.
        importance: Of every unit, as the criterion saw it.
        error_before, error_after: The output's error relative to its variance, without and with the recovery.
        statistics: How they were streamed: `gram` (of the columns), `heads` or `output`.
    """

    kept: torch.Tensor
    importance: list[float]
    error_before: float
    error_after: float
    statistics: str


def prune_sublayer(sublayer: Sublayer, stream: Stream, num_removed: int, run: RunContext) -> PrunedSublayer:
    """Remove units of a sub-layer and let the residual stream pass it.

    Args:
        sublayer: The dense sub-layer; its layer is changed.
        stream: The residual stream before it, afterwards after it.
        num_removed: Units to remove, of every group.
        run: Of the run.
    """
    criterion, recovery, ranks = run.config.criterion, run.config.recovery, stream.ranks
    where = f"the {sublayer.kind} of layer {sublayer.index}"
    way = _way_of(sublayer, run)(sublayer, stream, run)
    statistics = way.collect()
    with run.watch("heads" if sublayer.is_attention else "channels"):

        def select() -> dict[str, Any]:
            with calling(criterion, where):
                chosen = criterion.select(sublayer, statistics.seen_by(criterion), num_removed)
                chosen.check(sublayer.units, sublayer.groups, num_removed)
            return {"kept": chosen.kept.tolist(), "importance": chosen.importance.tolist()}

        found = ranks.made_by_first(select)
        kept = torch.tensor(found["kept"], dtype=torch.int64)
    way.prepare(kept)
    with run.watch("recovery"):
        if recovery.shares_work:
            fit = recovery.fit(sublayer, statistics.seen_by(recovery), kept)
        else:
            with ranks.together(), calling(recovery, where):
                fit = recovery.fit(sublayer, statistics.seen_by(recovery), kept)
                fit = _checked(fit, sublayer, len(kept) * sublayer.width, recovery)
            fit = _of_first(fit, ranks)
        way.apply(kept, fit)
    way.replay(kept, fit)
    return PrunedSublayer(kept, found["importance"], fit.error_before, fit.error_after, way.name)


def _checked(fit: Fit, sublayer: Sublayer, num_columns: int, recovery: Recovery) -> Fit:
    """A fit on the layer's device, as the format that is written has room for it.

    Raises:
        ValueError: something of it has another shape, is not finite, or was not declared.
    """
    (outputs, _), device = sublayer.output_projection.weight.shape, sublayer.layer.device
    change = fit.change or OutputChange()
    if change.delta is not None and Needs.COLUMN_GRAM not in recovery.needs:
        raise ValueError("it changes single weights, for which it has to declare Needs.COLUMN_GRAM.")
    if change.intercept is not None and not recovery.adds_bias:
        raise ValueError("it gives an intercept, for which it has to declare adds_bias = True.")
    shapes = {"intercept": (outputs,), "slope": (outputs,), "delta": (outputs, num_columns)}
    parts: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        value = getattr(change, name)
        if value is not None:
            if value.shape != shape or not bool(value.isfinite().all()):
                raise ValueError(f"{name} must be finite and of shape {shape}, got shape {tuple(value.shape)}.")
            parts[name] = value.to(device, torch.float64)
    if not all(map(math.isfinite, (fit.error_before, fit.error_after))):
        raise ValueError(f"its errors must be finite, got {fit.error_before} and {fit.error_after}.")
    if recovery.adds_bias and "intercept" not in parts:  # the layer has been promised a bias
        parts["intercept"] = torch.zeros(outputs, dtype=torch.float64, device=device)
    return dataclasses.replace(fit, change=OutputChange(**parts) if parts else None)


def _of_first(fit: Fit, ranks: Ranks) -> Fit:
    """The first process's change, which all go on with."""
    if ranks.size == 1 or fit.change is None:
        return fit
    parts = {
        name: ranks.of_first(value)
        for name in ("intercept", "slope", "delta")
        if (value := getattr(fit.change, name)) is not None
    }
    return dataclasses.replace(fit, change=OutputChange(**parts))


def _way_of(sublayer: Sublayer, run: RunContext) -> type[_Way]:
    if not sublayer.is_attention:
        return _ByGram if Needs.COLUMN_GRAM in run.config.needs else _ByOutput
    tokens = -(-len(run.calibration.token_ids) // run.ranks.size) * run.calibration.token_ids.shape[1]
    shape = sublayer.output_projection.weight.shape
    return _ByHeads if streams_heads(run.config, tokens, shape, sublayer.units, sublayer.layer.device) else _ByGram


class _Way(ABC):
    """One way to stream what the methods need.

    Args:
        sublayer: The dense sub-layer.
        stream: The residual stream before it.
        run: Of the run.
    """

    name: ClassVar[str]

    def __init__(self, sublayer: Sublayer, stream: Stream, run: RunContext) -> None:
        self.sublayer, self.stream, self.run, self.watch = sublayer, stream, run, run.watch
        self.activations = InnerActivations(sublayer, stream)
        projection = sublayer.output_projection
        self.weight, self.bias = projection.weight, projection.bias
        self.weighted = run.config.token_weights == "norm"

    @abstractmethod
    def collect(self) -> SublayerStatistics:
        """Stream the activations of all windows."""

    @abstractmethod
    def prepare(self, kept: torch.Tensor) -> None:
        """Stream what is needed once the kept units are known."""

    @abstractmethod
    def apply(self, kept: torch.Tensor, fit: Fit) -> None:
        """Slice the layer, with the change of the recovery."""

    @abstractmethod
    def replay(self, kept: torch.Tensor, fit: Fit) -> None:
        """Let the residual stream pass the sliced sub-layer."""

    def inputs(self) -> ColumnStatistics | None:
        """Of what enters an FFN."""
        return None if self.sublayer.is_attention else ColumnStatistics(len(self.weight), self.sublayer.layer.device)

    def token_weights(self, number: int, output: torch.Tensor) -> torch.Tensor:
        return self.sublayer.token_weights(self.stream[number].hidden.load(), output)


class _ByGram(_Way):
    """By the Gram of the columns."""

    name = "gram"

    def collect(self) -> SublayerStatistics:
        sublayer, watch, ranks = self.sublayer, self.watch, self.stream.ranks
        on_host = not sublayer.is_attention and self.stream.placement.gram == "host"
        gram = GramStatistics(self.weight.shape[1], "cpu" if on_host else sublayer.layer.device)
        inputs = self.inputs()
        for number in range(len(self.stream)):
            with watch("forward"):
                x, inner = self.activations.first(number)
                output = linear(inner, self.weight, self.bias) if self.weighted else None
            with watch("statistics"):
                weights = None if output is None else self.token_weights(number, output)
                if inputs is not None:
                    inputs.update(x.flatten(0, 1), weights)
                gram.update(inner, weights)
        del x, inner, output
        with watch("statistics"):
            ranks.add_up(*(one for one in (inputs, gram) if one is not None))
        weight = self.weight
        statistics = SublayerStatistics(sublayer, gram, inputs, lambda: gram.of_product(weight), _moments_of_gram, ranks)
        if not sublayer.is_attention:
            with watch("channels"):
                statistics.output_covariance()
        return statistics

    def prepare(self, kept: torch.Tensor) -> None:
        trim()  # before what takes most

    def apply(self, kept: torch.Tensor, fit: Fit) -> None:
        self.sublayer.layer.replace(self.sublayer.sliced(kept, fit.change))

    def replay(self, kept: torch.Tensor, fit: Fit) -> None:
        sublayer = self.sublayer
        project, columns = sublayer.output_projection, sublayer.columns_of(kept).to(sublayer.layer.device)
        for number, batch in enumerate(self.stream):
            with self.watch("forward"):
                batch.add(sublayer.residual_update(project(self.activations.again(number, columns))))


def _moments_of_gram(statistics: SublayerStatistics, kept: torch.Tensor) -> OutputMoments:
    sublayer = statistics.sublayer
    weight = sublayer.output_projection.weight
    if sublayer.is_attention:
        means = mean_output(weight, statistics.columns.mean(), sublayer.units)
        return unit_moments(statistics.unit_covariance(effective=False), means, kept)
    return channel_moments(weight, statistics.gram, sublayer.columns_of(kept), statistics.output_covariance())


class _ByHeads(_ByGram):
    """By the covariances of the heads' contributions to the output of attention, from the tokens themselves."""

    name = "heads"

    def collect(self) -> SublayerStatistics:
        heads = HeadStatistics(self.weight, self.sublayer.units)
        for number in range(len(self.stream)):
            with self.watch("forward"):
                _, inner = self.activations.first(number)
            with self.watch("statistics"):
                heads.update(inner)
        del inner
        with self.watch("statistics"):
            self.stream.ranks.add_up(heads)
        return SublayerStatistics(self.sublayer, heads, None, None, _moments_of_gram, self.stream.ranks)


class _ByOutput(_Way):
    """By the Gram of an FFN's output, or only its variances, and the moments of the output with what is left of it."""

    name = "output"

    def collect(self) -> SublayerStatistics:
        (hidden_size, num_channels), device = self.weight.shape, self.sublayer.layer.device
        inputs, self.columns = self.inputs(), ColumnStatistics(num_channels, device)
        assert inputs is not None
        kind = GramStatistics if Needs.OUTPUT_GRAM in self.run.config.needs else ColumnStatistics
        self.outputs: GramStatistics | ColumnStatistics = kind(hidden_size, device)
        self.stored: list[Stored] = []  # y of every batch, and later ŷ
        self.weights: list[torch.Tensor | None] = []
        for number in range(len(self.stream)):
            with self.watch("forward"):
                x, inner = self.activations.first(number)
                y = linear(inner, self.weight)
            with self.watch("statistics"):
                output = y if self.bias is None or not self.weighted else y + self.bias
                weights = self.token_weights(number, output) if self.weighted else None
                inputs.update(x.flatten(0, 1), weights)
                self.columns.update(inner, weights)
                self.outputs.update(y, weights)
                self.weights.append(weights)
                self.stored.append(self.stream.store(y))
        del x, inner, y, output
        with self.watch("statistics"):
            self.stream.ranks.add_up(inputs, self.columns, self.outputs)
        covariance = self.outputs.covariance if isinstance(self.outputs, GramStatistics) else None
        self.statistics = SublayerStatistics(self.sublayer, self.columns, inputs, covariance, None, self.stream.ranks)
        return self.statistics

    def prepare(self, kept: torch.Tensor) -> None:
        sublayer, columns = self.sublayer, kept.to(self.sublayer.layer.device)
        projection = sublayer.projection
        self.dense_output = {
            name: tensor for name, tensor in sublayer.layer.tensors.items() if name.startswith(f"{projection}.")
        }
        with self.watch("recovery"):
            sublayer.layer.replace(sublayer.sliced(kept))
            weight = sublayer.output_projection.weight
            paired = PairedMoments(self.outputs.mean(), mean_output(weight, self.columns.mean()[columns])[0])
        for number, stored in enumerate(self.stored):
            with self.watch("forward"):
                y_hat = linear(self.activations.again(number, columns), weight)
            with self.watch("statistics"):
                paired.update(stored.load(), y_hat, self.weights[number])
                stored.save(y_hat)
        with self.watch("recovery"):
            self.stream.ranks.add_up(paired)
            by_gram = isinstance(self.outputs, GramStatistics)
            variance = self.statistics.output_covariance().diagonal() if by_gram else self.outputs.variance()
            moments = OutputMoments(paired.mean_y, paired.mean_y_hat, variance, paired.variance(), paired.covariance())
            self.statistics.give_moments(kept, moments)

    def apply(self, kept: torch.Tensor, fit: Fit) -> None:
        if fit.change is None:
            return
        layer = self.sublayer.layer
        changed = slice_output(self.dense_output, self.sublayer.projection, kept, fit.change)
        layer.replace({**layer.tensors, **changed})

    def replay(self, kept: torch.Tensor, fit: Fit) -> None:
        bias = self.sublayer.output_projection.bias
        slope = fit.change.slope if fit.change else None
        factor = None if slope is None else slope.float()  # in half precision it would be off by as much for all
        for batch, stored in zip(self.stream, self.stored):
            with self.watch("forward"):  # ŷ is made already, but for the factor and the bias
                output = stored.load() if factor is None else stored.load() * factor
                batch.add(self.sublayer.residual_update(output if bias is None else output.add_(bias)))
