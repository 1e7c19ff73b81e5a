"""One pass through the dense model: how much every layer matters, and what a later comparison needs of it."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from slimllm.budget import LayerShape
from slimllm.config import MEASURED, PruneConfig
from slimllm.errors import HopelessError, InputError
from slimllm.importance import layer_similarity
from slimllm.journal import fingerprint
from slimllm.layer import Layer, run_layer
from slimllm.measure import measure_layer
from slimllm.parallel import Ranks
from slimllm.progress import ProgressCallback, Stopwatch
from slimllm.record import Record
from slimllm.sensitivity import Probes
from slimllm.source import ModelSource
from slimllm.spending import Curves
from slimllm.states import Placement, Stream

# So many calibration tokens give the perplexity before and after; the output head is too costly to run on all.
PERPLEXITY_TOKENS = 256


@dataclass(frozen=True)
class DensePass:
    """What one pass through the dense model gives, for any number of prunings on the same windows.

    Attributes:
        layers: For each layer its `similarity` c, the mean cosine over tokens of its input with its output, the
            checksum of its `weights`, and, for an allocation that is measured, its `curves`; for `auto`, the `damage` of
            those probes that were made in it, and, of the last layer, the `factors` of all layers' curves.
        final: The last hidden states of the first windows, (perplexity_windows, seq_len, D).
        seconds: Of computing.
        stage_seconds: Of all of the pass, reading and measuring too.
        measured: What the curves depend on; None: there are none.
    """

    layers: list[dict[str, Any]]
    final: torch.Tensor
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
    source: ModelSource, stream: Stream, shapes: list[LayerShape], config: PruneConfig, watch: Stopwatch,
    progress: ProgressCallback | None, record: Record | None, probes: Probes | None = None,
) -> DensePass:  # fmt: skip
    """Let the residual stream pass the dense model, and see how much every layer matters.

    Args:
        source: The model.
        stream: The residual stream before the first layer.
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
    kept = ("similarity", "weights", *(("curves", "damage", "factors") if measured else ()))
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
            with ranks.together():
                if not bool(total.isfinite()):
                    raise overflow(source, index, "dense")
            if config.allocation == "auto":
                found["damage"] = ranks.tell(found.get("damage"))
                if index == source.num_layers - 1:
                    found["factors"] = ranks.made_by_first(partial(_factors, source, probes, watch))
            layers.append({"similarity": float(total) / math.prod(stream.shape[:2]), "weights": 0, **found})
            if record:
                with watch("journal"):
                    layers[-1]["weights"] = _common(fingerprint(layer.tensors), index, ranks)
                    states = probes.states.cpu() if probes else None
                    record.add("dense", stream, states, **layers[-1], **watch.so_far())
            del layer  # before the next one is read
            if progress:
                progress("dense", index, source.num_layers, None)
    seconds = done[-1].get("dense_pass_s", 0.0) if done else 0.0  # of another run's, which was shared
    return DensePass(
        layers,
        perplexity_states(stream),
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
    """The error of hidden states that are not finite behind a layer."""
    return HopelessError(
        f"The hidden states behind layer {index} of the {which} model are not finite when computed in "
        f"{str(source.dtype).removeprefix('torch.')}; compute in float32."
    )


def perplexity_states(stream: Stream) -> torch.Tensor:
    """A copy of the hidden states of the first windows, (perplexity_windows, seq_len, D), in host memory, on every rank."""
    wanted = min(stream.samples, max(1, PERPLEXITY_TOKENS // stream.shape[1]))
    states = torch.zeros(wanted, *stream.shape[1:], dtype=stream[0].hidden.dtype)
    for windows, batch in zip(stream.windows(stream.ranks.rank), stream):
        if windows.start < wanted:
            part = states[windows.start : windows.stop]
            part.copy_(batch.hidden.stored()[: len(part)])
    if stream.ranks.size > 1:
        summed = states.float()  # with zeros, which is exact
        stream.ranks.sum_(summed)
        states = summed.to(states.dtype)
    return states


def perplexity_windows(token_ids: torch.Tensor) -> int:
    """How many calibration windows the reported calibration perplexity is of."""
    return min(len(token_ids), max(1, PERPLEXITY_TOKENS // token_ids.shape[1]))
