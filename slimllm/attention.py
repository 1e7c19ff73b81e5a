"""Pruning of attention: whole heads by the Pearson similarity of the output, and recovery."""

from __future__ import annotations

from typing import Any

import torch

from slimllm import ops
from slimllm.allocation import LayerBudget
from slimllm.config import PruneConfig
from slimllm.layer import Batch, Layer, inner_activations, inner_activations_fit
from slimllm.progress import Stopwatch
from slimllm.recovery import OutputChange, OutputMoments, head_moments, least_squares
from slimllm.selection import head_columns
from slimllm.slicing import slice_attention
from slimllm.statistics import GramStatistics


def prune_attention(
    layer: Layer, batches: list[Batch], index: int, budget: LayerBudget, config: PruneConfig, watch: Stopwatch
) -> dict[str, Any]:
    """Remove heads from a layer and let the residual stream pass its attention.

    Returns:
        The attention's part of the layer's report.
    """
    spec, sizes = layer.spec, layer.sizes()
    norm = layer.module.get_submodule(spec.attention_norm)
    statistics = GramStatistics(sizes.num_heads * layer.head_dim, layer.device)
    keep_inner = inner_activations_fit(batches, sizes.num_heads * layer.head_dim)
    kept_inner: list[torch.Tensor] = []
    for batch in batches:
        with watch("forward"):
            inner = inner_activations(layer, spec.o_proj, norm(batch.hidden), batch.kwargs[index])
        with watch("statistics"):
            statistics.update(inner)
        if keep_inner:
            kept_inner.append(inner)

    with watch("heads"):
        weight = layer.linear(spec.o_proj).weight
        by_group = sizes.by_group(config.head_unit)
        units = sizes.num_kv_heads if by_group else sizes.num_heads
        covariance = ops.head_covariance(weight, statistics.covariance(), units)
        if by_group:
            kept_units = ops.pearson_greedy(covariance, budget.units).cpu()
            kv_heads = kept_units
            heads = head_columns(kept_units, sizes.group_size)
        else:
            kept_units = ops.pearson_greedy(covariance, budget.units * sizes.num_kv_heads, sizes.group_size).cpu()
            heads, kv_heads = kept_units, torch.arange(sizes.num_kv_heads)
        columns = head_columns(heads, layer.head_dim)

    with watch("recovery"):
        by_unit = weight.double().view(weight.shape[0], units, -1) * statistics.mean().view(units, -1)
        moments = head_moments(covariance, by_unit.sum(-1).T, kept_units)
        before = after = moments.relative_error(torch.ones_like(moments.mean_y), torch.zeros_like(moments.mean_y))
        change = None
        if config.recovery == "affine":
            slope, intercept = moments.affine_fit()
            change, after = OutputChange(intercept, slope), moments.relative_error(slope, intercept)
        elif config.recovery == "lstsq":
            change, after = _least_squares(weight, statistics, columns, moments)
        layer.replace(slice_attention(layer.tensors, spec, columns, head_columns(kv_heads, layer.head_dim), change))

    project = layer.linear(spec.o_proj)
    device_columns = columns.to(layer.device)
    for batch in batches:
        with watch("forward"):
            if keep_inner:
                kept = kept_inner.pop(0).index_select(1, device_columns)
            else:
                kept = inner_activations(layer, spec.o_proj, norm(batch.hidden), batch.kwargs[index])
            batch.tokens.add_(project(kept))
    return {
        "kept_heads": heads.tolist(),
        "kept_kv_heads": kv_heads.tolist(),
        "head_importance": ops.head_importance(covariance).tolist(),
        "attention_error_before": before,
        "attention_error_after": after,
    }


def _least_squares(
    weight: torch.Tensor, statistics: GramStatistics, columns: torch.Tensor, moments: OutputMoments
) -> tuple[OutputChange, float]:
    """The full regression of the removed heads' output on the kept inputs of o_proj, and its relative error."""
    covariance, mean = statistics.covariance(), statistics.mean()
    kept = torch.zeros(len(mean), dtype=torch.bool, device=mean.device)
    kept[columns.to(mean.device)] = True
    removed_weight = weight.double()[:, ~kept]
    across = covariance[:, ~kept] @ removed_weight.T  # Cov(x, e)
    lost = (removed_weight.T * across[~kept]).sum(0)
    change, missing = least_squares(covariance[kept][:, kept], across[kept], lost, mean[kept], removed_weight @ mean[~kept])
    return change, moments.relative(missing)
