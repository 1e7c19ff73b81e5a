"""Slicing of weights by indices to keep, in a layer's dict of tensors and in its modules."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from slimllm.errors import InputError
from slimllm.models.families import Family
from slimllm.runtime.memory import moved

Tensors = dict[str, torch.Tensor]
_ROWS = 256  # rows of a weight that are in fp64 at a time


@dataclass(frozen=True)
class OutputChange:
    """Change of an output projection with the kept columns S: W' = a ∘ W[:, S] + Δ, bias' = bias + b.

    Attributes:
        intercept: b, (D,) fp64; None: 0, and no bias is added where there was none.
        slope: a, (D,) fp64; None: 1.
        delta: Δ, (D, |S|) fp64; None: 0.
    """

    intercept: torch.Tensor | None = None
    slope: torch.Tensor | None = None
    delta: torch.Tensor | None = None


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one decoder layer, which of its projections have a bias, and whether its FFN has a gate.

    An FFN may be a mixture of `experts`, each `intermediate_size` wide; a dense one counts as one. `attention_out_bias` and
    `ffn_out_bias` are about the output projections, `qkv_bias` about q, k and v, and `gate_bias` about gate and up.
    """

    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    attention_out_bias: bool
    ffn_out_bias: bool
    params: int
    qkv_bias: bool = False
    gate_bias: bool = False
    gated: bool = True
    experts: int = 1

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    def by_group(self, head_unit: str) -> bool:
        """Return whether heads are removed in whole KV groups; always so without grouped queries: a group is one head."""
        return head_unit == "kv-group" or self.group_size == 1

    def units(self, head_unit: str) -> tuple[int, int]:
        """Return the number of attention units, and of groups that each lose the same number of units (1: any unit)."""
        return (self.num_kv_heads, 1) if self.by_group(head_unit) else (self.num_heads, self.num_kv_heads)

    def unit_step(self, head_unit: str, multiple_of: int) -> int:
        """Return how many units (of each group) are removed at a time to keep a multiple of `multiple_of` heads.

        KV heads are counted where whole KV groups are removed, and query heads otherwise.

        Raises:
            ValueError: (as InputError) the number of all heads is not a multiple of `multiple_of`.
        """
        by_group = self.by_group(head_unit)
        number, kind = (self.num_kv_heads, "KV") if by_group else (self.num_heads, "query")
        if number % multiple_of:
            raise InputError(
                f"heads_multiple_of is {multiple_of}, but a layer of the model has {number} {kind} heads, which is not a "
                f"multiple of it; give a divisor of {number}."
            )
        return multiple_of if by_group else multiple_of // math.gcd(multiple_of, self.num_kv_heads)

    def without(self, units: int, channels: int, head_unit: str, new_bias: bool) -> LayerSizes:
        """Return the sizes without these units (of each group) and channels; `params` is 0 until the tensors exist."""
        by_group = self.by_group(head_unit)
        return replace(
            self,
            num_heads=self.num_heads - units * (self.group_size if by_group else self.num_kv_heads),
            num_kv_heads=self.num_kv_heads - (units if by_group else 0),
            intermediate_size=self.intermediate_size - channels,
            attention_out_bias=self.attention_out_bias or (new_bias and units > 0),
            ffn_out_bias=self.ffn_out_bias or (new_bias and channels > 0 and self.experts == 1),
            params=0,
        )


def layer_sizes(shapes: dict[str, tuple[int, ...]], spec: Family, head_dim: int) -> LayerSizes:
    """Derive the sizes of a layer from the shapes of its tensors (names relative to the layer).

    Raises:
        ValueError: (as InputError) its experts have different widths.
    """
    experts = spec.by_expert(shapes)
    first = experts[0]
    widths = {shapes[f"{one.down_proj}.weight"][1] for one in experts}
    if len(widths) > 1:
        raise InputError(f"The experts of a layer must have the same width, got {', '.join(map(str, sorted(widths)))}.")
    return LayerSizes(
        num_heads=shapes[f"{spec.q_proj}.weight"][0] // head_dim,
        num_kv_heads=shapes[f"{spec.k_proj}.weight"][0] // head_dim,
        intermediate_size=widths.pop(),
        attention_out_bias=f"{spec.o_proj}.bias" in shapes,
        ffn_out_bias=f"{first.down_proj}.bias" in shapes,
        params=sum(torch.Size(shape).numel() for shape in shapes.values()),
        qkv_bias=f"{spec.q_proj}.bias" in shapes,
        gate_bias=f"{first.up_proj}.bias" in shapes,
        gated=bool(spec.gate_proj),
        experts=len(experts),
    )


def sizes_by_layer(shapes: dict[str, tuple[int, ...]], spec: Family, head_dim: int, num_layers: int) -> list[LayerSizes]:
    """Derive the sizes of every layer from the shapes of all tensors of a model, by full name."""
    result = []
    for index in range(num_layers):
        prefix = f"{spec.layers}.{index}."
        own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        result.append(layer_sizes(own, spec, head_dim))
    return result


def _select_rows(tensors: Tensors, projection: str, rows: torch.Tensor) -> Tensors:
    """Select rows of a projection's weight and, if it has one, of its bias."""
    names = [name for name in (f"{projection}.weight", f"{projection}.bias") if name in tensors]
    return {name: tensors[name][rows.to(tensors[name].device)] for name in names}


