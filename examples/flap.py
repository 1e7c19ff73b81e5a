"""FLAP's fluctuation metric and bias compensation (arXiv 2312.11983), on slimllm's statistics.

A channel whose input hardly fluctuates can be replaced by its mean: importance Var(Z[:,c])·‖W[:,c]‖₂², and the mean
contribution of the removed channels becomes a bias. Importances are standardised in each layer and compared over all of
them, so layers lose different numbers of channels: a fifth in all.
"""

from __future__ import annotations

import torch
from harness import input_statistics, keep_channels, run
from transformers import PreTrainedModel

from slimllm.statistics import ColumnStatistics


def fluctuation(down_weight: torch.Tensor, inputs: ColumnStatistics) -> torch.Tensor:
    """Importance of every channel (I,) from down_proj.weight (D, I) and the statistics of its inputs."""
    variance = inputs.variance() * inputs.count / (inputs.count - 1)
    return variance * down_weight.double().square().sum(0)


def compensation(down_weight: torch.Tensor, inputs: ColumnStatistics, keep: torch.Tensor) -> torch.Tensor:
    """The bias (D,) that stands for the removed channels."""
    removed = inputs.mean().index_fill(0, keep, 0.0)
    return down_weight.double() @ removed


def prune(model: PreTrainedModel, token_ids: torch.Tensor, ratio: float = 0.2) -> None:
    """Remove that fraction of all FFN channels, in place."""
    statistics = input_statistics(model, token_ids, "mlp.down_proj", ColumnStatistics)
    scores = {name: fluctuation(model.get_submodule(name).weight, inputs) for name, inputs in statistics.items()}
    scores = {name: (score - score.mean()) / score.std() for name, score in scores.items()}
    everything = torch.cat(list(scores.values())).sort().values
    threshold = everything[round(ratio * len(everything))]
    for name, score in scores.items():
        keep = (score >= threshold).nonzero().flatten()
        bias = compensation(model.get_submodule(name).weight, statistics[name], keep)
        keep_channels(model.get_submodule(name.removesuffix(".down_proj")), keep, bias)


if __name__ == "__main__":
    run(prune)
