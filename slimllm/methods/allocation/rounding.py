"""Rounding of shares to whole heads and rounded widths, with an exact total."""

from __future__ import annotations

import math
from collections.abc import Sequence

from slimllm.methods.allocation.removal import LayerRemoval, LayerShape, removed_params


def default_rounding(target: float, shapes: list[LayerShape], multiple_of: int, powers: Sequence[int]) -> int:
    """Choose the rounding step of widths so that the remaining error, half a step, is within 0.5 % of the target.

    The step is the least common multiple of `multiple_of` and the first of `powers` that achieves this, or else the last
    of them, unless that is over 1/32 of a width. Whatever splits the heads over several devices also splits the channels.
    """
    channel_params, narrowest = max(shape.channel_params for shape in shapes), min(shape.channels for shape in shapes)
    steps = [math.lcm(power, multiple_of) for power in powers]
    usual = steps[-1] if 32 * steps[-1] <= narrowest else multiple_of
    return next((step for step in steps if step * channel_params / 2 <= 0.005 * target), usual)


def softmax_shares(
    similarity: list[float], shapes: list[LayerShape], most: list[int], chosen: list[int], alpha: float, target: int
) -> list[float]:
    """Compute the parameters that every layer loses: in proportion to softmax(alpha c) · params, clamped to `most`.

    What exceeds `most` is spread over the other chosen layers.
    """
    peak = max(similarity[i] for i in chosen)
    weight = {i: math.exp(alpha * (similarity[i] - peak)) * shapes[i].params for i in chosen}
    shares = [0.0] * len(shapes)
    open_layers, left = list(chosen), float(target)
    while open_layers:
        if sum(weight[i] for i in open_layers) < 1e-200 * left:
            weight |= {i: float(shapes[i].params) for i in open_layers}  # a steep softmax has underflowed
        scale = left / sum(weight[i] for i in open_layers)
        clamped = [i for i in open_layers if weight[i] * scale > most[i]]
        if not clamped:
            for i in open_layers:
                shares[i] = weight[i] * scale
            break
        for i in clamped:
            shares[i] = most[i]
            left -= most[i]
        open_layers = [i for i in open_layers if i not in clamped]
    return shares


def published_counts(shares: list[float], shapes: list[LayerShape]) -> list[LayerRemoval]:
    """Remove round(r_ℓ H) heads and round(r_ℓ I) channels of every layer, without making up for rounding errors."""
    result = []
    for share, shape in zip(shares, shapes):
        ratio = share / shape.params
        units = shape.nearest(ratio * shape.units)
        result.append(LayerRemoval(ratio, units, min(round(ratio * shape.channels), shape.channels - 1)))
    return result


def round_shares(shares: list[float], shapes: list[LayerShape], target: int, round_to: int) -> list[LayerRemoval]:
    """Round shares to whole units and rounded widths; the rounding error of a layer is carried over to the next."""
    if target < min(shape.channel_params for shape in shapes) / 2:
        return [LayerRemoval(0.0, 0, 0) for _ in shapes]  # less than half a channel: nothing is removed
    result, carry = [], 0.0
    for share, shape in zip(shares, shapes):
        if share == 0:
            result.append(LayerRemoval(0.0, 0, 0))
            continue
        ratio = share / shape.params
        entry, carry = _nearest(ratio, share + carry, shape, round_to)
        result.append(entry)
    for _ in range(2):  # earlier layers take what clamped widths at the end could not
        for i, (entry, shape) in enumerate(zip(result, shapes)):
            if abs(carry) <= round_to * shape.channel_params / 2 or not entry.pruned:
                continue
            channels = _round_channels(entry.channels + carry / shape.channel_params, shape.channels, round_to)
            carry -= (channels - entry.channels) * shape.channel_params
            result[i] = LayerRemoval(entry.ratio, entry.units, channels)
    for i, (entry, shape) in enumerate(zip(result, shapes)):  # where no channels are left for that, heads take it
        units = entry.units + (shape.unit_step if carry > 0 else -shape.unit_step)
        missed = abs(carry) > round_to * shape.channel_params / 2 + 1  # + 1: by more than float rounding
        # Single units are never so coarse that channels could not make up for them.
        if shape.unit_step > 1 and missed and entry.pruned and units in shape.removable:
            other, left = _fill_up(entry.ratio, units, removed_params(entry, shape) + carry, shape, round_to)
            if abs(left) < abs(carry):
                result[i], carry = other, left
    return result


def _nearest(ratio: float, wanted: float, shape: LayerShape, round_to: int) -> tuple[LayerRemoval, float]:
    """Return the removal of the share of the units, and of channels for the rest, and the remaining parameters.

    If only some numbers of units are allowed, it is the one nearest to the share of those for which channels can make up
    and at least a quarter of them is left.
    """
    if shape.allowed is None:
        return _fill_up(ratio, shape.nearest(ratio * shape.units), wanted, shape, round_to)
    found = [_fill_up(ratio, units, wanted, shape, round_to) for units in shape.allowed]

    def fault(one: tuple[LayerRemoval, float]) -> tuple[bool, float, float]:
        removal, left = one
        narrow = 4 * (shape.channels - removal.channels) < shape.channels
        missed = max(abs(left) - round_to * shape.channel_params / 2, 0)
        return narrow, missed, abs(removal.units - ratio * shape.units)

    return min(found, key=fault)


def _fill_up(ratio: float, units: int, wanted: float, shape: LayerShape, round_to: int) -> tuple[LayerRemoval, float]:
    """Return the removal of `units`, and of channels for the rest of `wanted` parameters, and the remaining parameters."""
    # The biases of the recovery are parameters too: more is removed to make up for them.
    left = wanted + shape.attention_bias_params * (units > 0) - units * shape.unit_params
    channels = _round_channels((left + shape.ffn_bias_params) / shape.channel_params, shape.channels, round_to)
    left += shape.ffn_bias_params * (channels > 0) - channels * shape.channel_params
    return LayerRemoval(ratio, units, channels), left


def _round_channels(removed: float, channels: int, round_to: int) -> int:
    """Return the number of removed channels nearest to `removed` that keeps a multiple of `round_to`, or all channels."""
    if removed <= 0:
        return 0
    kept = max(round((channels - removed) / round_to) * round_to, min(round_to, channels))
    if kept >= channels:
        return 0
    # Keeping every channel is allowed even when their number is not a multiple.
    return 0 if removed < (channels - kept) / 2 else channels - kept
