"""A sub-layer, the attention or the FFN of a decoder layer: the object that pruning works on.

Both have the form h += residual_update(project(inner(norm(h)))). Kept units produce the same inner activations as before
pruning, so the pruned output is a product with the kept columns and no layer runs twice. The exception: if the inner
activations of all tokens exceed the memory that the stream allows, the sliced, cheaper module computes them again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from slimllm.models.families import Family
from slimllm.models.layer import Layer
from slimllm.models.slicing import OutputChange, Tensors, slice_attention, slice_ffn
from slimllm.runtime.hidden_states import Batch, Stream
from slimllm.statistics import token_weights


@dataclass(frozen=True)
class Sublayer:
    """The attention or the FFN of a decoder layer, and the units in which it is pruned.

    Attributes:
        layer: The decoder layer.
        kind: `attention` or `ffn`.
        index: The layer's number.
        units: Number of units, which are removed as a whole: KV groups, single heads or channels. A unit has `width`
            adjacent columns of the output projection.
        width: Columns of the output projection per unit.
        groups: Groups of adjacent units, each of which loses the same number of units; 1: any unit may be removed.
        seed: Seed of this sub-layer, for methods that draw random numbers.
        new_bias: Whether its output projection may get a bias if it has none.
        expert: The number of the expert, if the sub-layer is one of a mixture's; it is then an FFN of the tokens that are
            routed to it. None: it is the whole attention or FFN.
    """

    layer: Layer
    kind: str
    index: int
    units: int
    width: int
    groups: int = 1
    seed: int = 0
    new_bias: bool = True
    expert: int | None = None

    @classmethod
    def attention_of(cls, layer: Layer, index: int, head_unit: str, seed: int = 0, new_bias: bool = True) -> Sublayer:
        """Return the attention of a layer, to be pruned in units of `head_unit` (`kv-group` or `query`)."""
        sizes = layer.sizes()
        units, groups = sizes.units(head_unit)
        width = sizes.num_heads * layer.head_dim // units
        return cls(layer, "attention", index, units, width, groups, _seed_of(seed, index, 0), new_bias)

    @classmethod
    def ffn_of(cls, layer: Layer, index: int, seed: int = 0, new_bias: bool = True) -> Sublayer:
        """Return the FFN of a layer; its units are its channels, or of a mixture those of each of its `experts`."""
        return cls(layer, "ffn", index, layer.sizes().intermediate_size, 1, 1, _seed_of(seed, index, 1), new_bias)

    @cached_property
    def spec(self) -> Family:
        """Description of the family; for an expert, that with this expert as the layer's dense FFN."""
        return self.layer.spec if self.expert is None else self.layer.spec.of_expert(self.expert)

    @cached_property
    def experts(self) -> list[Sublayer]:
        """The experts of an FFN that is a mixture, in which no projection gets a bias; none of any other sub-layer."""
        if self.is_attention or not self.spec.expert:
            return []
        numbers = range(self.layer.sizes().experts)
        return [replace(self, expert=one, new_bias=False, seed=_seed_of(self.seed, one, 0)) for one in numbers]

    @property
    def is_attention(self) -> bool:
        return self.kind == "attention"

    @property
    def projection(self) -> str:
        """Name of the output projection in the layer."""
        return self.spec.o_proj if self.is_attention else self.spec.down_proj

    @property
    def output_projection(self) -> nn.Linear:
        """The output projection: weight W, (D, F), and possibly a bias."""
        return self.layer.linear(self.projection)

    @property
    def takes_bias(self) -> bool:
        """Whether the output projection has a bias or may get one."""
        return self.new_bias or self.output_projection.bias is not None

    @property
    def norm(self) -> nn.Module:
        """The norm before the sub-layer."""
        spec = self.layer.spec
        return self.layer.module.get_submodule(spec.attention_norm if self.is_attention else spec.ffn_norm)

    @property
    def post_norm(self) -> nn.Module | None:
        """The norm applied to the output before it is added to the residual stream; None: there is none."""
        spec = self.layer.spec
        name = spec.attention_post_norm if self.is_attention else spec.ffn_post_norm
        return self.layer.module.get_submodule(name) if name else None

    @property
    def unit_rows(self) -> list[str]:
        """Names of the projections that have their own rows for every unit.

        In attention these are q_proj and, where whole KV groups are removed, k_proj and v_proj; in an FFN they are
        gate_proj, if there is one, and up_proj.
        """
        spec = self.spec
        if not self.is_attention:
            return list(spec.into_ffn)
        return [spec.q_proj, spec.k_proj, spec.v_proj] if self._whole_groups else [spec.q_proj]

    @property
    def _whole_groups(self) -> bool:
        return self.units == self.layer.sizes().num_kv_heads

    def weight_of(self, projection: str) -> torch.Tensor:
        """Return the weight of one of the layer's projections, by name: (out_features, in_features)."""
        return self.layer.linear(projection).weight

    def columns_of(self, units: torch.Tensor) -> torch.Tensor:
        """Return the output projection's columns that belong to the units: (len(units) · width,) int64."""
        return (units[:, None] * self.width + torch.arange(self.width)).flatten()

    def residual_update(self, output: torch.Tensor) -> torch.Tensor:
        """Compute what is added to the residual stream from the output projection's output: (num_tokens, D)."""
        norm, factor = self.post_norm, self.layer.spec.update_factor
        added: torch.Tensor = norm(output) if norm else output
        return added * getattr(self.layer.module, factor) if factor else added

    def post_norm_gain(self) -> torch.Tensor | None:
        """Return the factor by which the post-norm multiplies each output, (D,), or None if there is no post-norm."""
        norm = self.post_norm
        if norm is None:
            return None
        weight = self.output_projection.weight
        gain: torch.Tensor = norm(weight.new_ones(len(weight)))
        return gain

    def effective_weight(self) -> torch.Tensor:
        """Return the output projection's weight scaled by the post-norm's gain, (D, F); used for scoring."""
        weight, gain = self.output_projection.weight, self.post_norm_gain()
        return weight if gain is None else weight * gain[:, None]

    def token_weights(self, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Compute the tokens' weights in the statistics, (num_tokens,) fp32; see `slimllm.statistics.token_weights`.

        Args:
            hidden: The residual stream before the sub-layer, (batch, seq_len, D).
            output: The output projection's output, (num_tokens, D).
        """
        centered = isinstance(self.layer.module.get_submodule(self.layer.spec.ffn_norm), nn.LayerNorm)
        added = self.residual_update(output)
        return token_weights(hidden, added, None if self.post_norm is None else output, centered)

    def inner_activations(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Run the sub-layer without its output projection, and return that projection's input, (num_tokens, F).

        Args:
            hidden: The norm's output, (batch, seq_len, D).
            kwargs: The layer's keyword arguments; only attention uses them.
        """
        layer, spec = self.layer, self.spec
        if not self.is_attention and not spec.ffn:
            channels: torch.Tensor = getattr(layer.module, spec.activation)(layer.linear(spec.up_proj)(hidden))
            return channels.flatten(0, 1)
        parent, name = self.projection.rsplit(".", 1)
        module = layer.module.get_submodule(parent)
        linear = getattr(module, name)
        setattr(module, name, nn.Identity())
        try:
            output = module(hidden_states=hidden, **self._arguments(kwargs)) if self.is_attention else module(hidden)
        finally:
            setattr(module, name, linear)
        inner: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return inner.flatten(0, 1)

    @property
    def mixture(self) -> nn.Module:
        """The module that routes the tokens to the experts; its `route(x)` gives the gates and the experts' numbers."""
        return self.layer.module.get_submodule(self.spec.ffn)

    def _arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the attention's arguments; under transformers 4, Gemma 3's layer chooses between rotary embeddings."""
        if "position_embeddings_global" not in kwargs:
            return kwargs
        sliding = self.layer.module.get_submodule(self.layer.spec.attention).is_sliding
        chosen = {name: value for name, value in kwargs.items() if not name.startswith("position_embeddings_")}
        chosen["position_embeddings"] = kwargs[f"position_embeddings_{'local' if sliding else 'global'}"]
        return chosen

    def update_of(self, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        """Compute the residual update of the sub-layer, (num_tokens, D), from a residual stream (batch, seq_len, D)."""
        if self.experts:
            return self.residual_update(self.mixture(self.norm(hidden)).flatten(0, 1))
        return self.residual_update(self.output_projection(self.inner_activations(self.norm(hidden), kwargs)))

    def sliced(self, units: torch.Tensor, change: OutputChange | None = None) -> Tensors:
        """Return the layer's tensors with only these units of this sub-layer.

        Args:
            units: The units to keep, sorted int64 indices on the CPU.
            change: Change of the output projection; None: its kept values stay the same.
        """
        columns, tensors, spec = self.columns_of(units), self.layer.tensors, self.spec
        if not self.is_attention:
            return slice_ffn(tensors, spec, columns, change)
        kv_heads = units if self._whole_groups else torch.arange(self.layer.sizes().num_kv_heads)
        head_dim = self.layer.head_dim
        kv_rows = (kv_heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
        return slice_attention(tensors, spec, columns, kv_rows, change)


def _seed_of(seed: int, index: int, part: int) -> int:
    return (1_000_003 * seed + 2 * index + part) % 2**63


def add_update(batch: Batch, sublayer: Sublayer) -> None:
    """Add a sub-layer's residual update to the residual stream of a batch."""
    batch.add(sublayer.update_of(batch.hidden.load(), batch.kwargs[sublayer.index]))


class InnerActivations:
    """Inputs of a sub-layer's output projection, batch by batch, in two rounds: first all columns, then the kept ones.

    The activations are stored between the rounds if those of all tokens fit the memory that the stream allows. Otherwise
    the layer, which is sliced by then, computes them again in the second round.

    Args:
        sublayer: The sub-layer.
        stream: The residual stream before it.
    """

    def __init__(self, sublayer: Sublayer, stream: Stream) -> None:
        self._sublayer, self._stream, self._norm = sublayer, stream, sublayer.norm
        features, itemsize = sublayer.output_projection.in_features, sublayer.layer.dtype.itemsize
        num_bytes = stream.most_tokens * features * itemsize
        self._kept: dict[int, torch.Tensor] | None = {} if num_bytes <= stream.placement.keep_inner_bytes else None

    def first(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm's output, (batch, seq_len, D), and the input of the output projection, (num_tokens, F)."""
        x = self._norm(self._stream[number].hidden.load())
        inner = self._make(number, x)
        if self._kept is not None:
            self._kept[number] = inner
        return x, inner

    def again(self, number: int, columns: torch.Tensor) -> torch.Tensor:
        """Return the kept columns, (num_tokens, len(columns)); call this once for each batch."""
        if self._kept is not None:
            return self._kept.pop(number).index_select(1, columns)
        return self._make(number, self._norm(self._stream[number].hidden.load()))

    def _make(self, number: int, x: torch.Tensor) -> torch.Tensor:
        return self._sublayer.inner_activations(x, self._stream[number].kwargs[self._sublayer.index])
