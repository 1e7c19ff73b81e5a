"""Pass of the residual stream through one dense layer, and what is measured there: similarity, curves and statistics."""

from __future__ import annotations

from functools import partial

import torch

from slimllm.config import PruneConfig
from slimllm.methods.allocation import DenseSublayer
from slimllm.methods.allocation.removal import LayerShape
from slimllm.methods.allocation.spending import Curves, sampled
from slimllm.methods.statistics import Needs
from slimllm.models.layer import Layer, run_layer
from slimllm.models.mixture import route
from slimllm.models.sublayer import Sublayer
from slimllm.plugins import calling
from slimllm.pruning.context import RunContext
from slimllm.pruning.dense_statistics import DenseStatistics, packed
from slimllm.pruning.experts import ExpertStatistics
from slimllm.pruning.streaming import empty_gram
from slimllm.runtime.hidden_states import Batch, Stream
from slimllm.runtime.memory import trim
from slimllm.statistics import ColumnStatistics, GramStatistics
from slimllm.statistics.tokens import layer_similarity


def pass_layer(layer: Layer, stream: Stream, index: int, run: RunContext) -> torch.Tensor:
    """Pass the residual stream through a dense layer, and return its similarity, summed over all tokens."""
    total = torch.zeros((), dtype=torch.float64, device=layer.device)
    for batch in stream:
        hidden_in = batch.hidden.load()
        with run.watch("dense pass"):
            hidden_out = run_layer(layer, hidden_in, batch.kwargs[index])
        with run.watch("statistics"):
            total += layer_similarity(hidden_in, hidden_out)
            batch.hidden.save(hidden_out)
    stream.ranks.sum_(total)
    return total


def measure_layer(
    layer: Layer, stream: Stream, index: int, shape: LayerShape, run: RunContext
) -> tuple[torch.Tensor, Curves | None, list[DenseStatistics] | None]:
    """Pass the residual stream through a dense layer and collect statistics.

    Returns:
        Its similarity, summed over all tokens; its curves, if the allocation needs them; and its statistics, if the run
        makes one pass. The latter two are None if the stream is not finite any more.
    """
    config, watch, ranks = run.config, run.watch, stream.ranks
    bias = config.bias != "no"
    parts = (
        _Part(Sublayer.attention_of(layer, index, config.head_unit, config.seed, bias), stream, run),
        _Part(Sublayer.ffn_of(layer, index, config.seed, bias), stream, run),
    )
    similarity = torch.zeros((), dtype=torch.float64, device=layer.device)
    for batch in stream:
        hidden_in = hidden = batch.hidden.load()
        for part in parts:
            hidden = part.passed(hidden, batch)
        with watch("statistics"):
            similarity += layer_similarity(hidden_in, hidden)
            batch.hidden.save(hidden)
    del hidden_in, hidden
    with watch("statistics"):
        for part in parts:
            part.add_up()
        ranks.sum_(similarity)
        if not bool(similarity.isfinite()):
            return similarity, None, None
        found = [part.packed() for part in parts] if config.one_pass else None
    if config.allocation.needs is None:
        return similarity, None, found
    with watch("allocation"):
        make = ranks.made_together if config.allocation.shares_work else ranks.made_by_first
        curves = Curves(*(make(partial(part.curve, shape)) for part in parts))
    del parts
    if _needs(config) & Needs.COLUMN_GRAM:
        trim()
    return similarity, curves, found


def _needs(config: PruneConfig) -> Needs:
    return config.allocation.needs or Needs.COLUMNS


