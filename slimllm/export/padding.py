"""Zero padding that gives all layers equal sizes without changing their outputs."""

from __future__ import annotations

import dataclasses

import torch

from slimllm.models.families import Family
from slimllm.models.slicing import LayerSizes, Tensors


def padded_sizes(sizes: list[LayerSizes]) -> LayerSizes:
    """Return the smallest sizes that hold every layer: the maxima of KV heads, query heads per KV head, and channels.

    `params` is not recounted; it is the first layer's.
    """
    kv_heads, group = max(size.num_kv_heads for size in sizes), max(size.group_size for size in sizes)
    return dataclasses.replace(
        sizes[0],
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        intermediate_size=max(size.intermediate_size for size in sizes),
        attention_out_bias=any(size.attention_out_bias for size in sizes),
        ffn_out_bias=any(size.ffn_out_bias for size in sizes),
    )


def pad_layer(tensors: Tensors, spec: Family, size: LayerSizes, wanted: LayerSizes, head_dim: int) -> Tensors:
    """Return a layer with added heads and channels, whose weights and biases are all 0.

    The values of an added head are 0, and so is its output. The product of gate and up of an added channel is 0. Query
    heads are added at the end of their KV group, so that the existing ones keep their keys and values.

    Args:
        tensors: The layer's tensors, by names relative to the layer.
        spec: The family, which has the names of the projections.
        size, wanted: The layer's sizes, and the sizes to pad it to.
        head_dim: The model's head dimension.
    """
    queries = (size.num_kv_heads, size.group_size, head_dim), (wanted.num_kv_heads, wanted.group_size, head_dim)
    keys = (size.num_kv_heads, 1, head_dim), (wanted.num_kv_heads, 1, head_dim)
    channels = (1, 1, size.intermediate_size), (1, 1, wanted.intermediate_size)
    result = dict(tensors)
    experts = spec.by_expert(tensors)
    for name, (old, new) in {
        spec.q_proj: queries,
        spec.k_proj: keys,
        spec.v_proj: keys,
        **dict.fromkeys((name for one in experts for name in one.into_ffn), channels),
    }.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in tensors:
                result[f"{name}.{kind}"] = _pad_rows(tensors[f"{name}.{kind}"], old, new)
    for name, (old, new) in {spec.o_proj: queries, **dict.fromkeys((one.down_proj for one in experts), channels)}.items():
        result[f"{name}.weight"] = _pad_rows(tensors[f"{name}.weight"].T, old, new).T.contiguous()
    return result


def _pad_rows(tensor: torch.Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> torch.Tensor:
    """Pad the rows of a tensor with zeros: viewed as three dimensions of sizes `old`, they are padded to sizes `new`."""
    whole = tensor.new_zeros(*new, *tensor.shape[1:])
    whole[: old[0], : old[1], : old[2]] = tensor.reshape(*old, *tensor.shape[1:])
    return whole.flatten(0, 2)