def _select_slopes(tensors: Tensors, spec: Family, query_rows: torch.Tensor) -> Tensors:
    """Select the numbers of the kept heads from the tensor with one number for each head, if there is one."""
    if not spec.slopes:
        return {}
    slopes = tensors[spec.slopes]
    head_dim = tensors[f"{spec.q_proj}.weight"].shape[0] // len(slopes)
    return {spec.slopes: slopes[query_rows[::head_dim].to(slopes.device) // head_dim]}


def slice_output(tensors: Tensors, projection: str, columns: torch.Tensor, change: OutputChange | None = None) -> Tensors:
    """Return W[:, columns] and the bias of an output projection, changed by the recovery, by their names in the layer.

    Changed tensors are at least in fp32: they are rounded once, when they are written.
    """
    weight = tensors[f"{projection}.weight"]
    bias = tensors.get(f"{projection}.bias")
    sliced = weight[:, columns.to(weight.device)]
    if change is not None:
        precise = torch.promote_types(weight.dtype, torch.float32)
        changed = torch.empty_like(sliced, dtype=precise, memory_format=torch.contiguous_format)
        for start in range(0, len(sliced), _ROWS):
            rows = sliced[start : start + _ROWS].to(torch.float64, copy=True)
            if change.slope is not None:
                rows *= change.slope[start : start + _ROWS, None].to(weight.device)
            if change.delta is not None:
                rows += change.delta[start : start + _ROWS].to(weight.device)
            changed[start : start + _ROWS] = rows
        sliced = changed
        if change.intercept is not None:
            total = change.intercept.to(weight.device) + (bias.double() if bias is not None else 0.0)
            bias = total.to(precise)
    result = {f"{projection}.weight": sliced.contiguous()}
    if bias is not None:
        result[f"{projection}.bias"] = bias
    return result


def slice_attention(
    tensors: Tensors, spec: Family, query_rows: torch.Tensor, kv_rows: torch.Tensor, change: OutputChange | None = None
) -> Tensors:
    """Return a layer's tensors with only the kept heads.

    Args:
        tensors: All tensors of the layer, by names relative to it.
        query_rows: Rows of q_proj, and columns of o_proj, to keep.
        kv_rows: Rows of k_proj and v_proj to keep.
        change: Change of o_proj by the recovery; None: its kept values stay the same.
    """
    return {
        **tensors,
        **_select_rows(tensors, spec.q_proj, query_rows),
        **_select_rows(tensors, spec.k_proj, kv_rows),
        **_select_rows(tensors, spec.v_proj, kv_rows),
        **_select_slopes(tensors, spec, query_rows),
        **slice_output(tensors, spec.o_proj, query_rows, change),
    }


def slice_ffn(tensors: Tensors, spec: Family, channels: torch.Tensor, change: OutputChange | None = None) -> Tensors:
    """Return a layer's tensors with only the kept channels of an FFN or expert; arguments as in `slice_attention`."""
    return {
        **tensors,
        **{name: rows for part in spec.into_ffn for name, rows in _select_rows(tensors, part, channels).items()},
        **slice_output(tensors, spec.down_proj, channels, change),
    }


def install(
    layer: nn.Module, spec: Family, tensors: Tensors, changed: set[str], device: torch.device, dtype: torch.dtype
) -> None:
    """Put tensors into a layer's modules, replacing the linear layers whose shape or bias has changed.

    Args:
        layer: The decoder layer.
        spec: The family, for the names in the layer.
        tensors: All tensors of the layer.
        changed: Names of the tensors that are not installed yet; the others stay in place.
        device, dtype: Device and dtype in which the layer computes.
    """
    experts = spec.by_expert(tensors)
    for projection in (*spec.attention_projections, *(name for one in experts for name in one.ffn_projections)):
        weight, bias = tensors[f"{projection}.weight"], tensors.get(f"{projection}.bias")
        old = layer.get_submodule(projection)
        assert isinstance(old, nn.Linear)
        if old.weight.shape != weight.shape or (old.bias is None) != (bias is None):
            parent, _, name = projection.rpartition(".")
            new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            new.requires_grad_(old.weight.requires_grad)
            setattr(layer.get_submodule(parent), name, new)
            changed = changed | {name for name in (f"{projection}.weight", f"{projection}.bias") if name in tensors}
    if spec.slopes in changed:
        owner, _, name = spec.slopes.rpartition(".")
        setattr(layer.get_submodule(owner), name, torch.empty_like(tensors[spec.slopes], device="meta"))
    for name in changed:  # one by one, so that each replaced tensor is freed before the next one is copied
        owner, _, last = name.rpartition(".")
        layer.get_submodule(owner).load_state_dict({last: moved(tensors[name], device, dtype)}, strict=False, assign=True)
    attention: Any = layer.get_submodule(spec.attention)
    if hasattr(attention, "num_heads"):
        attention.num_heads = tensors[f"{spec.q_proj}.weight"].shape[0] // attention.head_dim
    attention.num_key_value_groups = tensors[f"{spec.q_proj}.weight"].shape[0] // tensors[f"{spec.k_proj}.weight"].shape[0]
    for one in experts:
        ffn: Any = layer.get_submodule(one.ffn)
        ffn.intermediate_size = tensors[f"{one.down_proj}.weight"].shape[1]
