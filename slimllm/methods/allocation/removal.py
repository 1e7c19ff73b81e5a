"""What a layer can give and what it gives, in the units in which it is pruned, and what that is in parameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer, in the units in which it is pruned.

    `units` are KV groups (`kv-group`) or query heads per group (`query`), of `unit_params` parameters each;
    `channels` are FFN channels of `channel_params` each; `params` is the layer's whole number of parameters.
    `attention_bias_params` and `ffn_bias_params` are what recovery would add to each sub-layer as a bias; `grouped` says
    that query heads share KV heads. Units are removed `unit_step` at a time, of which `units` is a multiple.
    """

    units: int
    unit_params: int
    channels: int
    channel_params: int
    params: int
    attention_bias_params: int
    ffn_bias_params: int
    grouped: bool
    unit_step: int = 1


@dataclass(frozen=True)
class LayerRemoval:
    """What one layer gives: its ratio r_ℓ, and how many units and channels are removed. `pruned` if any."""

    ratio: float
    units: int
    channels: int

    @property
    def pruned(self) -> bool:
        return self.units > 0 or self.channels > 0


def removed_params(removal: LayerRemoval, shape: LayerShape) -> int:
    """Parameters that a layer gives, less the biases that recovery adds."""
    attention = removal.units * shape.unit_params - shape.attention_bias_params * (removal.units > 0)
    return attention + removal.channels * shape.channel_params - shape.ffn_bias_params * (removal.channels > 0)


def most_removable(shape: LayerShape, round_to: int) -> int:
    """The most that a layer can give: it keeps one step of units and `round_to` channels."""
    channels = max(shape.channels - round_to, 0)
    units = shape.units - shape.unit_step
    attention = units * shape.unit_params - shape.attention_bias_params * (units > 0)
    return attention + channels * shape.channel_params - shape.ffn_bias_params * (channels > 0)
