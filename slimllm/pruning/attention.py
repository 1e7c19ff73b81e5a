"""Pruning of attention: whole heads, by the Pearson similarity of the output or another criterion, and recovery."""

from __future__ import annotations

from typing import Any

import torch

from slimllm import ops
from slimllm.config import PruneConfig
from slimllm.methods.allocation.budget import LayerBudget
from slimllm.methods.criteria.elimination import Surgeon, eliminate_heads
from slimllm.methods.criteria.scores import fluctuation, random_scores, squares, wanda
from slimllm.methods.recovery import head_moments, mean_output, refit_kept, relative
from slimllm.methods.selection import complement, head_columns, select_units
from slimllm.models.layer import InnerActivations, Layer, dense_ahead
from slimllm.models.slicing import OutputChange, slice_attention
from slimllm.runtime.hidden_states import Stream
from slimllm.runtime.progress import Stopwatch
from slimllm.statistics import ColumnStatistics, GramStatistics


def prune_attention(
    layer: Layer, stream: Stream, index: int, budget: LayerBudget, config: PruneConfig, watch: Stopwatch
) -> dict[str, Any]:
    """Remove heads from a layer and let the residual stream pass its attention.

    Returns:
        The attention's part of the layer's report.
    """
    spec, sizes = layer.spec, layer.sizes()
    dense = layer.linear(spec.o_proj)
    joint = GramStatistics(dense.in_features + (dense.out_features if config.dense_target else 0), layer.device)
    activations = InnerActivations(layer, spec.o_proj, spec.attention_norm, stream, index)
    weighted = config.token_weights == "norm"
    for number, batch in enumerate(stream):
        with watch("forward"):
            _, inner = activations.first(number)
            output = dense(inner) if weighted or config.dense_target else None
            if output is not None and config.dense_target:
                inner = torch.cat([inner, dense_ahead(layer, spec.o_proj, batch, index, output)], 1)
        with watch("statistics"):
            weights = None
            if output is not None and weighted:
                weights = layer.weights(spec.o_proj, batch.hidden.load(), output)
            joint.update(inner, weights)
    del inner, dense, output
    with watch("statistics"):
        stream.ranks.add_up(joint)
        statistics = joint.leading(sizes.num_heads * layer.head_dim)

    with watch("heads"):
        weight = layer.linear(spec.o_proj).weight
        by_group = sizes.by_group(config.head_unit)
        units, groups = sizes.units(config.head_unit)
        seen = layer.seen(spec.o_proj)
        covariance = ops.head_covariance(seen, statistics.covariance(), units)
        if config.criterion == "slimllm":
            importance = ops.head_importance(covariance)
            kept_units = ops.pearson_greedy(covariance, budget.units * groups, 1 if by_group else sizes.group_size)
        elif config.criterion == "obs":
            found = stream.ranks.made_by_first(
                lambda: eliminate_heads(Surgeon(seen, statistics), units, budget.units, groups).to_lists()
            )
            importance = torch.tensor(found["alone"])
            kept_units = complement(torch.tensor(found["order"], dtype=torch.int64), units)
        else:
            importance = unit_scores(layer, statistics, units, config, index)
            kept_units = select_units(importance, budget.units, groups)
        kept_units = stream.ranks.of_first(kept_units).cpu()
        heads = head_columns(kept_units, sizes.group_size) if by_group else kept_units
        kv_heads = kept_units if by_group else torch.arange(sizes.num_kv_heads)
        columns = head_columns(heads, layer.head_dim)

    with watch("recovery"):
        if seen is not weight:
            covariance = ops.head_covariance(weight, statistics.covariance(), units)
        moments = head_moments(covariance, mean_output(weight, statistics.mean(), units), kept_units)
        before = moments.relative_error(*moments.fit("none"))
        change: OutputChange | None = None
        if config.recovery == "lstsq":
            refit = refit_kept(weight, joint, columns, stream.ranks, config.dense_target)
            before, after = relative(refit.before, moments.variance_y), relative(refit.after, moments.variance_y)
            change = refit.change
        else:
            slope, intercept = moments.fit(config.recovery)
            if config.recovery != "none":
                change = OutputChange(intercept, slope)
            after = moments.relative_error(slope, intercept)
        layer.replace(slice_attention(layer.tensors, spec, columns, head_columns(kv_heads, layer.head_dim), change))

    project = layer.linear(spec.o_proj)
    device_columns = columns.to(layer.device)
    for number, batch in enumerate(stream):
        with watch("forward"):
            batch.add(layer.behind(spec.o_proj, project(activations.again(number, device_columns))))
    return {
        "kept_heads": heads.tolist(),
        "kept_kv_heads": kv_heads.tolist(),
        "head_importance": importance.tolist(),
        "attention_error_before": before,
        "attention_error_after": after,
    }


def unit_scores(
    layer: Layer, statistics: GramStatistics | ColumnStatistics, units: int, config: PruneConfig, index: int
) -> torch.Tensor:
    """Importance of every unit of attention by the criteria that look at columns one by one, (units,) fp64.

    Args:
        layer: The layer, number `index`.
        statistics: Of the inputs of o_proj.
        units: How many units there are: KV groups or single heads.
        config: The settings.
    """
    weight = layer.seen(layer.spec.o_proj)
    if config.criterion == "random":
        return random_scores(units, config.seed, index, 0)
    if config.criterion == "wanda-sp":
        scores = wanda(weight, statistics.norms())
    elif config.criterion == "flap":
        scores = fluctuation(weight, statistics.variance())
    else:
        scores = squares(weight.T) + squares(layer.linear(layer.spec.q_proj).weight)
    scores = scores.view(units, -1).sum(1)
    if config.criterion == "magnitude" and units == layer.sizes().num_kv_heads:
        for projection in (layer.spec.k_proj, layer.spec.v_proj):
            scores += squares(layer.linear(projection).weight).view(units, -1).sum(1)
    return scores
