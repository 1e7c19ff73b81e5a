"""One pass through the dense model: how much every layer matters, and what a later comparison needs of it."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from slimllm.calibration import Calibration
from slimllm.checkpoints.journal import fingerprint
from slimllm.checkpoints.resume import Record
from slimllm.checkpoints.source import ModelSource
from slimllm.config import MEASURED, PruneConfig
from slimllm.errors import HopelessError, InputError
from slimllm.methods.allocation.budget import LayerShape
from slimllm.methods.allocation.curves import measure_layer
from slimllm.methods.allocation.sensitivity import Probes
from slimllm.methods.allocation.spending import Curves
from slimllm.models.layer import Layer, pass_held_out, run_layer
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.hidden_states import Placement, Stream
from slimllm.runtime.progress import ProgressCallback, Stopwatch
from slimllm.statistics.tokens import layer_similarity

# Where no windows are held out, so many calibration tokens give the perplexity before and after.
PERPLEXITY_TOKENS = 256


@dataclass(frozen=True)
class DensePass:
    """What one pass through the dense model gives, for any number of prunings on the same windows.

    Attributes:
        layers: For each layer its `similarity` c, the mean cosine over tokens of its input with its output, the
            checksum of its `weights`, and, for an allocation that is measured, its `curves`; for `auto`, the `damage` of
            those probes that were made in it, and, of the last layer, the `loss` of the model and the `factors` of all
            layers' curves.
        loss: Of the dense model, see `mean_loss`.
        seconds: Of computing.
        stage_seconds: Of all of the pass, reading and measuring too.
        measured: What the curves depend on; None: there are none.
    """

    layers: list[dict[str, Any]]
    loss: float
    seconds: float
    stage_seconds: float = 0.0
    measured: tuple[str | None, ...] | None = None

    def serves(self, config: PruneConfig, placement: Placement) -> bool:
        """Whether it has all that a pruning on the same windows needs of it."""
        wanted = _measured(config, placement)
        return wanted is None or wanted == self.measured

    def curves(self) -> list[Curves] | None:
        """What every layer loses, as far as the model's output cares; None: it was not measured."""
        if self.measured is None:
            return None
        factors = self.layers[-1].get("factors") or [[1.0, 1.0]] * len(self.layers)
        return [Curves(**layer["curves"]).times(*factors[index]) for index, layer in enumerate(self.layers)]


def _measured(config: PruneConfig, placement: Placement) -> tuple[str | None, ...] | None:
    if config.allocation not in MEASURED:
        return None
    return config.allocation, config.token_weights, config.head_unit, placement.gram


def run_dense_pass(
    source: ModelSource, stream: Stream, calibration: Calibration, shapes: list[LayerShape], config: PruneConfig,
    watch: Stopwatch, progress: ProgressCallback | None, record: Record | None, probes: Probes | None = None,
) -> DensePass:  # fmt: skip
    """Let the residual stream pass the dense model, and see how much every layer matters.

    Args:
        source: The model.
        stream: The residual stream before the first layer.
        calibration: The windows that it is of.
        shapes: The layers' sizes.
        config: The settings, which say what is measured.
        watch: Gathers seconds by stage.
        progress: Told about every layer that is done.
        record: Of every layer that is done; the pass goes on behind those that it holds.
        probes: Of the first rank, for the allocation `auto`.
    """
    started = time.perf_counter()
    ranks = stream.ranks
    measured = config.allocation in MEASURED
    done = record.done("dense") if record else []
    kept = ("similarity", "weights", "loss", *(("curves", "damage", "factors") if measured else ()))
    layers = [{name: step[name] for name in kept if name in step} for step in done]
    if record and done:
        record.compare_weights(lambda index: fingerprint(source.weights(index)))
        if not record.done("prune"):
            states = record.restore(stream)
            if probes and states is not None:
                probes.restore(states.to(source.device), [one for layer in layers for one in layer["damage"]])
    with source.layers(len(done), stream.placement.read_ahead) as load:
        for index in range(len(done), source.num_layers):
            with watch("read"), ranks.together():
                layer = load(index)
            found: dict[str, Any] = {}
            if probes:
                with watch("sensitivity"):
                    found["damage"] = probes.pass_layer(layer, index)
            if measured:
                total, curves = measure_layer(layer, stream, index, shapes[index], config, watch)
                found["curves"] = dataclasses.asdict(curves)
            else:
                total = _pass_layer(layer, stream, index, watch)
            finite = pass_held_out(layer, stream, index, watch)
            with ranks.together():
                if not (finite and bool(total.isfinite())):
                    raise overflow(source, index, "dense")
            if config.allocation == "auto":
                found["damage"] = ranks.tell(found.get("damage"))
                if index == source.num_layers - 1:
                    found["factors"] = ranks.made_by_first(partial(_factors, source, probes, watch))
            weights = 0
            if record:
                with watch("journal"):
                    weights = _common(fingerprint(layer.tensors), index, ranks)
            del layer  # before the output head or the next one is read
            if index == source.num_layers - 1:
                with watch("perplexity"):
                    found["loss"] = mean_loss(source, stream, calibration)
            layers.append({"similarity": float(total) / math.prod(stream.shape[:2]), "weights": weights, **found})
            if record:
                with watch("journal"):
                    states = probes.states.cpu() if probes else None
                    record.add("dense", stream, states, **layers[-1], **watch.so_far())
            if progress:
                progress("dense", index, source.num_layers, None)
    seconds = done[-1].get("dense_pass_s", 0.0) if done else 0.0  # of another run's, which was shared
    return DensePass(
        layers,
        layers[-1]["loss"],
        seconds or watch.seconds["dense pass"],
        stage_seconds=time.perf_counter() - started,
        measured=_measured(config, stream.placement),
    )


