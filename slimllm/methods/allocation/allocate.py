"""How much every layer gives, to an exact number of parameters: the paper's softmax over layer importances, or measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimllm.config import PruneConfig
from slimllm.errors import InputError
from slimllm.methods.allocation.budget import LayerBudget, LayerShape, most_removable, removed_params
from slimllm.methods.allocation.spending import Curves, spend

# Published settings for LLaMA-7B, 32 layers: at each ratio, r, n / 32 and alpha.
PAPER_SETTINGS = {0.2: (0.25, 26 / 32, 10.0), 0.5: (0.55, 30 / 32, 7.0)}


@dataclass(frozen=True)
class Allocation:
    """The budgets of all layers, the settings they follow from, and one sentence for each choice worth knowing."""

    budgets: list[LayerBudget]
    target_params: int
    pruned_layers: int
    alpha: float
    round_to: int
    notes: list[str]
    coarse: bool  # whole heads and rounded widths miss the target

    def note_of_biases(self, layers_before: int, layers_after: int, format_name: str) -> list[str]:
        """A note where only what the format adds misses the target; parameters of all layers before and after."""
        if self.coarse or abs(layers_before - layers_after - self.target_params) <= 0.005 * self.target_params:
            return []
        return [
            f"the layers are {1 - layers_after / layers_before:.2%} smaller instead of "
            f"{self.target_params / layers_before:.2%}: the format, {format_name}, stores biases of zero beside its weights"
        ]


def paper_settings(ratio: float) -> tuple[float, float, float]:
    """The published (r, n / num_layers, alpha) at a ratio: linear between 20 % and 50 %, at constant n and alpha and
    proportional r outside."""
    low, high = min(PAPER_SETTINGS), max(PAPER_SETTINGS)
    nearest = min(max(ratio, low), high)
    weight = (nearest - low) / (high - low)
    r, n_fraction, alpha = ((1 - weight) * a + weight * b for a, b in zip(PAPER_SETTINGS[low], PAPER_SETTINGS[high]))
    return r * ratio / nearest, n_fraction, alpha


@dataclass(frozen=True)
class Target:
    """How many parameters go, in widths of which step, from how many layers at which alpha; and notes on it."""

    params: int
    round_to: int
    pruned_layers: int
    alpha: float
    notes: list[str]


def find_target(shapes: list[LayerShape], config: PruneConfig) -> Target:
    """What the settings ask of a model.

    Raises:
        ValueError: (as InputError) it is more than the model can give.
    """
    num_layers = len(shapes)
    if config.allocation == "layer-importance":
        r, n_fraction, paper_alpha = paper_settings(config.ratio)
        n = config.pruned_layers if config.pruned_layers is not None else max(1, round(n_fraction * num_layers))
        alpha = config.alpha if config.alpha is not None else paper_alpha
    else:
        r, n, alpha = config.ratio, num_layers, 0.0
    if n > num_layers:
        raise InputError(f"pruned_layers is {n}, but the model has {num_layers} layers; give at most that.")
    total = sum(shape.params for shape in shapes)
    notes = []
    if config.preset == "paper":
        target_ratio = r * n / num_layers
        notes.append(
            f"paper preset: r={r:.4g} on n={n} of {num_layers} layers, alpha={alpha:.4g}: "
            f"{target_ratio:.2%} of the layers' parameters"
        )
        if not any(math.isclose(config.ratio, known) for known in PAPER_SETTINGS):
            how = "interpolated" if min(PAPER_SETTINGS) < config.ratio < max(PAPER_SETTINGS) else "extrapolated"
            notes.append(f"the paper gives settings for 20 % and 50 %; those for {config.ratio:.4g} are {how}")
    else:
        target_ratio = config.ratio
    target = round(target_ratio * total)
    at_once = num_layers if config.allocation == "uniform" else 1  # layers that are rounded alike
    round_to = config.round_to or (
        1 if config.preset == "paper" else _default_rounding(target / at_once, shapes, config.heads_multiple_of)
    )
    narrowest = min(shape.channels for shape in shapes)
    if round_to > narrowest:
        raise InputError(f"round_to is {round_to}, but the FFN is only {narrowest} channels wide; give less.")
    most = sum(most_removable(shape, round_to) for shape in shapes)
    if most < target:
        step = max(shape.unit_step for shape in shapes)
        units = "one head unit" if step == 1 else f"{step} head units"
        asked = f"A ratio of {config.ratio:g}"
        if config.preset == "paper":
            asked += f" by the preset paper (which makes {target_ratio:.4g} of the layers' parameters of it)"
        raise InputError(
            f"{asked} is more than this model can give while every layer keeps {units} and {round_to} channels; "
            f"the most is {most / total:.3f}."
        )
    return Target(target, round_to, n, alpha, notes)


def allocate(
    similarity: list[float], shapes: list[LayerShape], config: PruneConfig, curves: list[Curves] | None = None
) -> Allocation:
    """Spread the ratio over the layers, by `config.allocation`.

    `layer-importance`: r_ℓ = r · n · softmax(alpha · c)_ℓ over the n layers of highest c. `uniform`: the same for all,
    to the last channel where the layers are alike, so that the result can be a stock model. Otherwise the layers' ratios
    are clamped to what a layer can give, and the rest is spread over the others. Heads take their rounded share;
    channels make up what the heads leave over, and what the rounding of widths leaves over goes on to the next layer,
    so that the total is met to half a rounding step. With curves (`auto`, `flap`) the whole is spent where it costs
    least, see `slimllm.methods.allocation.spending`.

    Args:
        similarity: c_ℓ, the mean cosine between input and output of every layer.
        shapes: The layers' sizes.
        config: Settings; `pruned_layers`, `alpha` and `round_to` override the defaults.
        curves: What every layer loses, for the allocations that are measured.

    Raises:
        ValueError: (as InputError) the ratio is more than the model can give.
    """
    wanted = find_target(shapes, config)
    target, round_to, n, notes = wanted.params, wanted.round_to, wanted.pruned_layers, wanted.notes
    if curves is not None:
        rounded = []
        for (units, channels), shape in zip(spend(curves, shapes, target, round_to), shapes):
            removed = removed_params(LayerBudget(0.0, units, channels), shape)
            rounded.append(LayerBudget(removed / shape.params, units, channels))
        n = sum(budget.pruned for budget in rounded)
    else:
        most = [most_removable(shape, round_to) for shape in shapes]
        chosen = sorted(range(len(shapes)), key=lambda i: (-similarity[i], i))
        while sum(most[i] for i in chosen[:n]) < target:
            n += 1
        if n > wanted.pruned_layers:
            notes.append(f"{wanted.pruned_layers} layers cannot give so much, so {n} are pruned")
        budgets = _softmax_budgets(similarity, shapes, most, chosen[:n], wanted.alpha, target)
        # The paper has no grouped queries: there, and in the default mode, channels make up what whole groups leave over.
        as_published = config.preset == "paper" and not any(shape.grouped for shape in shapes)
        if as_published:
            rounded = _published_counts(budgets, shapes)
        elif config.allocation == "uniform" and all(shape == shapes[0] for shape in shapes):
            rounded = _round_budgets(budgets[:1], shapes[:1], round(budgets[0]), round_to) * len(shapes)
        else:
            rounded = _round_budgets(budgets, shapes, target, round_to)
    total, removed = sum(shape.params for shape in shapes), sum(map(removed_params, rounded, shapes))
    coarse = abs(removed - target) > 0.005 * target
    if coarse:
        notes.append(
            f"{removed / total:.4%} of the layers' parameters are removed instead of {target / total:.4%}: whole heads and "
            f"widths in steps of {round_to} come no nearer"
        )
    return Allocation(rounded, target, n, wanted.alpha, round_to, notes, coarse)


def _default_rounding(target: float, shapes: list[LayerShape], multiple_of: int) -> int:
    """The step of widths whose half, the error that remains, is within 0.5 % of the target.

    It is the least common multiple of `multiple_of` and the largest power of two up to 64 for which that holds, or else
    `multiple_of`: what splits the heads over several devices splits the channels, too.
    """
    channel_params = max(shape.channel_params for shape in shapes)
    steps = (math.lcm(step, multiple_of) for step in (64, 32, 16, 8, 4, 2))
    return next((step for step in steps if step * channel_params / 2 <= 0.005 * target), multiple_of)


def _softmax_budgets(
    similarity: list[float], shapes: list[LayerShape], most: list[int], chosen: list[int], alpha: float, target: int
) -> list[float]:
    """Parameters every layer gives: proportional to softmax(alpha c) · params, clamped, the excess spread again."""
    peak = max(similarity[i] for i in chosen)
    weight = {i: math.exp(alpha * (similarity[i] - peak)) * shapes[i].params for i in chosen}
    budgets = [0.0] * len(shapes)
    open_layers, left = list(chosen), float(target)
    while open_layers:
        if sum(weight[i] for i in open_layers) < 1e-200 * left:
            weight |= {i: float(shapes[i].params) for i in open_layers}  # a steep softmax has run out of numbers
        scale = left / sum(weight[i] for i in open_layers)
        clamped = [i for i in open_layers if weight[i] * scale > most[i]]
        if not clamped:
            for i in open_layers:
                budgets[i] = weight[i] * scale
            break
        for i in clamped:
            budgets[i] = most[i]
            left -= most[i]
        open_layers = [i for i in open_layers if i not in clamped]
    return budgets


def _published_counts(budgets: list[float], shapes: list[LayerShape]) -> list[LayerBudget]:
    """round(r_ℓ H) heads and round(r_ℓ I) channels of every layer, nothing made up for."""
    result = []
    for budget, shape in zip(budgets, shapes):
        ratio = budget / shape.params
        units = min(round(ratio * shape.units), shape.units - 1)
        result.append(LayerBudget(ratio, units, min(round(ratio * shape.channels), shape.channels - 1)))
    return result


def _round_budgets(budgets: list[float], shapes: list[LayerShape], target: int, round_to: int) -> list[LayerBudget]:
    """Whole units and rounded widths; the rounding error of a layer is carried on to the next."""
    if target < min(shape.channel_params for shape in shapes) / 2:
        return [LayerBudget(0.0, 0, 0) for _ in shapes]  # less than half a channel: the identity
    result, carry = [], 0.0
    for budget, shape in zip(budgets, shapes):
        if budget == 0:
            result.append(LayerBudget(0.0, 0, 0))
            continue
        ratio = budget / shape.params
        units = shape.unit_step * min(round(ratio * shape.units / shape.unit_step), shape.units // shape.unit_step - 1)
        entry, carry = _fill_up(ratio, units, budget + carry, shape, round_to)
        result.append(entry)
    for _ in range(2):  # what clamped widths at the end could not take, earlier layers do
        for i, (entry, shape) in enumerate(zip(result, shapes)):
            if abs(carry) <= round_to * shape.channel_params / 2 or not entry.pruned:
                continue
            channels = _round_channels(entry.channels + carry / shape.channel_params, shape.channels, round_to)
            carry -= (channels - entry.channels) * shape.channel_params
            result[i] = LayerBudget(entry.ratio, entry.units, channels)
    for i, (entry, shape) in enumerate(zip(result, shapes)):  # and where no channels are left to do so, heads
        units = entry.units + (shape.unit_step if carry > 0 else -shape.unit_step)
        missed = abs(carry) > round_to * shape.channel_params / 2 + 1  # not by the rounding of a float
        # Single units are never so coarse that channels could not make up for them.
        if shape.unit_step > 1 and missed and entry.pruned and 0 <= units < shape.units:
            other, left = _fill_up(entry.ratio, units, removed_params(entry, shape) + carry, shape, round_to)
            if abs(left) < abs(carry):
                result[i], carry = other, left
    return result


def _fill_up(ratio: float, units: int, wanted: float, shape: LayerShape, round_to: int) -> tuple[LayerBudget, float]:
    """A layer that gives so many units, and channels for the rest of `wanted` parameters; and what is left of them."""
    # The biases of the recovery are parameters too, and are made up for.
    left = wanted + shape.attention_bias_params * (units > 0) - units * shape.unit_params
    channels = _round_channels((left + shape.ffn_bias_params) / shape.channel_params, shape.channels, round_to)
    left += shape.ffn_bias_params * (channels > 0) - channels * shape.channel_params
    return LayerBudget(ratio, units, channels), left


def _round_channels(removed: float, channels: int, round_to: int) -> int:
    """The number of removed channels nearest to `removed` for which the kept width is a multiple of round_to, or all."""
    if removed <= 0:
        return 0
    kept = max(round((channels - removed) / round_to) * round_to, min(round_to, channels))
    if kept >= channels:
        return 0
    # Keeping every channel is allowed even when their number is no multiple.
    return 0 if removed < (channels - kept) / 2 else channels - kept
