"""Wanda-sp: the structured form of Wanda (arXiv 2306.11695, 2312.11983), on slimllm's statistics.

A weight's importance is |W[k,c]|·‖X[:,c]‖₂, a channel's the mean over the outputs k. The lowest fifth of every layer goes.
"""

from __future__ import annotations

import torch
from harness import input_statistics, keep_channels, run
from transformers import PreTrainedModel

from slimllm.statistics import ColumnStatistics


def wanda_sp(down_weight: torch.Tensor, inputs: ColumnStatistics) -> torch.Tensor:
    """Importance of every channel (I,) from down_proj.weight (D, I) and the statistics of its inputs."""
    return down_weight.abs().mean(0) * inputs.norms()


def prune(model: PreTrainedModel, token_ids: torch.Tensor, ratio: float = 0.2) -> None:
    """Remove that fraction of every FFN's channels, in place."""
    for name, inputs in input_statistics(model, token_ids, "mlp.down_proj", ColumnStatistics).items():
        ffn = model.get_submodule(name.removesuffix(".down_proj"))
        importance = wanda_sp(ffn.down_proj.weight, inputs)
        keep = importance.argsort()[round(ratio * len(importance)) :].sort().values
        keep_channels(ffn, keep)


if __name__ == "__main__":
    run(prune)
