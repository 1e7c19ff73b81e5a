"""Pruning of the FFN: whole channels, by their importance in the feature space of the output or another criterion.

What the criterion and the recovery need is streamed in one of two ways. The paper's need only the (D, D) Gram of the output
y (other criteria not even that, but its variances), the norms of the channels and, once the kept channels are known, the
moments of (y, ŷ): N·D² multiply-adds. The regression on all kept channels, and the criterion `obs`, need the (I, I) Gram of
the channels, N·I², of which all else then follows: neither y nor ŷ is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from slimllm import ops
from slimllm.config import PruneConfig
from slimllm.methods.allocation.budget import LayerBudget
from slimllm.methods.criteria.elimination import Surgeon, eliminate_channels
from slimllm.methods.criteria.scores import fluctuation, input_importance, random_scores, squares, wanda
from slimllm.methods.recovery import OutputMoments, channel_moments, mean_output, refit_kept, relative
from slimllm.methods.selection import complement, select_channels
from slimllm.models.layer import InnerActivations, Layer, dense_ahead
from slimllm.models.slicing import OutputChange, slice_ffn, slice_output
from slimllm.runtime.hidden_states import Stored, Stream
from slimllm.runtime.memory import trim
from slimllm.runtime.progress import Stopwatch
from slimllm.statistics import ColumnStatistics, GramStatistics, PairedMoments


def prune_ffn(
    layer: Layer, stream: Stream, index: int, budget: LayerBudget, config: PruneConfig, watch: Stopwatch
) -> dict[str, Any]:
    """Remove FFN channels from a layer and let the residual stream pass its FFN.

    Returns:
        The FFN's part of the layer's report.
    """
    by = _by_channels if config.by_channels else _by_outputs
    kept, importance, before, after = by(layer, stream, index, budget, config, watch)
    return {
        "kept_channels": kept.tolist(),
        "channel_importance": importance.tolist(),
        "ffn_error_before": before,
        "ffn_error_after": after,
    }


_Found = tuple[torch.Tensor, torch.Tensor, float, float]  # kept channels, importance, relative error before and after


def _by_channels(
    layer: Layer, stream: Stream, index: int, budget: LayerBudget, config: PruneConfig, watch: Stopwatch
) -> _Found:
    """From the Gram of the channels: selection, and the regression of what is removed on all that is kept."""
    spec = layer.spec
    weight, bias = layer.linear(spec.down_proj).weight, layer.linear(spec.down_proj).bias
    weighted = config.token_weights == "norm"
    inputs = ColumnStatistics(weight.shape[0], layer.device)
    joint = GramStatistics(
        weight.shape[1] + (weight.shape[0] if config.dense_target else 0),
        "cpu" if stream.placement.gram == "host" else layer.device,
    )
    activations = InnerActivations(layer, spec.down_proj, spec.ffn_norm, stream, index)
    for number, batch in enumerate(stream):
        with watch("forward"):
            x, inner = activations.first(number)
            output = linear(inner, weight, bias) if weighted or config.dense_target else None
            if output is not None and config.dense_target:
                inner = torch.cat([inner, dense_ahead(layer, spec.down_proj, batch, index, output)], 1)
        with watch("statistics"):
            weights = None
            if output is not None and weighted:
                weights = layer.weights(spec.down_proj, batch.hidden.load(), output)
            inputs.update(x.flatten(0, 1), weights)
            joint.update(inner, weights)
    del inner, output
    with watch("statistics"):
        stream.ranks.add_up(inputs, joint)
        channels = joint.leading(weight.shape[1])
    with watch("channels"):
        output_covariance = channels.of_product(weight)
        if config.criterion == "obs":
            found = stream.ranks.made_by_first(
                lambda: eliminate_channels(Surgeon(layer.seen(spec.down_proj), channels), budget.channels).to_lists()
            )
            importance = torch.tensor(found["alone"])
            kept = complement(torch.tensor(found["order"], dtype=torch.int64), len(importance))
        else:
            importance = _importance(layer, inputs, output_covariance, channels, config, index)
            kept = _select(importance, budget, config)
        kept = stream.ranks.of_first(kept)
    trim()  # before what takes most
    with watch("recovery"):
        change: OutputChange | None = None
        if config.recovery == "lstsq":
            refit = refit_kept(weight, joint, kept, stream.ranks, config.dense_target)
            variance, change = output_covariance.diagonal(), refit.change
            before, after = relative(refit.before, variance), relative(refit.after, variance)
        else:
            moments = channel_moments(weight, channels, kept, output_covariance)
            slope, intercept = moments.fit(config.recovery)
            if config.recovery != "none":
                change = OutputChange(intercept, slope)
            before, after = moments.relative_error(*moments.fit("none")), moments.relative_error(slope, intercept)
        layer.replace(slice_ffn(layer.tensors, spec, kept, change))
    project, device_channels = layer.linear(spec.down_proj), kept.to(layer.device)
    for number, batch in enumerate(stream):
        with watch("forward"):
            batch.add(layer.behind(spec.down_proj, project(activations.again(number, device_channels))))
    return kept, importance, before, after


def _by_outputs(
    layer: Layer, stream: Stream, index: int, budget: LayerBudget, config: PruneConfig, watch: Stopwatch
) -> _Found:
    """From the Gram of the output: selection, and the paper's regression of the output on what is left of it."""
    spec = layer.spec
    weight, bias = layer.linear(spec.down_proj).weight, layer.linear(spec.down_proj).bias
    hidden_size, num_channels = weight.shape
    inputs = ColumnStatistics(hidden_size, layer.device)
    channels = ColumnStatistics(num_channels, layer.device)
    outputs: GramStatistics | ColumnStatistics
    outputs = (GramStatistics if config.criterion == "slimllm" else ColumnStatistics)(hidden_size, layer.device)
    activations = InnerActivations(layer, spec.down_proj, spec.ffn_norm, stream, index)
    outputs_of: list[Stored] = []  # y of every batch, and later ŷ
    weights_of: list[torch.Tensor | None] = []
    for number in range(len(stream)):
        with watch("forward"):
            x, inner = activations.first(number)
            y = linear(inner, weight)
        with watch("statistics"):
            weights_of.append(None)
            if config.token_weights == "norm":
                output = y if bias is None else y + bias
                weights_of[-1] = layer.weights(spec.down_proj, stream[number].hidden.load(), output)
            inputs.update(x.flatten(0, 1), weights_of[-1])
            channels.update(inner, weights_of[-1])
            outputs.update(y, weights_of[-1])
            outputs_of.append(stream.store(y))
    del inner
    with watch("statistics"):
        stream.ranks.add_up(inputs, channels, outputs)
    with watch("channels"):
        output_covariance = outputs.covariance() if isinstance(outputs, GramStatistics) else None
        variance = outputs.variance() if output_covariance is None else output_covariance.diagonal()
        importance = _importance(layer, inputs, output_covariance, channels, config, index)
        kept = stream.ranks.of_first(_select(importance, budget, config))
        device_channels = kept.to(layer.device)
    dense_output = {name: tensor for name, tensor in layer.tensors.items() if name.startswith(f"{spec.down_proj}.")}
    with watch("recovery"):
        layer.replace(slice_ffn(layer.tensors, spec, kept))
        kept_weight = layer.linear(spec.down_proj).weight
        paired = PairedMoments(outputs.mean(), mean_output(kept_weight, channels.mean()[device_channels])[0])
    for number, stored in enumerate(outputs_of):
        with watch("forward"):
            y_hat = linear(activations.again(number, device_channels), kept_weight)
        with watch("statistics"):
            paired.update(stored.load(), y_hat, weights_of[number])
            stored.save(y_hat)
    with watch("recovery"):
        stream.ranks.add_up(paired)
        moments = OutputMoments(paired.mean_y, paired.mean_y_hat, variance, paired.variance(), paired.covariance())
        slope, intercept = moments.fit(config.recovery)
        before, after = moments.relative_error(*moments.fit("none")), moments.relative_error(slope, intercept)
        if config.recovery != "none":
            changed = slice_output(dense_output, spec.down_proj, kept, OutputChange(intercept, slope))
            layer.replace({**layer.tensors, **changed})
    bias, factor = layer.linear(spec.down_proj).bias, slope.float()  # in half precision it would be off by as much for all
    for batch, stored in zip(stream, outputs_of):
        with watch("forward"):  # ŷ is made already, but for the factor and the bias
            output = stored.load() * factor
            batch.add(layer.behind(spec.down_proj, output if bias is None else output.add_(bias)))
    return kept, importance, before, after


