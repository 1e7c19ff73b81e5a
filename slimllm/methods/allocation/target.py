"""The number of parameters to remove at a ratio, and what every layer loses to reach it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.methods.allocation.base import Removals, Request, Wanted
from slimllm.methods.allocation.removal import LayerRemoval, LayerShape, most_removable, removed_params
from slimllm.methods.allocation.rounding import default_rounding
from slimllm.methods.allocation.spending import Curves
from slimllm.plugins import calling


@dataclass(frozen=True)
class Allocated:
    """Removals of all layers, the settings that led to them, and notes on what was chosen.

    Attributes:
        removals: What every layer loses.
        target_params: Number of parameters to remove.
        pruned_layers: Number of layers to prune.
        alpha: Temperature of the softmax; 0: there is none.
        round_to: Kept FFN widths are multiples of this.
        notes: Notes for the user: sentences without a full stop.
        coarse: Whether whole heads and rounded widths miss the target.
    """

    removals: list[LayerRemoval]
    target_params: int
    pruned_layers: int
    alpha: float
    round_to: int
    notes: list[str]
    coarse: bool

    def note_of_biases(self, layers_before: int, layers_after: int, format_name: str) -> list[str]:
        """Return a note if only the biases that the format adds miss the target.

        Args:
            layers_before, layers_after: Parameters of all layers.
            format_name: Name of the output format.
        """
        if self.coarse or abs(layers_before - layers_after - self.target_params) <= 0.005 * self.target_params:
            return []
        return [
            f"the layers are {1 - layers_after / layers_before:.2%} smaller instead of "
            f"{self.target_params / layers_before:.2%}: the format, {format_name}, stores additional biases of zero"
        ]


@dataclass(frozen=True)
class Target:
    """Number of parameters to remove, rounding step of the widths, and the ratio as the allocation interprets it."""

    params: int
    round_to: int
    wanted: Wanted


def find_target(shapes: list[LayerShape], config: PruneConfig) -> Target:
    """Derive the target from the settings.

    Raises:
        ValueError: (as InputError) the target is more than the model can lose.
    """
    num_layers, total = len(shapes), sum(shape.params for shape in shapes)
    wanted = config.allocation.wanted(config.ratio, num_layers)
    target = round(wanted.ratio * total)
    at_once = num_layers if config.allocation.alike else 1  # layers that are rounded alike
    multiple_of = math.lcm(config.heads_multiple_of, *(shape.channel_step for shape in shapes))
    round_to = config.round_to or default_rounding(target / at_once, shapes, multiple_of, config.roundings)
    narrowest = min(shape.channels for shape in shapes)
    if round_to > narrowest:
        raise InputError(f"round_to is {round_to}, but the FFN is only {narrowest} channels wide; give less.")
    most = sum(most_removable(shape, round_to) for shape in shapes)
    if config.program and config.round_to is None:  # a smaller step that the program takes leaves less
        for step in (math.lcm(power, multiple_of) for power in config.roundings):
            if most < target and step < round_to:
                round_to = step
                most = sum(most_removable(shape, round_to) for shape in shapes)
    if most < target:
        least = max(shape.units - shape.removable[-1] for shape in shapes)
        units = "one head unit" if least == 1 else f"{least} head units"
        asked = f"A ratio of {config.ratio:g}"
        if wanted.ratio != config.ratio:
            asked += f" with the preset {config.preset} ({wanted.ratio:.4g} of the layers' parameters)"
        raise InputError(
            f"{asked} is more than this model can give while every layer keeps {units} and {round_to} channels; "
            f"the most is {most / total:.3f}."
        )
    return Target(target, round_to, wanted)


def allocate(
    similarity: Sequence[float], shapes: list[LayerShape], config: PruneConfig, curves: list[Curves] | None = None
) -> Allocated:
    """Spread the ratio over the layers by `config.allocation`.

    The layers' ratios are clamped to what a layer can lose, and the excess is spread over the others. Heads take their
    rounded share, and channels make up for the remainder. The rounding error of a layer's width is carried over to the next
    layer, so the total is met to within half a rounding step.

    Args:
        similarity: c_ℓ, the mean cosine between input and output of every layer.
        shapes: The layers' sizes.
        config: The settings.
        curves: Loss curves of every layer, for allocations that measure.

    Raises:
        ValueError: (as InputError) the ratio is more than the model can lose.
    """
    target = find_target(shapes, config)
    request = Request(target.params, target.round_to, shapes, similarity, target.wanted, curves)
    with calling(config.allocation, "allocating the ratio"):
        found = config.allocation.allocate(request)
        _check(found, request, config.allocation.name)
    notes = [*target.wanted.notes, *found.notes]
    total, removed = sum(shape.params for shape in shapes), sum(map(removed_params, found.layers, shapes))
    coarse = abs(removed - target.params) > 0.005 * target.params
    if coarse:
        notes.append(
            f"{removed / total:.4%} of the layers' parameters are removed instead of {target.params / total:.4%}: "
            + (
                f"the allocation {config.allocation.name} asks for that"
                if config.allocation.is_foreign
                else f"{config.allocation.name} came no nearer with whole heads and widths in steps of {target.round_to}"
            )
        )
    return Allocated(found.layers, target.params, found.pruned_layers, target.wanted.alpha, target.round_to, notes, coarse)


def _check(found: Removals, request: Request, name: str) -> None:
    """Raise ValueError (as InputError) unless every layer can lose what the allocation removes."""
    if len(found.layers) != len(request.shapes):
        raise InputError(
            f"The allocation {name} returned {len(found.layers)} removals, but the model has {len(request.shapes)} layers."
        )
    for index, (removal, shape) in enumerate(zip(found.layers, request.shapes)):
        if removal.units not in shape.removable:
            raise InputError(
                f"With the allocation {name}, layer {index} would lose {removal.units} head units, but it can lose "
                f"only {', '.join(map(str, shape.removable))}."
            )
        left = shape.channels - removal.channels
        if not 0 < left <= shape.channels or (removal.channels and left % request.round_to):
            raise InputError(
                f"With the allocation {name}, layer {index} would keep {left} of its {shape.channels} channels, which is "
                f"none, more than there are, or not a multiple of round_to ({request.round_to})."
            )
