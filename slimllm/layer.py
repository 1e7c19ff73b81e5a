"""Pruning of one decoder layer: collect statistics, choose, slice, recover, and let the stream pass on.

Both sub-layers have the form h += project(inner(norm(h))), and both are pruned in the same steps. What was kept
produces what it produced before, so the pruned output is a product with the kept columns and no layer runs twice,
unless keeping the inner activations of all tokens would take more than KEEP_INNER_BYTES: then the sliced, cheaper
module makes them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimllm import ops
from slimllm.allocation import LayerBudget
from slimllm.config import PruneConfig
from slimllm.families import LayerSpec
from slimllm.importance import input_importance
from slimllm.progress import Stopwatch
from slimllm.recovery import OutputMoments, head_moments
from slimllm.selection import head_columns, select_channels
from slimllm.slicing import LayerSizes, Tensors, install, layer_sizes, slice_attention, slice_ffn
from slimllm.statistics import ColumnStatistics, GramStatistics, PairedMoments

KEEP_INNER_BYTES = 256 * 2**20


@dataclass
class Layer:
    """A decoder layer at work: `module` computes, `tensors` are its weights in the dtype they are stored in."""

    module: nn.Module
    tensors: Tensors
    spec: LayerSpec
    head_dim: int
    device: torch.device
    dtype: torch.dtype

    def replace(self, tensors: Tensors) -> None:
        self.tensors = tensors
        install(self.module, self.spec, tensors, self.device, self.dtype)

    def linear(self, name: str) -> nn.Linear:
        """One of the layer's projections."""
        module = self.module.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def sizes(self) -> LayerSizes:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return layer_sizes(shapes, self.spec, self.head_dim)


@dataclass
class Batch:
    """Windows that go through a layer together: the residual stream (batch, seq_len, D), updated in place."""

    hidden: torch.Tensor
    kwargs: list[dict[str, Any]]  # the arguments of every layer

    @property
    def tokens(self) -> torch.Tensor:
        """The residual stream as (num_tokens, D), the same memory."""
        return self.hidden.view(-1, self.hidden.shape[-1])


def run_layer(layer: Layer, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """The layer's own forward pass."""
    output = layer.module(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def _inner(layer: Layer, projection: str, hidden: torch.Tensor, kwargs: dict[str, Any] | None) -> torch.Tensor:
    """What enters the output projection, (num_tokens, features): the sub-layer, run with that projection taken out."""
    parent, name = projection.rsplit(".", 1)
    module = layer.module.get_submodule(parent)
    linear = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        output = module(hidden_states=hidden, **kwargs) if kwargs is not None else module(hidden)
    finally:
        setattr(module, name, linear)
    inner: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return inner.flatten(0, 1)


def pass_sublayer(layer: Layer, projection: str, batches: list[Batch], index: int, watch: Stopwatch) -> None:
    """Let the residual stream pass a sub-layer that is not pruned, named by its output projection."""
    attention = projection == layer.spec.o_proj
    norm = layer.module.get_submodule(layer.spec.attention_norm if attention else layer.spec.ffn_norm)
    project = layer.linear(projection)
    for batch in batches:
        with watch("forward"):
            kwargs = batch.kwargs[index] if attention else None
            batch.tokens.add_(project(_inner(layer, projection, norm(batch.hidden), kwargs)))


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
    keep_inner = _fits(batches, sizes.num_heads * layer.head_dim)
    kept_inner: list[torch.Tensor] = []
    for batch in batches:
        with watch("forward"):
            inner = _inner(layer, spec.o_proj, norm(batch.hidden), batch.kwargs[index])
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
        slope, intercept = _recovery(moments, config)
        layer.replace(
            slice_attention(layer.tensors, spec, columns, head_columns(kv_heads, layer.head_dim), slope, intercept)
        )

    project = layer.linear(spec.o_proj)
    device_columns = columns.to(layer.device)
    for batch in batches:
        with watch("forward"):
            if keep_inner:
                kept = kept_inner.pop(0).index_select(1, device_columns)
            else:
                kept = _inner(layer, spec.o_proj, norm(batch.hidden), batch.kwargs[index])
            batch.tokens.add_(project(kept))
    return {
        "kept_heads": heads.tolist(),
        "kept_kv_heads": kv_heads.tolist(),
        "head_importance": ops.head_importance(covariance).tolist(),
        **_errors("attention", moments, slope, intercept),
    }


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
    keep_inner = _fits(batches, num_channels)
    kept_inner: list[torch.Tensor] = []
    dense_outputs: list[torch.Tensor] = []
    for batch in batches:
        with watch("forward"):
            x = norm(batch.hidden)
            inner = _inner(layer, spec.down_proj, x, None)
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
    for batch, y in zip(batches, dense_outputs):
        with watch("forward"):
            if keep_inner:
                kept = kept_inner.pop(0).index_select(1, device_channels)
            else:
                kept = _inner(layer, spec.down_proj, norm(batch.hidden), None)
            y_hat = nn.functional.linear(kept, kept_weight)
        with watch("recovery"):
            paired.update(y, y_hat)
            y.copy_(y_hat)

    with watch("recovery"):
        moments = OutputMoments(
            paired.mean_y, paired.mean_y_hat, output_covariance.diagonal(), paired.variance(), paired.covariance()
        )
        slope, intercept = _recovery(moments, config)
        if slope is not None:
            layer.replace(slice_ffn(dense_tensors, spec, kept_channels, slope, intercept))
    bias = layer.linear(spec.down_proj).bias
    for batch, y_hat in zip(batches, dense_outputs):
        with watch("forward"):
            if slope is not None:
                y_hat *= slope.to(y_hat.dtype)
            batch.tokens.add_(y_hat if bias is None else y_hat.add_(bias))
    return {
        "kept_channels": kept_channels.tolist(),
        "channel_importance": importance.tolist(),
        **_errors("ffn", moments, slope, intercept),
    }


def _fits(batches: list[Batch], features: int) -> bool:
    tokens = sum(batch.hidden.shape[0] * batch.hidden.shape[1] for batch in batches)
    return tokens * features * batches[0].hidden.element_size() <= KEEP_INNER_BYTES


def _keep_lowest(config: PruneConfig) -> float:
    if config.keep_lowest is not None:
        return config.keep_lowest
    return 0.01 if config.preset == "paper" else 0.0


def _recovery(moments: OutputMoments, config: PruneConfig) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    return moments.affine_fit() if config.recovery == "affine" else (None, None)


def _errors(
    part: str, moments: OutputMoments, slope: torch.Tensor | None, intercept: torch.Tensor | None
) -> dict[str, float]:
    """Relative output error before and after recovery, and the settings' own result if there is none."""
    ones, zeros = torch.ones_like(moments.mean_y), torch.zeros_like(moments.mean_y)
    before = moments.relative_error(ones, zeros)
    after = before if slope is None or intercept is None else moments.relative_error(slope, intercept)
    return {f"{part}_error_before": before, f"{part}_error_after": after}