def _importance(
    layer: Layer, inputs: ColumnStatistics, output_covariance: torch.Tensor | None,
    channels: GramStatistics | ColumnStatistics, config: PruneConfig, index: int,
) -> torch.Tensor:  # fmt: skip
    """Of every channel, (I,) fp64: the paper's I_gate + I_up + I_down, or by another criterion."""
    if config.criterion != "slimllm" or output_covariance is None:
        return channel_scores(layer, channels, config, index)
    spec, input_norms = layer.spec, inputs.norms()
    weight, gain = layer.seen(spec.down_proj), layer.gain(spec.down_proj)
    norms = channels.norms().to(layer.device)
    if gain is not None:
        output_covariance = output_covariance * gain.double()[:, None] * gain.double()
    importance = ops.feature_space_importance(weight, output_covariance, norms, config.feature_space)
    for projection in spec.into_ffn:
        importance += input_importance(layer.linear(projection).weight, input_norms)
    return importance


def channel_scores(
    layer: Layer, channels: GramStatistics | ColumnStatistics, config: PruneConfig, index: int
) -> torch.Tensor:
    """Importance of every channel by the criteria that look at them one by one, (I,) fp64; see `unit_scores`."""
    spec = layer.spec
    weight = layer.seen(spec.down_proj)
    if config.criterion == "random":
        return random_scores(weight.shape[1], config.seed, index, 1)
    if config.criterion == "wanda-sp":
        return wanda(weight, channels.norms().to(weight.device))
    if config.criterion == "flap":
        return fluctuation(weight, channels.variance().to(weight.device))
    return squares(weight.T) + sum(squares(layer.linear(projection).weight) for projection in spec.into_ffn)


def _select(importance: torch.Tensor, budget: LayerBudget, config: PruneConfig) -> torch.Tensor:
    published = 0.01 if config.preset == "paper" and config.criterion == "slimllm" else 0.0
    keep_lowest = published if config.keep_lowest is None else config.keep_lowest
    return select_channels(importance, budget.channels, round(keep_lowest * len(importance)))
