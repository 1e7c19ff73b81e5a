"""The dense pass of the allocations that are measured: what every layer would lose, at every number of units and channels.

`auto`: J of `slimllm.methods.criteria.elimination` over how much is gone, from the dense model's activations, divided by
the mean square of the residual stream behind the sub-layer. With token weights `norm` that division is made token by token,
as the next norm does.

`flap`: FLAP's scores (arXiv 2312.11983), standardised over the columns of each sub-layer and averaged over a head's; a
curve is their sum over what goes, times its parameters, so that a budget is spent at one threshold for all.
"""

from __future__ import annotations

import torch

from slimllm.config import PruneConfig
from slimllm.methods.allocation.budget import LayerShape
from slimllm.methods.allocation.spending import Curves, sampled
from slimllm.methods.criteria.elimination import Surgeon, eliminate_channels, eliminate_heads
from slimllm.methods.criteria.scores import fluctuation
from slimllm.models.layer import Layer, inner_activations
from slimllm.runtime.hidden_states import Stream
from slimllm.runtime.memory import trim
from slimllm.runtime.progress import Stopwatch
from slimllm.statistics import ColumnStatistics, GramStatistics
from slimllm.statistics.tokens import layer_similarity

# What attention loses counts so often: heads that one text does not need another does. With 1 instead, SmolLM2 mostly
# loses more on text of another kind than the calibration's, up to half as much again (benchmarks/NOTES.md).
ATTENTION_WEIGHT = 2.0


def measure_layer(
    layer: Layer, stream: Stream, index: int, shape: LayerShape, config: PruneConfig, watch: Stopwatch
) -> tuple[torch.Tensor, Curves]:
    """Let the residual stream pass a dense layer; its similarity, summed over all tokens, and its curves.

    The curves are empty where the stream is not finite any more.
    """
    spec, device = layer.spec, layer.device
    projections = (layer.linear(spec.o_proj), layer.linear(spec.down_proj))
    norms = (layer.module.get_submodule(spec.attention_norm), layer.module.get_submodule(spec.ffn_norm))
    kind = GramStatistics if config.allocation == "auto" else ColumnStatistics
    gram_device = "cpu" if kind is GramStatistics and stream.placement.gram == "host" else device
    statistics = [kind(projections[0].in_features, device), kind(projections[1].in_features, gram_device)]
    similarity = torch.zeros((), dtype=torch.float64, device=device)
    squares = torch.zeros(2, dtype=torch.float64, device=device)  # Σ_t of the stream's mean square behind each sub-layer
    for batch in stream:
        hidden_in = hidden = batch.hidden.load()
        for part, (name, project, norm) in enumerate(zip((spec.o_proj, spec.down_proj), projections, norms)):
            with watch("dense pass"):
                kwargs = batch.kwargs[index] if part == 0 else None
                inner = inner_activations(layer, name, norm(hidden), kwargs)
                output = project(inner)
            with watch("statistics"):
                weights = layer.weights(name, hidden, output)
                squares[part] += weights.reciprocal().sum(dtype=torch.float64)
                statistics[part].update(inner, weights if config.token_weights == "norm" else None)
            with watch("dense pass"):
                hidden = hidden + layer.behind(name, output).view_as(hidden)
        with watch("statistics"):
            similarity += layer_similarity(hidden_in, hidden)
            batch.hidden.save(hidden)
    del hidden_in, hidden, inner, output
    with watch("statistics"):
        stream.ranks.add_up(*statistics)
        stream.ranks.sum_(squares, similarity)
    if not bool(similarity.isfinite()):
        return similarity, Curves([], [])
    with watch("allocation"):

        def measured() -> list[list[float]]:
            if config.allocation == "auto":
                return [sampled(costs) for costs in _by_elimination(layer, statistics, squares, config)]
            return [sampled(costs) for costs in _by_fluctuation(layer, statistics, shape, config)]

        curves = Curves(*stream.ranks.made_by_first(measured))
    trim()
    return similarity, curves


def _by_elimination(
    layer: Layer, statistics: list[GramStatistics | ColumnStatistics], squares: torch.Tensor, config: PruneConfig
) -> list[torch.Tensor]:
    """What every round of units, and every channel, adds to J, in the order in which they go."""
    sizes, costs = layer.sizes(), []
    units, groups = sizes.units(config.head_unit)
    for part, name in enumerate((layer.spec.o_proj, layer.spec.down_proj)):
        one = statistics[part]
        assert isinstance(one, GramStatistics)
        surgeon = Surgeon(layer.seen(name), one)
        if part == 1:
            found = eliminate_channels(surgeon, sizes.intermediate_size).costs
        else:
            found = eliminate_heads(surgeon, units, units // groups, groups).costs.view(-1, groups).sum(1)
        # J is a mean over tokens, weighted or not, of a square summed over the outputs.
        weight = one.mass if config.token_weights == "norm" else one.count**2 / float(squares[part])
        weight *= ATTENTION_WEIGHT if part == 0 else 1.0
        costs.append(found * (weight / one.count / len(layer.linear(name).weight)))
        del surgeon
        trim()
    return costs


def _by_fluctuation(
    layer: Layer, statistics: list[GramStatistics | ColumnStatistics], shape: LayerShape, config: PruneConfig
) -> list[torch.Tensor]:
    """Scores, in the order in which units and channels go, times parameters."""
    (units, groups), costs = layer.sizes().units(config.head_unit), []
    for part, name in enumerate((layer.spec.o_proj, layer.spec.down_proj)):
        score = fluctuation(layer.seen(name), statistics[part].variance().to(layer.device)).cpu()
        deviation = float(score.std(correction=0))
        score = (score - score.mean()) / deviation if deviation > 0 else torch.zeros_like(score)
        if part == 1:
            costs.append(score.sort().values * shape.channel_params)
            continue
        by_unit = score.view(units, -1).mean(1).view(groups, -1).sort(1).values.mean(0)
        costs.append(by_unit * shape.unit_params)
    return costs
