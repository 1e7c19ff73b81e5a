"""The layer loop: one dense pass to weigh the layers, one pass that prunes them in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from slimllm.calibration import Calibration
from slimllm.checkpoints.resume import Record
from slimllm.checkpoints.source import ModelSource
from slimllm.config import MEASURED, PruneConfig
from slimllm.errors import InputError
from slimllm.methods.allocation.allocate import Allocation, allocate, find_target
from slimllm.methods.allocation.budget import LayerBudget, LayerShape
from slimllm.methods.allocation.sensitivity import TOKENS, Probes
from slimllm.models.families import LayerSpec
from slimllm.models.layer import Layer, pass_held_out, pass_sublayer
from slimllm.models.meta import record_layer_inputs
from slimllm.models.slicing import LayerSizes
from slimllm.pruning.attention import prune_attention
from slimllm.pruning.dense_pass import DensePass, mean_loss, overflow, run_dense_pass
from slimllm.pruning.ffn import prune_ffn
from slimllm.pruning.memory_estimate import batch_windows
from slimllm.runtime.distributed import Ranks
from slimllm.runtime.hidden_states import Batch, Placement, Stream
from slimllm.runtime.memory import peak_host_gib, trim
from slimllm.runtime.progress import ProgressCallback, Stopwatch


@dataclass
class Outcome:
    """What the loop found: the dense pass, the allocation, and a report for each layer."""

    dense: DensePass
    allocation: Allocation
    layers: list[dict[str, Any]] = field(default_factory=list)
    loss_dense: float = 0.0
    loss_pruned: float = 0.0


@torch.no_grad()
def prune_layers(
    source: ModelSource,
    calibration: Calibration,
    config: PruneConfig,
    placement: Placement,
    watch: Stopwatch,
    on_allocation: Callable[[Allocation], None],
    store: Callable[[int, Layer], int],
    progress: ProgressCallback | None = None,
    record: Record | None = None,
    dense: DensePass | None = None,
    ranks: Ranks | None = None,
) -> Outcome:
    """Prune the decoder layers of a model, in order, each on the activations of the already pruned model before it.

    Args:
        source: The model.
        calibration: The windows of all ranks, and those held out of the statistics.
        config: The settings.
        placement: Where what is as large as all tokens lives.
        watch: Gathers seconds by stage.
        on_allocation: Told how much every layer will give, before the first one is touched.
        store: Takes every finished layer, in order, and says how many parameters it has.
        progress: Told about every layer that is done.
        record: Of every layer that is done; the loop goes on behind those that it holds.
        dense: The dense pass, if it has been made: one that `serves` the settings.
        ranks: The processes that share the windows; None: this one alone.
    """
    ranks = ranks or Ranks()
    sizes = source.sizes()
    shapes = [_shape(source, size, config) for size in sizes]
    if dense is None:
        stream = _stream(source, calibration, config, placement, watch, ranks)
        probes = _probes(source, stream, config) if config.allocation == "auto" and ranks.first else None
        dense = run_dense_pass(source, stream, calibration, shapes, config, watch, progress, record, probes)
        trim()
    elif record:
        weights = [layer["weights"] for layer in dense.layers]
        record.compare_weights(weights.__getitem__)
        adopted = dense.layers[len(record.done("dense")) :]
        record.adopt("dense", adopted, {**watch.so_far(), "dense_pass_s": dense.seconds})
    similarity = [layer["similarity"] for layer in dense.layers]
    curves = dense.curves() if config.allocation in MEASURED else None
    allocation = allocate(similarity, shapes, config, curves)
    on_allocation(allocation)
    outcome = Outcome(dense, allocation)

    stream = _stream(source, calibration, config, placement, watch, ranks, with_dense=config.dense_target > 0)
    if record and record.done("prune"):
        outcome.layers = [step["report"] for step in record.done("prune")]
        record.restore(stream)
    first = len(outcome.layers)
    with source.layers(first, placement.read_ahead) as load:
        for index in range(first, source.num_layers):
            start = time.perf_counter()
            with watch("read"), ranks.together():
                layer = load(index)
            report = _prune_layer(layer, stream, index, allocation.budgets[index], config, watch)
            finite = pass_held_out(layer, stream, index, watch)
            with ranks.together():
                if not (finite and all(bool(batch.hidden.load().isfinite().all()) for batch in stream)):
                    raise overflow(source, index, "pruned")
            with watch("write"), ranks.together():
                parameters_after = store(index, layer)
            del layer  # before the next one is read
            report |= {
                "parameters_before": sizes[index].params,
                "parameters_after": parameters_after,
                "similarity": similarity[index],
                "elapsed_s": time.perf_counter() - start,
                "peak_host_gib": peak_host_gib(),
            }
            outcome.layers.append(report)
            if record:
                with watch("journal"):
                    record.add("prune", stream, report=report, **watch.so_far())
            if progress:
                progress("prune", index, source.num_layers, report)
    with watch("perplexity"):
        outcome.loss_dense, outcome.loss_pruned = dense.loss, mean_loss(source, stream, calibration)
        del stream
        trim()
    return outcome


def check_settings(source: ModelSource, config: PruneConfig) -> None:
    """Whether a model can give so much, in the way that is asked for, which can be seen before the dense pass.

    Raises:
        ValueError: (as InputError) it cannot.
    """
    check_for_family(source.spec, config)
    find_target([_shape(source, size, config) for size in source.sizes()], config)


def check_for_family(spec: LayerSpec, config: PruneConfig) -> None:
    """Whether what is asked for can be done in a family.

    Raises:
        ValueError: (as InputError) it cannot.
    """
    if config.dense_target and (spec.attention_post_norm or spec.ffn_post_norm):
        raise InputError(
            "dense_target is for models that add a sub-layer's output to the residual stream as it is; "
            f"{spec.family} has a norm between the two; leave it out."
        )


def _prune_layer(
    layer: Layer, stream: Stream, index: int, budget: LayerBudget, config: PruneConfig, watch: Stopwatch
) -> dict[str, Any]:
    sizes = layer.sizes()
    report: dict[str, Any] = {
        "index": index,
        "ratio": budget.ratio,
        "num_heads_before": sizes.num_heads,
        "num_kv_heads_before": sizes.num_kv_heads,
        "intermediate_size_before": sizes.intermediate_size,
    }
    if budget.units:
        report |= prune_attention(layer, stream, index, budget, config, watch)
    else:
        pass_sublayer(layer, layer.spec.o_proj, stream, index, watch)
    if budget.channels:
        report |= prune_ffn(layer, stream, index, budget, config, watch)
    else:
        pass_sublayer(layer, layer.spec.down_proj, stream, index, watch)
    sizes = layer.sizes()
    return {
        "kept_heads": list(range(sizes.num_heads)),
        "kept_kv_heads": list(range(sizes.num_kv_heads)),
        "kept_channels": list(range(sizes.intermediate_size)),
        **report,
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "intermediate_size": sizes.intermediate_size,
    }


def _stream(
    source: ModelSource, calibration: Calibration, config: PruneConfig, placement: Placement, watch: Stopwatch,
    ranks: Ranks, with_dense: bool = False,
) -> Stream:  # fmt: skip
    """The residual stream before the first layer, in batches of windows, and how each layer is called on it."""
    (samples, seq_len), held_out = calibration.token_ids.shape, len(calibration.held_out)
    stream = Stream(samples, batch_windows(samples, seq_len, config.batch_size), placement, ranks, held_out)
    with watch("read"), ranks.together():
        embed = source.embedder()

        def batch_of(own: torch.Tensor, with_dense: bool) -> Batch:
            hidden, kwargs = record_layer_inputs(source.model, source.spec, embed(own))
            if stream.batches and hidden.shape == stream[0].hidden.shape:
                kwargs = stream[0].kwargs  # they depend on the shape of a batch alone, and masks are large
            dense = stream.store(hidden.clone()) if with_dense else None
            return Batch(stream.store(hidden), kwargs, dense)

        for windows in stream.windows(ranks.rank):
            stream.batches.append(batch_of(calibration.token_ids[windows.start : windows.stop], with_dense))
        for windows in stream.held_out_windows(ranks.rank):
            own = calibration.held_out[windows.start - samples : windows.stop - samples]
            stream.held_out.append(batch_of(own, False))
    return stream


def _probes(source: ModelSource, stream: Stream, config: PruneConfig) -> Probes:
    """On the first tokens of the first window, of which the first rank has the stream."""
    window = stream[0].hidden.load()[:1, :TOKENS].float()
    return Probes(window, record_layer_inputs(source.model, source.spec, window)[1], config)


def _shape(source: ModelSource, size: LayerSizes, config: PruneConfig) -> LayerShape:
    hidden_size: int = source.config.hidden_size
    query_params = source.head_dim * (2 * hidden_size + size.qkv_bias)  # rows of q_proj and columns of o_proj
    kv_params = 2 * source.head_dim * (hidden_size + size.qkv_bias)
    units, groups = size.units(config.head_unit)
    by_group = size.by_group(config.head_unit)
    new_bias = hidden_size if config.recovery != "none" else 0
    return LayerShape(
        units=units // groups,
        unit_params=size.group_size * query_params + kv_params if by_group else groups * query_params,
        channels=size.intermediate_size,
        channel_params=hidden_size + (1 + size.gated) * (hidden_size + size.gate_bias),
        params=size.params,
        attention_bias_params=0 if size.attention_out_bias else new_bias,
        ffn_bias_params=0 if size.ffn_out_bias else new_bias,
        grouped=size.group_size > 1,
        unit_step=size.unit_step(config.head_unit, config.heads_multiple_of),
    )
