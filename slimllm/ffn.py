"""Pruning of the FFN: whole channels by their importance in the feature space of the output, and recovery."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slimllm import ops
from slimllm.allocation import LayerBudget
from slimllm.config import PruneConfig
from slimllm.importance import input_importance
from slimllm.layer import Batch, Layer, inner_activations, inner_activations_fit
from slimllm.progress import Stopwatch
from slimllm.recovery import OutputChange, OutputMoments, least_squares
from slimllm.selection import select_channels
from slimllm.slicing import slice_ffn
from slimllm.statistics import ColumnStatistics, GramStatistics, PairedMoments


def prune_ffn(
    layer: Layer, batches: list[Batch], index: int, budget: LayerBudget, config: PruneConfig, watch: Stopwatch
) -> dict[str, Any]:
    """Remove FFN channels from a layer and let the residual stream pass its FFN.

    The (D, D) Gram of the output y, the norms of the channels and, once the kept channels are known, the moments of
    (y, ŷ) are all that the paper's criterion and recovery need: N·D² multiply-adds instead of the N·I² of the Gram of
    the inner activations.

    Returns:
        The FFN's part of the layer's report.
    """
    spec, sizes = layer.spec, layer.sizes()
    num_channels = sizes.intermediate_size
    norm = layer.module.get_submodule(spec.ffn_norm)
    weight = layer.linear(spec.down_proj).weight
    hidden_size = weight.shape[0]
    inputs = ColumnStatistics(hidden_size, layer.device)
    channels = ColumnStatistics(num_channels, layer.device)
    outputs = GramStatistics(hidden_size, layer.device)
    keep_inner = inner_activations_fit(batches, num_channels)
    kept_inner: list[torch.Tensor] = []
    dense_outputs: list[torch.Tensor] = []
    for batch in batches:
        with watch("forward"):
            x = norm(batch.hidden)
            inner = inner_activations(layer, spec.down_proj, x, None)
            y = nn.functional.linear(inner, weight)
        with watch("statistics"):
            inputs.update(x.flatten(0, 1))
            channels.update(inner)
            outputs.update(y)
        dense_outputs.append(y)
        if keep_inner:
            kept_inner.append(inner)

    with watch("channels"):
        output_covariance = outputs.covariance()
        input_norms = inputs.norms()
        importance = ops.feature_space_importance(weight, output_covariance, channels.norms(), config.feature_space)
        for projection in (spec.gate_proj, spec.up_proj):
            importance += input_importance(layer.linear(projection).weight, input_norms)
        keep_lowest = round(_keep_lowest(config) * num_channels)
        kept_channels = select_channels(importance, budget.channels, keep_lowest)
        device_channels = kept_channels.to(layer.device)

    dense_tensors = layer.tensors
    with watch("recovery"):
        layer.replace(slice_ffn(dense_tensors, spec, kept_channels))
        kept_weight = layer.linear(spec.down_proj).weight
        mean_inner = channels.mean()[device_channels]
        paired = PairedMoments(outputs.mean(), kept_weight.double() @ mean_inner)
        # Of the kept inputs and the output that pruning took away, side by side.
        joint = GramStatistics(len(kept_channels) + hidden_size, layer.device) if config.recovery == "lstsq" else None
        removed = torch.ones(num_channels, dtype=torch.bool, device=layer.device).index_fill_(0, device_channels, False)
        kept_again: list[torch.Tensor | None] = []
    for batch, y in zip(batches, dense_outputs):
        with watch("forward"):
            if keep_inner:
                inner = kept_inner.pop(0)
                kept = inner.index_select(1, device_channels)
            else:
                kept = inner_activations(layer, spec.down_proj, norm(batch.hidden), None)
            y_hat = nn.functional.linear(kept, kept_weight)
        with watch("recovery"):
            paired.update(y, y_hat)
            if joint:
                # In half precision y - ŷ has the rounding of y; what was removed has its own, which is less.
                lost = nn.functional.linear(inner[:, removed], weight[:, removed]) if keep_inner else y - y_hat
                joint.update(torch.cat([kept, lost], 1))
                kept_again.append(kept if keep_inner else None)
            y.copy_(y_hat)

    with watch("recovery"):
        moments = OutputMoments(
            paired.mean_y, paired.mean_y_hat, output_covariance.diagonal(), paired.variance(), paired.covariance()
        )
        before = after = moments.relative_error(torch.ones_like(moments.mean_y), torch.zeros_like(moments.mean_y))
        change = None
        if config.recovery == "affine":
            slope, intercept = moments.affine_fit()
            change, after = OutputChange(intercept, slope), moments.relative_error(slope, intercept)
        elif joint:
            change, after = _least_squares(joint, len(kept_channels), moments)
            del joint
        if change:
            layer.replace(slice_ffn(dense_tensors, spec, kept_channels, change))
    project = layer.linear(spec.down_proj)
    for batch, y_hat in zip(batches, dense_outputs):
        with watch("forward"):
            factor = None if change is None else change.slope
            if change is None or factor is not None:  # ŷ is made already, but for the factor and the bias
                if factor is not None:
                    y_hat *= factor.to(y_hat.dtype)
                batch.tokens.add_(y_hat if project.bias is None else y_hat.add_(project.bias))
            else:
                again = kept_again.pop(0)
                if again is None:
                    again = inner_activations(layer, spec.down_proj, norm(batch.hidden), None)
                batch.tokens.add_(project(again))
    return {
        "kept_channels": kept_channels.tolist(),
        "channel_importance": importance.tolist(),
        "ffn_error_before": before,
        "ffn_error_after": after,
    }


def _least_squares(joint: GramStatistics, num_kept: int, moments: OutputMoments) -> tuple[OutputChange, float]:
    """The full regression of the removed channels' output on the kept inputs of down_proj, and its relative error."""
    covariance, mean = joint.covariance(), joint.mean()
    across, lost = covariance[:num_kept, num_kept:], covariance.diagonal()[num_kept:]
    change, missing = least_squares(covariance[:num_kept, :num_kept], across, lost, mean[:num_kept], mean[num_kept:])
    return change, moments.relative(missing)


def _keep_lowest(config: PruneConfig) -> float:
    if config.keep_lowest is not None:
        return config.keep_lowest
    return 0.01 if config.preset == "paper" else 0.0
