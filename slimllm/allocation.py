"""How much every layer gives: the paper's softmax over layer importances, to an exact number of parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slimllm.config import PruneConfig
from slimllm.errors import InputError

# Published settings for LLaMA-7B, 32 layers: at each ratio, r, n / 32 and alpha.
PAPER_SETTINGS = {0.2: (0.25, 26 / 32, 10.0), 0.5: (0.55, 30 / 32, 7.0)}


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one decoder layer, in the units in which it is pruned.

    `units` are KV groups (`kv-group`) or query heads per group (`query`), of `unit_params` parameters each;
    `channels` are FFN channels of `channel_params` each; `params` is the layer's whole number of parameters.
    `attention_bias_params` and `ffn_bias_params` are what recovery would add to each sub-layer as a bias; `grouped` says
    that query heads share KV heads.
    """

    units: int
    unit_params: int
    channels: int
    channel_params: int
    params: int
    attention_bias_params: int
    ffn_bias_params: int
    grouped: bool


@dataclass(frozen=True)
class LayerBudget:
    """What one layer gives: its ratio r_ℓ, and how many units and channels are removed. `pruned` if any."""

    ratio: float
    units: int
    channels: int

    @property
    def pruned(self) -> bool:
        return self.units > 0 or self.channels > 0


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


def allocate(similarity: list[float], shapes: list[LayerShape], config: PruneConfig) -> Allocation:
    """Spread the ratio over the layers: r_ℓ = r · n · softmax(alpha · c)_ℓ over the n layers of highest c.

    The layers' ratios are clamped to what a layer can give, and the rest is spread over the others. Heads take their
    rounded share; channels make up what the heads leave over, and what the rounding of widths leaves over goes on to
    the next layer, so that the total is met to half a rounding step.

    Args:
        similarity: c_ℓ, the mean cosine between input and output of every layer.
        shapes: The layers' sizes.
        config: Settings; `pruned_layers`, `alpha` and `round_to` override the defaults.

    Raises:
        ValueError: (as InputError) the ratio is more than the model can give.
    """
    num_layers = len(shapes)
    r, n_fraction, paper_alpha = paper_settings(config.ratio)
    n = config.pruned_layers if config.pruned_layers is not None else max(1, round(n_fraction * num_layers))
    if n > num_layers:
        raise InputError(f"pruned_layers is {n}, but the model has {num_layers} layers; give at most that.")
    alpha = config.alpha if config.alpha is not None else paper_alpha
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
    round_to = config.round_to or (1 if config.preset == "paper" else _default_rounding(target, shapes))
    narrowest = min(shape.channels for shape in shapes)
    if round_to > narrowest:
        raise InputError(f"round_to is {round_to}, but the FFN is only {narrowest} channels wide; give less.")
    most = [_most_removable(shape, round_to) for shape in shapes]
    if sum(most) < target:
        raise InputError(
            f"A ratio of {target_ratio:.4g} is more than this model can give while every layer keeps one head unit and "
            f"{round_to} channels; the most is {sum(most) / total:.3f}."
        )
    chosen = sorted(range(num_layers), key=lambda i: (-similarity[i], i))
    asked = n
    while sum(most[i] for i in chosen[:n]) < target:
        n += 1
    if n > asked:
        notes.append(f"{asked} layers cannot give so much, so {n} are pruned")
    budgets = _softmax_budgets(similarity, shapes, most, chosen[:n], alpha, target)
    # The paper has no grouped queries: there, and in the default mode, channels make up what whole groups leave over.
    as_published = config.preset == "paper" and not any(shape.grouped for shape in shapes)
    rounded = _published_counts(budgets, shapes) if as_published else _round_budgets(budgets, shapes, target, round_to)
    removed = sum(_removed_params(budget, shape) for budget, shape in zip(rounded, shapes))
    coarse = abs(removed - target) > 0.005 * target
    if coarse:
        notes.append(
            f"{removed / total:.4%} of the layers' parameters are removed instead of {target / total:.4%}: whole heads and "
            f"widths in steps of {round_to} come no nearer"
        )
    return Allocation(rounded, target, n, alpha, round_to, notes, coarse)


def _removed_params(budget: LayerBudget, shape: LayerShape) -> int:
    """Parameters that a layer gives, less the biases that recovery adds."""
    attention = budget.units * shape.unit_params - shape.attention_bias_params * (budget.units > 0)
    return attention + budget.channels * shape.channel_params - shape.ffn_bias_params * (budget.channels > 0)


def _default_rounding(target: int, shapes: list[LayerShape]) -> int:
    """The largest power of two up to 64 whose half step, the error that remains, is within 0.5 % of the target."""
    channel_params = max(shape.channel_params for shape in shapes)
    return next((step for step in (64, 32, 16, 8, 4, 2) if step * channel_params / 2 <= 0.005 * target), 1)


def _most_removable(shape: LayerShape, round_to: int) -> int:
    channels = max(shape.channels - round_to, 0)
    attention = (shape.units - 1) * shape.unit_params - shape.attention_bias_params * (shape.units > 1)
    return attention + channels * shape.channel_params - shape.ffn_bias_params * (channels > 0)


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
        units = min(round(ratio * shape.units), shape.units - 1)
        # The biases of the recovery are parameters too, and are made up for.
        left = budget + carry + shape.attention_bias_params * (units > 0) - units * shape.unit_params
        channels = _round_channels((left + shape.ffn_bias_params) / shape.channel_params, shape.channels, round_to)
        carry = left + shape.ffn_bias_params * (channels > 0) - channels * shape.channel_params
        result.append(LayerBudget(ratio, units, channels))
    for _ in range(2):  # what clamped widths at the end could not take, earlier layers do
        for i, (entry, shape) in enumerate(zip(result, shapes)):
            if abs(carry) <= round_to * shape.channel_params / 2 or not entry.pruned:
                continue
            channels = _round_channels(entry.channels + carry / shape.channel_params, shape.channels, round_to)
            carry -= (channels - entry.channels) * shape.channel_params
            result[i] = LayerBudget(entry.ratio, entry.units, channels)
    return result


def _round_channels(removed: float, channels: int, round_to: int) -> int:
    """The number of removed channels nearest to `removed` for which the kept width is a multiple of round_to, or all."""
    if removed <= 0:
        return 0
    kept = max(round((channels - removed) / round_to) * round_to, min(round_to, channels))
    if kept >= channels:
        return 0
    # Keeping every channel is allowed even when their number is no multiple.
    return 0 if removed < (channels - kept) / 2 else channels - kept
