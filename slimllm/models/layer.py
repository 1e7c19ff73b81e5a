"""One decoder layer at work: its tensors and module, the residual stream that passes through it, and its halves.

Both sub-layers have the form h += project(inner(norm(h))). What was kept of a pruned one produces what it produced
before, so the pruned output is a product with the kept columns and no layer runs twice, unless keeping the inner
activations of all tokens would take more than the stream allows: then the sliced, cheaper module makes them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimllm.models.families import LayerSpec
from slimllm.models.slicing import LayerSizes, Tensors, install, layer_sizes
from slimllm.runtime.hidden_states import Batch, Stream
from slimllm.runtime.progress import Stopwatch
from slimllm.statistics.tokens import token_weights


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
        """Compute with these tensors, of which those that are in place already stay there."""
        changed = {name for name, tensor in tensors.items() if self.tensors.get(name) is not tensor}
        self.tensors = tensors
        install(self.module, self.spec, tensors, changed, self.device, self.dtype)

    def linear(self, name: str) -> nn.Linear:
        """One of the layer's projections."""
        module = self.module.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module

    def behind(self, projection: str, output: torch.Tensor) -> torch.Tensor:
        """What is added to the residual stream of an output projection's output, (num_tokens, D)."""
        norm = self.post_norm(projection)
        added: torch.Tensor = self.module.get_submodule(norm)(output) if norm else output
        return added

    def post_norm(self, projection: str) -> str:
        """The norm that a sub-layer's output passes, by its output projection; empty: none."""
        return self.spec.attention_post_norm if projection == self.spec.o_proj else self.spec.ffn_post_norm

    def gain(self, projection: str) -> torch.Tensor | None:
        """What the norm behind a sub-layer multiplies its outputs by, (D,); None: there is none."""
        norm = self.post_norm(projection)
        if not norm:
            return None
        ones = self.linear(projection).weight.new_ones(self.linear(projection).out_features)
        gain: torch.Tensor = self.module.get_submodule(norm)(ones)
        return gain

    def seen(self, projection: str) -> torch.Tensor:
        """An output projection's weight, (D, F), as the residual stream sees it, to choose by."""
        weight, gain = self.linear(projection).weight, self.gain(projection)
        return weight if gain is None else weight * gain[:, None]

    def weights(self, projection: str, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Token weights of a sub-layer, from the stream before it and its output projection's output."""
        added = self.behind(projection, output)
        centered = isinstance(self.module.get_submodule(self.spec.ffn_norm), nn.LayerNorm)
        return token_weights(hidden, added, output if self.post_norm(projection) else None, centered)

    def sizes(self) -> LayerSizes:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        return layer_sizes(shapes, self.spec, self.head_dim)


def run_layer(layer: Layer, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """The layer's own forward pass."""
    output = layer.module(hidden, **kwargs)
    return output[0] if isinstance(output, tuple) else output


def inner_activations(layer: Layer, projection: str, hidden: torch.Tensor, kwargs: dict[str, Any] | None) -> torch.Tensor:
    """What enters the output projection, (num_tokens, features): the sub-layer, run with that projection taken out."""
    if projection == layer.spec.down_proj and not layer.spec.ffn:
        channels: torch.Tensor = getattr(layer.module, layer.spec.activation)(layer.linear(layer.spec.up_proj)(hidden))
        return channels.flatten(0, 1)
    if kwargs is not None and "position_embeddings_global" in kwargs:  # Gemma 3 under transformers 4: the layer chooses
        both = {kind: kwargs[f"position_embeddings_{kind}"] for kind in ("global", "local")}
        sliding = layer.module.get_submodule(layer.spec.attention).is_sliding
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("position_embeddings_")}
        kwargs["position_embeddings"] = both["local" if sliding else "global"]
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


def pass_sublayer(layer: Layer, projection: str, stream: Stream, index: int, watch: Stopwatch) -> None:
    """Let the residual stream pass a sub-layer that is not pruned, named by its output projection."""
    for batch in stream:
        with watch("forward"):
            batch.add(sublayer_output(layer, projection, batch.hidden.load(), batch.kwargs[index]))
            if batch.dense:
                _pass_dense(layer, projection, batch, index)


def pass_held_out(layer: Layer, stream: Stream, index: int, watch: Stopwatch) -> bool:
    """Run a whole layer, dense or pruned, on the held-out windows, in place.

    Args:
        layer: The layer as it is now.
        stream: Whose held-out batches (windows, seq_len, D) are replaced by the layer's outputs.
        index: The layer's number, for its arguments.
        watch: Gathers the seconds as `perplexity`.

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


def dense_ahead(layer: Layer, projection: str, batch: Batch, index: int, output: torch.Tensor) -> torch.Tensor:
    """Let the dense model's stream pass a sub-layer: by how much it is ahead of this one behind it, (num_tokens, D).

    Args:
        layer: The layer, whose sub-layer is not pruned yet.
        projection: Its output projection.
        batch: The windows, before the sub-layer on both streams.
        index: The layer's number.
        output: What the sub-layer puts out on the pruned model's stream, (num_tokens, D).
    """
    dense = _pass_dense(layer, projection, batch, index)
    return (dense - batch.hidden.load()).flatten(0, 1) - output


def _pass_dense(layer: Layer, projection: str, batch: Batch, index: int) -> torch.Tensor:
    assert batch.dense is not None
    hidden = batch.dense.load()
    hidden = hidden + sublayer_output(layer, projection, hidden, batch.kwargs[index]).view_as(hidden)
    batch.dense.save(hidden)
    return hidden


def sublayer_output(layer: Layer, projection: str, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
    """What a sub-layer, named by its output projection, adds to the stream, (num_tokens, D)."""
    attention = projection == layer.spec.o_proj
    norm = layer.module.get_submodule(layer.spec.attention_norm if attention else layer.spec.ffn_norm)
    inner = inner_activations(layer, projection, norm(hidden), kwargs if attention else None)
    return layer.behind(projection, layer.linear(projection)(inner))


class InnerActivations:
    """The inputs of a sub-layer's output projection, batch by batch, twice: first all of them, then the kept columns.

    Between the two they are kept, if those of all tokens take no more than the stream allows; otherwise the second time
    the layer, sliced by then, makes them again.

    Args:
        layer: The layer.
        projection, norm: Names of the sub-layer's output projection and of the norm before it.
        stream: The residual stream before the sub-layer.
        index: The layer's number, for its arguments.
    """

    def __init__(self, layer: Layer, projection: str, norm: str, stream: Stream, index: int) -> None:
        self._layer, self._projection, self._stream, self._index = layer, projection, stream, index
        self._norm = layer.module.get_submodule(norm)
        num_bytes = stream.most_tokens * layer.linear(projection).weight.shape[1] * layer.dtype.itemsize
        self._kept: dict[int, torch.Tensor] | None = {} if num_bytes <= stream.placement.keep_inner_bytes else None

    def first(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The input of the sub-layer, (batch, seq_len, D), and that of its output projection, (num_tokens, features)."""
        x = self._norm(self._stream[number].hidden.load())
        inner = self._make(number, x)
        if self._kept is not None:
            self._kept[number] = inner
        return x, inner

    def again(self, number: int, columns: torch.Tensor) -> torch.Tensor:
        """The columns that are left, (num_tokens, len(columns)); once for each batch."""
        if self._kept is not None:
            return self._kept.pop(number).index_select(1, columns)
        return self._make(number, self._norm(self._stream[number].hidden.load()))

    def _make(self, number: int, x: torch.Tensor) -> torch.Tensor:
        attention = self._projection == self._layer.spec.o_proj
        kwargs = self._stream[number].kwargs[self._index] if attention else None
        return inner_activations(self._layer, self._projection, x, kwargs)
