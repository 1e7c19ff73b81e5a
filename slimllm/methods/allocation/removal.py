"""Layer shapes and removals, in units and in parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer, in the units in which it is pruned.

    `units` are KV groups (`kv-group`), or query heads per group (`query`: a unit is then one head of every group), with
    `unit_params` parameters each. `channels` are FFN channels with `channel_params` parameters each. `params` is the
    number of all parameters of the layer. `attention_bias_params` and `ffn_bias_params` are those of the bias that the
    recovery would add to each sub-layer. `grouped` says that query heads share KV heads. Units are removed `unit_step` at a
    time, and `units` is a multiple of it. `allowed`, if it is not None, has the only numbers of units that may be removed,
    in ascending order from 0. Unless the user says otherwise, kept widths are multiples of `channel_step`.
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
    allowed: tuple[int, ...] | None = None
    channel_step: int = 1

    @property
    def removable(self) -> Sequence[int]:
        """Numbers of units that can be removed, in ascending order from 0."""
        return range(0, self.units, self.unit_step) if self.allowed is None else self.allowed

    def nearest(self, units: float) -> int:
        """Return the number of units that can be removed that is nearest to a number."""
        if self.allowed is None:
            return self.unit_step * min(round(units / self.unit_step), self.units // self.unit_step - 1)
        return min(self.allowed, key=lambda number: abs(number - units))


@dataclass(frozen=True)
class LayerRemoval:
    """What one layer loses: its ratio r_ℓ, and the numbers of units and channels; it is `pruned` if any is not 0."""

    ratio: float
    units: int
    channels: int

    @property
    def pruned(self) -> bool:
        return self.units > 0 or self.channels > 0


def removed_params(removal: LayerRemoval, shape: LayerShape) -> int:
    """Count the parameters that a layer loses, less the biases that the recovery adds."""
    attention = removal.units * shape.unit_params - shape.attention_bias_params * (removal.units > 0)
    return attention + removal.channels * shape.channel_params - shape.ffn_bias_params * (removal.channels > 0)


def most_removable(shape: LayerShape, round_to: int) -> int:
    """Count the most parameters that a layer can lose while it keeps the fewest units and `round_to` channels."""
    channels = max(shape.channels - round_to, 0)
    units = shape.removable[-1]
    attention = units * shape.unit_params - shape.attention_bias_params * (units > 0)
    return attention + channels * shape.channel_params - shape.ffn_bias_params * (channels > 0)
