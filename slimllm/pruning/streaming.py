"""Ways to stream the statistics of a sub-layer, and to pass the residual stream through the pruned sub-layer.

There are three ways. If a method needs the Gram of the columns, and in attention, where it is small, all else follows from
it: this takes N·F² multiply-adds, and neither y nor ŷ is stored. Otherwise an FFN needs at most the Gram of its output y,
which takes N·D², and the moments of (y, ŷ) after the kept channels are known. For few tokens, it is less work to compute
the covariances of attention's heads from the tokens themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch.nn.functional import linear

from slimllm.methods.moments import OutputMoments, channel_moments, unit_moments
from slimllm.methods.recovery import Fit
from slimllm.methods.statistics import Needs, SublayerStatistics
from slimllm.models.slicing import slice_output
from slimllm.models.sublayer import InnerActivations, Sublayer
from slimllm.pruning.context import RunContext
from slimllm.pruning.shapes import streams_heads
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.hidden_states import Placement, Stored, Stream
from slimllm.runtime.mapped import GramInFile
from slimllm.runtime.memory import trim
from slimllm.statistics import ColumnStatistics, GramStatistics, HeadStatistics, PairedMoments, mean_output


class Way(ABC):
    """One way to stream the statistics that the methods need.

    Args:
        sublayer: The dense sub-layer.
        stream: The residual stream before it.
        run: The run's context.
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
        """Collect statistics over the activations of all windows."""

    @abstractmethod
    def prepare(self, kept: torch.Tensor) -> None:
        """Stream what is needed after the kept units are known."""

    @abstractmethod
    def apply(self, kept: torch.Tensor, fit: Fit) -> None:
        """Slice the layer and apply the change of the recovery."""

    @abstractmethod
    def replay(self, kept: torch.Tensor, fit: Fit) -> None:
        """Pass the residual stream through the sliced sub-layer."""

    def inputs(self) -> ColumnStatistics | None:
        """Create empty statistics of an FFN's inputs; None for attention."""
        return None if self.sublayer.is_attention else ColumnStatistics(len(self.weight), self.sublayer.layer.device)

    def token_weights(self, number: int, output: torch.Tensor) -> torch.Tensor:
        return self.sublayer.token_weights(self.stream[number].hidden.load(), output)


def empty_gram(sublayer: Sublayer, placement: Placement) -> GramStatistics:
    """Create empty statistics of the inputs of a sub-layer's output projection, where the placement stores them."""
    device, features = sublayer.layer.device, sublayer.output_projection.in_features
    if sublayer.is_attention or placement.gram == "device":
        return GramStatistics(features, device)
    solver = "cpu" if placement.solves_on_host else device
    if placement.gram == "disk":
        return GramInFile(features, solver, placement.folder)
    return GramStatistics(features, "cpu", solver)


class ByGram(Way):
    """Streaming by the Gram of the columns."""

    name = "gram"

    def collect(self) -> SublayerStatistics:
        sublayer, watch, ranks = self.sublayer, self.watch, self.stream.ranks
        with ranks.together():  # the disk can be full
            gram = empty_gram(sublayer, self.stream.placement)
        inputs = self.inputs()
        outputs = ColumnStatistics(len(self.weight), sublayer.layer.device) if self.weighted else None
        for number in range(len(self.stream)):
            with watch("forward"):
                x, inner = self.activations.first(number)
                output = linear(inner, self.weight, self.bias) if self.weighted else None
            with watch("statistics"):
                weights = None if output is None else self.token_weights(number, output)
                if inputs is not None:
                    inputs.update(x.flatten(0, 1), weights)
                if outputs is not None and output is not None:
                    outputs.update(output, weights)
                gram.update(inner, weights)
        del x, inner, output
        with watch("statistics"):
            ranks.add_up(*(one for one in (inputs, outputs, gram) if one is not None))
        return column_statistics(sublayer, gram, inputs, outputs, ranks)

    def prepare(self, kept: torch.Tensor) -> None:
        if not self.sublayer.is_attention:
            trim()  # before the phase that takes most memory

    def apply(self, kept: torch.Tensor, fit: Fit) -> None:
        self.sublayer.layer.replace(self.sublayer.sliced(kept, fit.change))

    def replay(self, kept: torch.Tensor, fit: Fit) -> None:
        sublayer = self.sublayer
        project, columns = sublayer.output_projection, sublayer.columns_of(kept).to(sublayer.layer.device)
        for number, batch in enumerate(self.stream):
            with self.watch("forward"):
                batch.add(sublayer.residual_update(project(self.activations.again(number, columns))))


def column_statistics(
    sublayer: Sublayer,
    gram: GramStatistics,
    inputs: ColumnStatistics | None,
    outputs: ColumnStatistics | None,
    ranks: Ranks,
) -> SublayerStatistics:
    """Return the statistics of a sub-layer as the methods see them; all but those of its inputs follow from the Gram."""
    weight = sublayer.output_projection.weight
    return SublayerStatistics(sublayer, gram, inputs, lambda: gram.of_product(weight), _moments_of_gram, ranks, outputs)


def _moments_of_gram(statistics: SublayerStatistics, kept: torch.Tensor) -> OutputMoments:
    sublayer = statistics.sublayer
    weight = sublayer.output_projection.weight
    if sublayer.is_attention:
        means = mean_output(weight, statistics.columns.mean(), sublayer.units)
        return unit_moments(statistics.unit_covariance(effective=False), means, kept)
    return channel_moments(weight, statistics.gram, sublayer.columns_of(kept), statistics.output_covariance())


class ByHeads(ByGram):
    """Streaming by the covariances of the heads' contributions to attention's output, from the tokens themselves."""

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


class ByOutput(Way):
    """Streaming by the Gram of an FFN's output, or only its variances, and the moments of the dense and pruned output."""

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
        factor = None if slope is None else slope.float()  # in half precision its rounding error would affect all tokens
        for batch, stored in zip(self.stream, self.stored):
            with self.watch("forward"):  # ŷ is stored without the factor and the bias
                output = stored.load() if factor is None else stored.load() * factor
                batch.add(self.sublayer.residual_update(output if bias is None else output.add_(bias)))


def way_of(sublayer: Sublayer, stream: Stream, run: RunContext) -> Way:
    """Choose the way to stream the statistics of a sub-layer for a run's methods; the first process chooses for all."""
    if not sublayer.is_attention:
        way = ByGram if Needs.COLUMN_GRAM in run.config.needs else ByOutput
        return way(sublayer, stream, run)
    windows, seq_len = run.calibration.token_ids.shape
    tokens = (-(-windows // run.ranks.size) * seq_len, len(stream))
    shape, device = sublayer.output_projection.weight.shape, sublayer.layer.device
    by_heads = run.ranks.tell(streams_heads(run.config, tokens, shape, sublayer.units, device))
    return (ByHeads if by_heads else ByGram)(sublayer, stream, run)
