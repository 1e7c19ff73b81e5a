"""Pruning of attention: whole heads by the Pearson similarity of the output, and recovery."""

from __future__ import annotations

from typing import Any

import torch

from slimllm import ops
from slimllm.allocation import LayerBudget
from slimllm.config import PruneConfig
from slimllm.importance import token_weights
from slimllm.layer import InnerActivations, Layer
from slimllm.progress import Stopwatch
from slimllm.recovery import OutputChange, head_moments, mean_output, refit_kept, relative
from slimllm.selection import head_columns
from slimllm.slicing import slice_attention
from slimllm.states import Stream
from slimllm.statistics import GramStatistics


def prune_attention(
    layer: Layer, stream: Stream, index: int, budget: LayerBudget, config: PruneConfig, watch: Stopwatch
) -> dict[str, Any]:
    """Remove heads from a layer and let the residual stream pass its attention.

    Returns:
        The attention's part of the layer's report.
    """
    spec, sizes = layer.spec, layer.sizes()
    statistics = GramStatistics(sizes.num_heads * layer.head_dim, layer.device)
    activations = InnerActivations(layer, spec.o_proj, spec.attention_norm, stream, index)
    dense = layer.linear(spec.o_proj)
    for number, batch in enumerate(stream):
        with watch("forward"):
            _, inner = activations.first(number)
        with watch("statistics"):
            weights = token_weights(batch.hidden.load(), dense(inner)) if config.token_weights == "norm" else None
            statistics.update(inner, weights)
    del inner, dense
    with watch("statistics"):
        stream.ranks.add_up(statistics)

    with watch("heads"):
        weight = layer.linear(spec.o_proj).weight
        by_group = sizes.by_group(config.head_unit)
        units = sizes.num_kv_heads if by_group else sizes.num_heads
        covariance = ops.head_covariance(weight, statistics.covariance(), units)
        if by_group:
            kept_units = stream.ranks.of_first(ops.pearson_greedy(covariance, budget.units)).cpu()
            kv_heads = kept_units
            heads = head_columns(kept_units, sizes.group_size)
        else:
            removed = budget.units * sizes.num_kv_heads
            kept_units = stream.ranks.of_first(ops.pearson_greedy(covariance, removed, sizes.group_size)).cpu()
            heads, kv_heads = kept_units, torch.arange(sizes.num_kv_heads)
        columns = head_columns(heads, layer.head_dim)

    with watch("recovery"):
        moments = head_moments(covariance, mean_output(weight, statistics.mean(), units), kept_units)
        before = after = moments.relative_error(torch.ones_like(moments.mean_y), torch.zeros_like(moments.mean_y))
        change = None
        if config.recovery == "affine":
            slope, intercept = moments.affine_fit()
            change, after = OutputChange(intercept, slope), moments.relative_error(slope, intercept)
        elif config.recovery == "lstsq":
            refit = refit_kept(weight, statistics, columns, stream.ranks)
            change, after = refit.change, relative(refit.after, moments.variance_y)
        layer.replace(slice_attention(layer.tensors, spec, columns, head_columns(kv_heads, layer.head_dim), change))

    project = layer.linear(spec.o_proj)
    device_columns = columns.to(layer.device)
    for number, batch in enumerate(stream):
        with watch("forward"):
            batch.add(project(activations.again(number, device_columns)))
    return {
        "kept_heads": heads.tolist(),
        "kept_kv_heads": kv_heads.tolist(),
        "head_importance": ops.head_importance(covariance).tolist(),
        "attention_error_before": before,
        "attention_error_after": after,
    }