class _Part:
    """A dense sub-layer, and its statistics while the stream passes.

    Attributes:
        columns: Statistics of the columns of its output projection, or of those of every expert.
        inputs: Statistics of an FFN's inputs, for a run with one pass.
        square: Mean square of the stream after the sub-layer, summed over all tokens.
    """

    def __init__(self, sublayer: Sublayer, stream: Stream, run: RunContext) -> None:
        self.sublayer, self.run, self.ranks = sublayer, run, stream.ranks
        layer, config = sublayer.layer, run.config
        self.weighted = config.token_weights == "norm"
        self.columns: ColumnStatistics | GramStatistics | ExpertStatistics
        if sublayer.experts:
            with self.ranks.together():  # the disk can be full
                self.columns = ExpertStatistics(sublayer, stream.placement, self.weighted)
        elif Needs.COLUMN_GRAM in _needs(config):
            with self.ranks.together():
                self.columns = empty_gram(sublayer, stream.placement)
        else:
            self.columns = ColumnStatistics(sublayer.output_projection.in_features, layer.device)
        hidden_size = layer.linear(layer.spec.o_proj).out_features
        one_pass = config.one_pass and not sublayer.is_attention
        self.inputs = ColumnStatistics(hidden_size, layer.device) if one_pass else None
        self.square = torch.zeros((), dtype=torch.float64, device=layer.device)

    def passed(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the stream after the sub-layer, (batch, seq_len, D), and add the batch to the statistics."""
        one, watch = self.sublayer, self.run.watch
        with watch("dense pass"):
            x = one.norm(hidden)
        if isinstance(self.columns, ExpertStatistics):
            with watch("dense pass"):
                tokens = x.flatten(0, 1)
                parts, output = route(one, tokens)
            with watch("statistics"):
                weights = one.token_weights(hidden, output)
                self.columns.update(parts, tokens, weights)
        else:
            with watch("dense pass"):
                inner = one.inner_activations(x, batch.kwargs[one.index])
                output = one.output_projection(inner)
            with watch("statistics"):
                weights = one.token_weights(hidden, output)
                self.columns.update(inner, weights if self.weighted else None)
                if self.inputs is not None:
                    self.inputs.update(x.flatten(0, 1), weights if self.weighted else None)
        with watch("statistics"):
            self.square += weights.reciprocal().sum(dtype=torch.float64)
        with watch("dense pass"):
            return hidden + one.residual_update(output).view_as(hidden)

    def add_up(self) -> None:
        """Add up the statistics of all processes."""
        if isinstance(self.columns, ExpertStatistics):
            self.columns.add_up(self.ranks)
        else:
            self.ranks.add_up(self.columns)
        if self.inputs is not None:
            self.ranks.add_up(self.inputs)
        self.ranks.sum_(self.square)

    def packed(self) -> DenseStatistics:
        """Return the statistics for a run with one pass."""
        assert not isinstance(self.columns, ExpertStatistics)
        return DenseStatistics(packed(self.columns), None if self.inputs is None else packed(self.inputs))

    def curve(self, shape: LayerShape) -> list[float]:
        """Return the loss curve of the sub-layer; all experts of a mixture lose the same number of channels."""
        if not isinstance(self.columns, ExpertStatistics):
            return sampled(self._costs(self.sublayer, self.columns, self.columns.count, shape))
        total = torch.zeros(self.sublayer.units, dtype=torch.float64)
        for number, expert in enumerate(self.sublayer.experts):
            if self.columns.outputs[number].mass > 0:
                total += self._costs(expert, self.columns.gram(number), self.columns.tokens, shape).cpu()
        return sampled(total)

    def _costs(
        self, one: Sublayer, columns: ColumnStatistics | GramStatistics, tokens: int, shape: LayerShape
    ) -> torch.Tensor:
        allocation = self.run.config.allocation
        dense = DenseSublayer(one, columns, tokens, float(self.square), self.weighted, shape, self.ranks)
        with calling(allocation, f"measuring the {one.kind} of layer {one.index}"):
            costs = allocation.costs(dense)
            if costs.shape != (one.units // one.groups,) or not bool(costs.isfinite().all()):
                raise ValueError(
                    f"costs must be {one.units // one.groups} finite numbers, one for each round, got shape "
                    f"{tuple(costs.shape)}."
                )
        return costs
