"""What the examples share: statistics from the inputs of modules, FFN channels taken out, perplexity before and after.

Each example is a method of its own, in a function of tensors, on the operations and statistics of slimllm, and runs as
`python examples/NAME.py [MODEL]` on any LLaMA-type model (the bundled tiny one by default).
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

import slimllm
from slimllm.calibration import bundled_text, draw_windows, tokenize, window_bos
from slimllm.statistics import ColumnStatistics, GramStatistics

Statistics = TypeVar("Statistics", ColumnStatistics, GramStatistics)


@torch.no_grad()
def input_statistics(
    model: nn.Module, token_ids: torch.Tensor, suffix: str, kind: type[Statistics]
) -> dict[str, Statistics]:
    """Statistics of the inputs of all modules whose names end in `suffix`, over windows (samples, seq_len).

    `kind` is ColumnStatistics, in O(features) memory for each module, or GramStatistics, in O(features²).
    """
    statistics: dict[str, Statistics] = {}

    def collect(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)  # (num_tokens, features)
        statistics.setdefault(name, kind(x.shape[1], x.device)).update(x)

    handles = []
    for name, module in model.named_modules():
        if name.endswith(suffix):
            handles.append(module.register_forward_pre_hook(partial(collect, name)))
    for batch in token_ids.split(8):
        model(batch)
    for handle in handles:
        handle.remove()
    return statistics


def keep_channels(ffn: Any, keep: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Leave only some channels of a gated FFN, in place; `bias` (D,) is added to its output."""
    for projection in (ffn.gate_proj, ffn.up_proj):
        projection.weight = nn.Parameter(projection.weight[keep])
        if projection.bias is not None:
            projection.bias = nn.Parameter(projection.bias[keep])
    down = ffn.down_proj
    down.weight = nn.Parameter(down.weight[:, keep])
    if bias is not None:
        down.bias = nn.Parameter(bias.to(down.weight) + (down.bias if down.bias is not None else 0))


def run(prune: Callable[[PreTrainedModel, torch.Tensor], None]) -> None:
    """Load the model named on the command line, prune it in place, and print its perplexity before and after."""
    parser = argparse.ArgumentParser(description=inspect.getmodule(prune).__doc__)
    default = str(resources.files("slimllm") / "calibration" / "data" / "stories260k")
    parser.add_argument("model", nargs="?", default=default, help="folder, GGUF file or hub id; else the bundled model")
    try:
        model, tokenizer = slimllm.load(parser.parse_args().model)
    except slimllm.InputError as error:
        parser.error(str(error))
    bos = window_bos(tokenizer, "auto")  # a model that knows no text without one is not itself without it
    text = tokenize(tokenizer, [bundled_text("calibration")])
    calibration = draw_windows(text, samples=32, seq_len=128, seed=0, bos_token_id=bos)
    held_out = tokenize(tokenizer, [bundled_text("evaluation")])
    before = slimllm.perplexity(model, held_out, max_windows=32, bos_token_id=bos)
    with torch.no_grad():
        prune(model, calibration.to(model.device))
    print(f"perplexity {before:.2f} -> {slimllm.perplexity(model, held_out, max_windows=32, bos_token_id=bos):.2f}")
