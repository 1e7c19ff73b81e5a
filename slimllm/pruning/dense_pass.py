"""The dense pass, which measures how much every layer matters, and what an allocation needs."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from slimllm.checkpoints.journal import fingerprint
from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.methods.allocation.sensitivity import TOKENS, Probes
from slimllm.methods.allocation.spending import Curves
from slimllm.models.meta import record_layer_inputs
from slimllm.pruning.context import RunContext
from slimllm.pruning.dense_layer import measure_layer, pass_layer
from slimllm.pruning.dense_statistics import DenseStatistics
from slimllm.pruning.residual_stream import mean_loss, num_windows, overflow, pass_held_out, residual_stream
from slimllm.pruning.shapes import layer_shapes
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.hidden_states import Placement, Stream
from slimllm.runtime.memory import trim
from slimllm.runtime.progress import LayerMeasured


@dataclass(frozen=True)
class DenseLayer:
    """Results of the dense pass for one layer.

    Attributes:
        similarity: c, the mean cosine over tokens of its input with its output.
        weights: Checksum of its weights; 0 if nothing is recorded.
        curves: Loss curves of its sub-layers; None: the allocation does not measure them.
        damage: Damage of the probes that were made in it, for an allocation by sensitivity.
        statistics: Those of its attention and of its FFN; None: the run makes another pass (`PruneConfig.one_pass`).
    """

    similarity: float
    weights: int
    curves: Curves | None = None
    damage: list[float] = field(default_factory=list)
    statistics: list[DenseStatistics] | None = None


@dataclass(frozen=True)
class DensePass:
    """Results of one pass through the dense model, for any number of prunings on the same windows.

    Attributes:
        layers: Results for every layer.
        loss: Loss of the dense model, see `mean_loss`.
        factors: Factors of every layer's curves, for attention and for the FFN; None: there are none.
        seconds: Computing time of the decoder layers on all windows. It is extrapolated if fewer were measured.
        stage_seconds: Time of the whole pass, with reading and measuring.
        measured: Settings on which curves and statistics depend; None: there are neither.
        windows: Number of calibration windows that were measured.
    """

    layers: list[DenseLayer]
    loss: float
    factors: list[list[float]] | None
    seconds: float
    stage_seconds: float = 0.0
    measured: tuple[str | None, ...] | None = None
    windows: int = 0

    def serves(self, run: RunContext) -> bool:
        """Return whether another pruning on the same windows can use this pass."""
        wanted = _measured(run.config, run.placement)
        if self.windows != num_windows(run) or (wanted and not self.measured):
            return False
        if not wanted or not self.measured:
            return True
        return (
            all(one in (None, other) for one, other in zip(wanted[:2], self.measured)) and wanted[2:] == self.measured[2:]
        )

    @property
    def similarity(self) -> list[float]:
        """c of every layer."""
        return [layer.similarity for layer in self.layers]

    def curves(self) -> list[Curves] | None:
        """Return the loss curves of every layer, weighted by output sensitivity; None: they were not measured."""
        if self.measured is None:
            return None
        factors = self.factors or [[1.0, 1.0]] * len(self.layers)
        return [layer.curves.times(*own) for layer, own in zip(self.layers, factors) if layer.curves is not None]


def _measures(config: PruneConfig) -> bool:
    """Return whether the dense pass collects statistics."""
    return config.allocation.needs is not None or config.one_pass


def _measured(config: PruneConfig, placement: Placement) -> tuple[str | None, ...] | None:
    if not _measures(config):
        return None
    allocation, one_pass = config.allocation, "one pass" if config.one_pass else None
    settings = (
        None if allocation.needs is None else f"{allocation.code()} {allocation.describe()} {config.seed} {config.bias}"
    )
    return settings, one_pass, config.token_weights, config.head_unit, placement.gram, placement.systems


@torch.no_grad()
def run_dense_pass(run: RunContext) -> DensePass:
    """Pass the residual stream through the dense model, and measure how much every layer matters."""
    started = time.perf_counter()
    samples, windows = len(run.calibration.token_ids), num_windows(run)
    few = dataclasses.replace(run.calibration, token_ids=run.calibration.token_ids[:windows])
    run = dataclasses.replace(run, calibration=few)
    source, config, watch, ranks, record = run.source, run.config, run.watch, run.ranks, run.record
    allocation, shapes = config.allocation, layer_shapes(run.source, run.config)
    stream = residual_stream(run)
    probes = _probes(run, stream) if allocation.by_sensitivity and ranks.first else None
    done = record.done("dense") if record else []
    layers = [_recorded(step) for step in done]
    last: dict[str, Any] = {name: done[-1][name] for name in ("loss", "factors") if done and name in done[-1]}
    if record and done:
        record.compare_weights(lambda index: fingerprint(source.weights(index)))
        if not record.done("prune"):
            states = record.restore(stream)
            if probes and states is not None:
                probes.restore(states.to(source.device), [one for layer in layers for one in layer.damage])
    with source.layers(len(done), stream.placement.read_ahead) as load:
        for index in range(len(done), source.num_layers):
            with watch("read"), ranks.together():
                layer = load(index)
            damage: list[float] = []
            if probes:
                with watch("sensitivity"):
                    damage = probes.pass_layer(layer, index)
            if _measures(config):
                total, curves, statistics = measure_layer(layer, stream, index, shapes[index], run)
            else:
                total, curves, statistics = pass_layer(layer, stream, index, run), None, None
            finite = pass_held_out(layer, stream, index, watch)
            with ranks.together():
                if not (finite and bool(total.isfinite())):
                    raise overflow(source, index, "dense")
            is_last = index == source.num_layers - 1
            if allocation.by_sensitivity:
                damage = ranks.tell(damage)
                if is_last:
                    last["factors"] = ranks.made_by_first(partial(_factors, run, probes))
            weights = 0
            if record:
                with watch("journal"):
                    weights = _common(fingerprint(layer.tensors), index, ranks)
            del layer  # before the output head or the next one is read
            if is_last:
                with watch("perplexity"):
                    last["loss"] = mean_loss(source, stream, run.calibration)
            layers.append(DenseLayer(float(total) / math.prod(stream.shape[:2]), weights, curves, damage, statistics))
            if record:
                with watch("journal"):
                    states = probes.states.cpu() if probes else None
                    record.add("dense", stream, states, **dataclasses.asdict(layers[-1]), **last, **watch.so_far())
            if run.progress:
                run.progress(LayerMeasured(index + 1, source.num_layers))
    del stream
    trim()
    seconds = done[-1].get("dense_pass_s", 0.0) if done else 0.0  # from the dense pass of another run, which was shared
    return DensePass(
        layers,
        last["loss"],
        last.get("factors"),
        seconds or watch.seconds["dense pass"] * samples / windows,
        stage_seconds=time.perf_counter() - started,
        measured=_measured(config, run.placement),
        windows=windows,
    )


def steps_of(dense: DensePass, config: PruneConfig) -> list[dict[str, Any]]:
    """Return the journal's steps of a run with these settings for a dense pass that another run has made."""
    steps = [dataclasses.asdict(layer) for layer in dense.layers]
    for step in steps if not config.one_pass else []:
        step["statistics"] = None
    steps[-1] |= {"loss": dense.loss, "factors": dense.factors}
    return steps


def _recorded(step: dict[str, Any]) -> DenseLayer:
    curves = Curves(**step["curves"]) if step["curves"] else None
    statistics = step.get("statistics") and [DenseStatistics(**of_part) for of_part in step["statistics"]]
    return DenseLayer(step["similarity"], step["weights"], curves, step["damage"], statistics)


def _probes(run: RunContext, stream: Stream) -> Probes:
    """Create probes on the first tokens of the first window, whose stream is on the first rank."""
    window = stream[0].hidden.load()[:1, :TOKENS].float()
    return Probes(window, record_layer_inputs(run.source.model, run.source.spec, window)[1], run.config)


def _factors(run: RunContext, probes: Probes | None) -> list[list[float]]:
    assert probes is not None
    with run.watch("sensitivity"):
        return probes.factors(run.source.final_norm())


def _common(checksum: int, index: int, ranks: Ranks) -> int:
    """Return the checksum of a layer's weights after checking that it is the same on all ranks."""
    checksums = ranks.everyone(checksum)
    with ranks.together():
        for rank, other in enumerate(checksums):
            if other != checksums[0]:
                raise InputError(f"Rank {rank} has other weights in layer {index} than rank 0; give all ranks one model.")
    return checksum
