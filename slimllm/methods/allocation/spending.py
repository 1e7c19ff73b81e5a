"""Removal of an exact number of parameters over the whole model: every step is taken where a parameter costs least.

The loss of a sub-layer is a curve over how much of it is removed. Steps follow the lower convex hulls of these curves, in
the order of the hulls' slopes. They minimise the sum of all hulls at every total that they reach.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from slimllm.methods.allocation.removal import LayerShape

# Points of a curve, evenly spaced from no channels to all of them.
POINTS = 257


@dataclass(frozen=True)
class Curves:
    """Loss curves of a layer, at evenly spaced numbers of removed units and of removed channels, from none to all."""

    attention: list[float]
    ffn: list[float]

    def times(self, attention: float, ffn: float) -> Curves:
        """Return the curves, each multiplied by a factor."""
        return Curves([attention * value for value in self.attention], [ffn * value for value in self.ffn])


@dataclass(order=True)
class _Step:
    slope: float
    layer: int
    part: str  # attention before ffn
    number: int  # index among the sub-layer's steps
    count: int = field(compare=False)  # units or channels
    params: int = field(compare=False)


def sampled(costs: torch.Tensor) -> list[float]:
    """Sample a curve from the costs of all units or channels, in the order of removal, (I,)."""
    curve = torch.cat([costs.new_zeros(1), costs.cumsum(0)])
    at = torch.linspace(0, len(costs), min(POINTS, len(curve)), dtype=torch.float64)
    before = at.floor().long().clamp(max=len(costs) - 1)
    curve = curve.double().cpu()
    values: list[float] = torch.lerp(curve[before], curve[before + 1], at - before).tolist()
    return values


def spend(curves: list[Curves], shapes: list[LayerShape], target: int, round_to: int) -> list[tuple[int, int]]:
    """Choose how many units and channels every layer loses, so that the total comes nearest to the target.

    Args:
        curves: Loss curves of every layer.
        shapes: The layers' sizes.
        target: Number of parameters to remove, net of the biases that the recovery adds.
        round_to: Kept widths are multiples of this. Every layer keeps at least this many channels, and one step of units.
    """
    of_layers = (_steps(i, curve, shape, round_to) for i, (curve, shape) in enumerate(zip(curves, shapes)))
    steps = sorted(step for of_layer in of_layers for step in of_layer)
    taken: list[_Step] = []
    skipped: dict[tuple[int, str], _Step] = {}  # first steps of units that exceed what is left; later ones are skipped too
    left = target
    for step in steps:
        if (step.layer, step.part) in skipped:
            continue
        if step.params <= left:
            taken.append(step)
            left -= step.params
        elif step.part == "attention":
            skipped[step.layer, step.part] = step
        else:
            if step.params - left < left:
                taken.append(step)
            break
    else:
        _take_another_unit(taken, list(skipped.values()), left)
    given: Counter[tuple[int, str]] = Counter()
    for step in taken:
        given[step.layer, step.part] += step.count
    return [(given[layer, "attention"], given[layer, "ffn"]) for layer in range(len(shapes))]


def _take_another_unit(taken: list[_Step], skipped: list[_Step], left: int) -> None:
    """Take one more step of units if all that are left exceed the rest of the target; restore the costliest channels."""
    channels = [step for step in taken if step.part == "ffn"]
    if not skipped or (channels and left <= min(step.params for step in channels) / 2):
        return
    unit = min(skipped)
    after, back = left - unit.params, 0
    while back < len(channels) and abs(after + channels[-1 - back].params) < abs(after):
        after += channels[-1 - back].params
        back += 1
    if abs(after) < left:
        units = [step for step in taken if step.part == "attention"]
        taken[:] = [*units, unit, *channels[: len(channels) - back]]


def _steps(layer: int, curve: Curves, shape: LayerShape, round_to: int) -> Iterable[_Step]:
    units = shape.removable
    widths = range((shape.channels - 1) // round_to * round_to, 0, -round_to)
    channels = [0, *(shape.channels - width for width in widths)]
    for part, values, counts, total, params, bias in (
        ("attention", curve.attention, units, shape.units, shape.unit_params, shape.attention_bias_params),
        ("ffn", curve.ffn, channels, shape.channels, shape.channel_params, shape.ffn_bias_params),
    ):
        if not all(map(math.isfinite, values)):
            raise ValueError(f"the curve of layer {layer}'s {part} has values that are not finite.")
        costs, slope = hull(values, [count / total for count in counts]), -math.inf
        for number in range(1, len(counts)):
            size = (counts[number] - counts[number - 1]) * params
            slope = max(slope, (costs[number] - costs[number - 1]) / size)  # rounding must not change their order
            count = counts[number] - counts[number - 1]
            yield _Step(slope, layer, part, number, count, size - (bias if number == 1 else 0))


def hull(values: list[float], at: list[float]) -> list[float]:
    """Evaluate the lower convex hull of a curve over [0, 1], given at even distances, at ascending points."""
    last = len(values) - 1
    corners: list[int] = []
    for i in range(last + 1):
        while len(corners) > 1 and _above(values, corners[-2], corners[-1], i):
            corners.pop()
        corners.append(i)
    result, corner = [], 0
    for x in at:
        position = x * last
        while corner + 2 < len(corners) and corners[corner + 1] < position:
            corner += 1
        first, second = corners[corner], corners[corner + 1]
        result.append(values[first] + (values[second] - values[first]) * (position - first) / (second - first))
    return result


def _above(values: list[float], first: int, middle: int, last: int) -> bool:
    """Return whether the middle point lies on or above the line through the other two."""
    return (values[middle] - values[first]) * (last - first) >= (values[last] - values[first]) * (middle - first)
