"""The layer loop: every decoder layer is pruned on the activations of the already pruned model before it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from slimllm.methods.allocation.removal import LayerRemoval
from slimllm.models.layer import Layer
from slimllm.models.sublayer import Sublayer, add_update
from slimllm.pruning.context import RunContext
from slimllm.pruning.dense_pass import DensePass
from slimllm.pruning.dense_statistics import DenseStatistics
from slimllm.pruning.experts import prune_experts
from slimllm.pruning.layer_report import LayerReport, PrunedParts, layer_report
from slimllm.pruning.residual_stream import evaluation_context, mean_loss, overflow, pass_held_out, residual_stream
from slimllm.pruning.sublayer import PrunedSublayer, prune_sublayer
from slimllm.runtime.hidden_states import Stream
from slimllm.runtime.memory import peak_host_gib, trim
from slimllm.runtime.progress import LayerPruned


@dataclass
class PrunedLayer:
    """A layer that has just been pruned.

    Attributes:
        index: Its number.
        layer: The layer with its new tensors. The caller writes or counts them before asking for the next layer.
        parameters: Number of parameters that are written for it; the caller sets this.
    """

    index: int
    layer: Layer
    parameters: int = 0


class Pruning:
    """Iterable that prunes the layers in order.

    Recorded layers of an interrupted run are skipped. A layer is recorded when the next one is asked for.

    Args:
        run: The run's context.
        dense: The dense pass.
        removals: What is removed from every layer.

    Attributes:
        reports: Reports of the layers that are done.
        loss: Loss of the pruned model, see `mean_loss`; 0 until all layers are done.
    """

    def __init__(self, run: RunContext, dense: DensePass, removals: list[LayerRemoval]) -> None:
        self.run, self.dense, self.removals = evaluation_context(run) if run.config.one_pass else run, dense, removals
        self.reports: list[LayerReport] = []
        self.loss = 0.0

    def __iter__(self) -> Iterator[PrunedLayer]:
        layers = self._layers()
        while True:
            with torch.no_grad():  # for the work on a layer, but not for the caller's code
                pruned = next(layers, None)
            if pruned is None:
                return
            yield pruned
            del pruned  # before the next layer is read

    def _layers(self) -> Iterator[PrunedLayer]:
        run, source, watch, ranks, record = self.run, self.run.source, self.run.watch, self.run.ranks, self.run.record
        sizes, stream = source.sizes(), residual_stream(run)
        if record and record.done("prune"):
            self.reports = [step["report"] for step in record.done("prune")]
            record.restore(stream, any_windows=run.config.one_pass)
        first = len(self.reports)
        with source.layers(first, run.placement.read_ahead) as load:
            for index in range(first, source.num_layers):
                start = time.perf_counter()
                with watch("read"), ranks.together():
                    layer = load(index)
                before = layer.sizes()
                heads, channels = self._prune_layer(layer, stream, index)
                finite = pass_held_out(layer, stream, index, watch)
                with ranks.together():
                    all_finite = [batch.hidden.load().isfinite().all() for batch in stream]
                    if not (finite and bool(torch.stack(all_finite).all())):
                        raise overflow(source, index, "pruned")
                pruned = PrunedLayer(index, layer)
                yield pruned
                report = layer_report(
                    PrunedParts(before, layer.sizes(), heads, channels, before.by_group(run.config.head_unit)),
                    index=index,
                    ratio=self.removals[index].ratio,
                    parameters_before=sizes[index].params,
                    parameters_after=pruned.parameters,
                    similarity=self.dense.layers[index].similarity,
                    elapsed_s=time.perf_counter() - start,
                    peak_host_gib=peak_host_gib(),
                )
                del layer, pruned  # before the next one is read
                self.reports.append(report)
                if record:
                    with watch("journal"):
                        record.add("prune", stream, report=report, **watch.so_far())
                if run.progress:
                    run.progress(LayerPruned(index + 1, source.num_layers, report))
        with watch("perplexity"):
            self.loss = mean_loss(source, stream, run.calibration)
            del stream
            trim()

    def _prune_layer(self, layer: Layer, stream: Stream, index: int) -> tuple[PrunedSublayer | None, PrunedSublayer | None]:
        """Prune the attention, then the FFN."""
        config, removal = self.run.config, self.removals[index]
        # A dense pass that another run has made may hold statistics by which this one does not prune.
        of_attention, of_ffn = (config.one_pass and self.dense.layers[index].statistics) or (None, None)
        attention = Sublayer.attention_of(layer, index, config.head_unit, config.seed, config.bias != "no")
        heads = _prune_or_pass(attention, stream, removal.units, self.run, of_attention)
        ffn = Sublayer.ffn_of(layer, index, config.seed, config.bias != "no")
        return heads, _prune_or_pass(ffn, stream, removal.channels, self.run, of_ffn)


def _prune_or_pass(
    sublayer: Sublayer, stream: Stream, num_removed: int, run: RunContext, dense: DenseStatistics | None
) -> PrunedSublayer | None:
    if num_removed and sublayer.experts:
        return prune_experts(sublayer, stream, num_removed, run)
    if num_removed:
        return prune_sublayer(sublayer, stream, num_removed, run, dense)
    for batch in stream:
        with run.watch("perplexity" if run.config.one_pass else "forward"):
            add_update(batch, sublayer)
    return None