def _pass_layer(layer: Layer, stream: Stream, index: int, watch: Stopwatch) -> torch.Tensor:
    """Let the residual stream pass a dense layer; its similarity, summed over all tokens."""
    total = torch.zeros((), dtype=torch.float64, device=layer.device)
    for batch in stream:
        hidden_in = batch.hidden.load()
        with watch("dense pass"):
            hidden_out = run_layer(layer, hidden_in, batch.kwargs[index])
        with watch("statistics"):
            total += layer_similarity(hidden_in, hidden_out)
            batch.hidden.save(hidden_out)
    stream.ranks.sum_(total)
    return total


def _factors(source: ModelSource, probes: Probes | None, watch: Stopwatch) -> list[list[float]]:
    assert probes is not None
    with watch("sensitivity"):
        return probes.factors(source.final_norm())


def _common(checksum: int, index: int, ranks: Ranks) -> int:
    """The checksum of a layer's weights, which has to be that of all ranks."""
    checksums = ranks.everyone(checksum)
    with ranks.together():
        for rank, other in enumerate(checksums):
            if other != checksums[0]:
                raise InputError(f"Rank {rank} has other weights in layer {index} than rank 0; give all the same model.")
    return checksum


def overflow(source: ModelSource, index: int, which: str) -> InputError:
    """Make the error for hidden states that are not finite after a layer."""
    dtype = str(source.dtype).removeprefix("torch.")
    advice = "compute in float32" if dtype != "float32" else "its weights are out of all proportion, look at them"
    return HopelessError(
        f"The hidden states after layer {index} of the {which} model are not finite when computed in {dtype}; {advice}."
    )


def mean_loss(source: ModelSource, stream: Stream, calibration: Calibration) -> float:
    """Next-token negative log-likelihood, in nats, of the windows of `perplexity_windows`, from the end of the stream.

    All ranks call it, and all have it.
    """
    rank, held_out = stream.ranks.rank, stream.num_held_out
    begin = stream.samples if held_out else 0
    token_ids = perplexity_windows(calibration)
    parts = zip(stream.held_out_windows(rank), stream.held_out) if held_out else zip(stream.windows(rank), stream)
    own = [
        (batch, token_ids[windows.start - begin : windows.stop - begin])
        for windows, batch in parts
        if windows.start - begin < len(token_ids)
    ]
    total = torch.zeros((), dtype=torch.float64)
    with stream.ranks.together():
        if own:
            total += source.loss_sum((batch.hidden.load()[: len(ids)], ids) for batch, ids in own)
    stream.ranks.sum_(total)
    return float(total) / token_ids[:, 1:].numel()


def perplexity_windows(calibration: Calibration) -> torch.Tensor:
    """The windows that the reported perplexity is of, (windows, seq_len) int64: those held out, or else the first ones."""
    if len(calibration.held_out):
        return calibration.held_out
    return calibration.token_ids[: max(1, PERPLEXITY_TOKENS // calibration.token_ids.shape[1])]
