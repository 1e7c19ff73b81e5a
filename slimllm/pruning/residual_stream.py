"""The residual stream before the first layer, the pass of held-out windows through layers, and the loss at the end."""

from __future__ import annotations

import dataclasses

import torch

from slimllm.calibration import Calibration
from slimllm.checkpoints.source import ModelSource
from slimllm.errors import HopelessError, InputError
from slimllm.models.layer import Layer, run_layer
from slimllm.models.meta import record_layer_inputs
from slimllm.pruning.context import RunContext
from slimllm.pruning.memory_estimate import batch_windows
from slimllm.pruning.shapes import dense_windows, tokens_to_fit
from slimllm.runtime.hidden_states import Batch, Stream
from slimllm.runtime.stopwatch import Stopwatch

# Number of calibration tokens for the perplexity before and after, if no windows are held out.
PERPLEXITY_TOKENS = 256


def residual_stream(run: RunContext) -> Stream:
    """Compute the residual stream before the first layer, in batches of windows with the arguments of every layer."""
    source, calibration, ranks = run.source, run.calibration, run.ranks
    (samples, seq_len), held_out = calibration.token_ids.shape, len(calibration.held_out)
    batch_size = batch_windows(max(samples, held_out), seq_len, run.config.batch_size)
    stream = Stream(samples, batch_size, run.placement, ranks, held_out)
    with run.watch("read"), ranks.together():
        embed = source.embedder()

        def batch_of(own: torch.Tensor) -> Batch:
            hidden, kwargs = record_layer_inputs(source.model, source.spec, embed(own))
            if stream.batches and hidden.shape == stream[0].hidden.shape:
                kwargs = stream[0].kwargs  # they depend on the shape of a batch alone, and masks are large
            return Batch(stream.store(hidden), kwargs)

        for windows in stream.windows(ranks.rank):
            stream.batches.append(batch_of(calibration.token_ids[windows.start : windows.stop]))
        for windows in stream.held_out_windows(ranks.rank):
            own = calibration.held_out[windows.start - samples : windows.stop - samples]
            stream.held_out.append(batch_of(own))
    return stream


def pass_held_out(layer: Layer, stream: Stream, index: int, watch: Stopwatch) -> bool:
    """Run a whole layer, dense or pruned, on the held-out windows, in place.

    Args:
        layer: The layer, dense or pruned.
        stream: The stream; its held-out batches, (windows, seq_len, D), are replaced by the layer's outputs.
        index: The layer's number, for its arguments.
        watch: The stopwatch, which counts the seconds as `perplexity`.

    Returns:
        Whether all outputs are finite; True on a rank without held-out windows.
    """
    finite = True
    for batch in stream.held_out:
        with watch("perplexity"):
            hidden = run_layer(layer, batch.hidden.load(), batch.kwargs[index])
            batch.hidden.save(hidden)
            finite = finite and bool(hidden.isfinite().all())
    return finite


def overflow(source: ModelSource, index: int, which: str) -> InputError:
    """Make the error for hidden states that are not finite after a layer."""
    dtype = str(source.dtype).removeprefix("torch.")
    advice = "compute in float32" if dtype != "float32" else "its weights are out of all proportion, check them"
    return HopelessError(
        f"The hidden states after layer {index} of the {which} model are not finite when computed in {dtype}; {advice}."
    )


def mean_loss(source: ModelSource, stream: Stream, calibration: Calibration) -> float:
    """Compute the next-token negative log-likelihood of the `perplexity_windows`, in nats, from the end of the stream.

    All ranks call this, and all get the result.
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


def num_windows(run: RunContext) -> int:
    """Return how many calibration windows, from the first on, the dense pass takes: as many as the allocation needs.

    There is at least one for each rank, and the windows of the perplexity are among them if none are held out.
    """
    judged_by = 0 if len(run.calibration.held_out) else len(perplexity_windows(run.calibration))
    tokens = tokens_to_fit(run.source.sizes(), run.source.config)
    enough = dense_windows(run.config, tokens, *run.calibration.token_ids.shape)
    return min(len(run.calibration.token_ids), max(enough, run.ranks.size, judged_by))


def evaluation_context(run: RunContext) -> RunContext:
    """Return the context of a run with only the windows that judge its result, and at least one for each rank."""
    calibration, held_out = run.calibration, len(run.calibration.held_out)
    needed = max(run.ranks.size, 0 if held_out else len(perplexity_windows(calibration)))
    return dataclasses.replace(run, calibration=dataclasses.replace(calibration, token_ids=calibration.token_ids[:needed]))


def perplexity_windows(calibration: Calibration) -> torch.Tensor:
    """Return the windows of the reported perplexity, (windows, seq_len) int64: those held out, or else the first ones."""
    if len(calibration.held_out):
        return calibration.held_out
    return calibration.token_ids[: max(1, PERPLEXITY_TOKENS // calibration.token_ids.shape[1])]
