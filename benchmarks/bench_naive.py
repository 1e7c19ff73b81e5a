"""The engine against the plain algorithm (naive.py) on one layer: everything after its forward pass, the same choices.

    python benchmarks/bench_naive.py [--widths 256 512 1024 2048] [--tokens 1024 4096 16384 65536]

Both get the same activations of `tokens` tokens: the inputs of o_proj, down_proj and the FFN, and the outputs. The
magnitudes of heads and channels differ widely, as in real models. Both choose heads and channels and fit both regressions
of the paper; they must make the same choices. Widths are measured with 4096 tokens, numbers of tokens at a width of 512.
Memory is the increase of the peak over the memory before the call. Rows go to benchmarks/results/naive.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from common import append_results
from naive import prune_layer
from rich.console import Console
from rich.table import Table

from slimllm import ops
from slimllm.methods.criteria.slimllm import input_importance
from slimllm.methods.moments import OutputMoments, unit_moments
from slimllm.methods.selection import select_channels
from slimllm.runtime import memory
from slimllm.runtime.stopwatch import Stopwatch
from slimllm.statistics import ColumnStatistics, GramStatistics, PairedMoments, mean_output

# hidden size: heads, intermediate size
SIZES = {256: (4, 704), 512: (8, 1408), 1024: (16, 2816), 2048: (32, 5632), 4096: (32, 11008)}
RATIO, BATCH = 0.2, 1024
Activations = tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def make_layer(width: int, tokens: int, device: torch.device) -> tuple[Activations, dict[str, torch.Tensor]]:
    """Make activations with common directions and heavy tails over features, and weights."""
    heads, channels = SIZES[width]
    generator = torch.Generator(device).manual_seed(width + tokens)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def activations(features: int, scales: torch.Tensor) -> torch.Tensor:
        x = normal(tokens, features)
        x += normal(tokens, 32) @ normal(32, features) / 6  # correlates heads and channels
        return x.mul_(scales)

    per_head = (0.5 * normal(heads)).exp().repeat_interleave(width // heads)
    x, inner = activations(width, (0.3 * normal(width)).exp()), activations(width, per_head)
    z = activations(channels, (0.5 * normal(channels)).exp())
    weights = {
        "o": normal(width, width) / width**0.5,
        "down": normal(width, channels) / channels**0.5,
        "gate": normal(channels, width) / width**0.5,
        "up": normal(channels, width) / width**0.5,
    }
    return ((inner, inner @ weights["o"].T), (x, z, z @ weights["down"].T)), weights


def engine(
    activations: Activations,
    weights: dict[str, torch.Tensor],
    heads: int,
    pruned_heads: int,
    pruned_channels: int,
    watch: Stopwatch,
) -> tuple[list[int], list[int]]:
    """Do the work of `slimllm.pruning.sublayer` on a layer's activations, batch by batch; return kept heads, channels."""
    (inner, _), (x, z, y) = activations
    device, hidden_size = inner.device, weights["o"].shape[0]
    with watch("statistics"):
        attention = GramStatistics(inner.shape[1], device)
        for part in inner.split(BATCH):
            attention.update(part)
    with watch("selection"):
        covariance = ops.head_covariance(weights["o"], attention.covariance(), heads)
        kept_heads = ops.pearson_greedy(covariance, pruned_heads).cpu()
    with watch("recovery"):
        unit_moments(covariance, mean_output(weights["o"], attention.mean(), heads), kept_heads).affine_fit()
        del covariance, attention
    with watch("statistics"):
        inputs, channels = ColumnStatistics(hidden_size, device), ColumnStatistics(z.shape[1], device)
        outputs = GramStatistics(hidden_size, device)
        for some_x, some_z, some_y in zip(x.split(BATCH), z.split(BATCH), y.split(BATCH)):
            inputs.update(some_x)
            channels.update(some_z)
            outputs.update(some_y)
    with watch("selection"):
        output_covariance = outputs.covariance()
        importance = ops.feature_space_importance(weights["down"], output_covariance, channels.norms())
        for name in ("gate", "up"):
            importance += input_importance(weights[name], inputs.norms())
        kept = select_channels(importance, pruned_channels)
    with watch("statistics"):
        keep = kept.to(device)
        kept_weight = weights["down"][:, keep]
        paired = PairedMoments(outputs.mean(), mean_output(kept_weight, channels.mean()[keep])[0])
        for some_z, some_y in zip(z.split(BATCH), y.split(BATCH)):
            paired.update(some_y, some_z.index_select(1, keep) @ kept_weight.T)
    with watch("recovery"):
        OutputMoments(
            paired.mean_y, paired.mean_y_hat, output_covariance.diagonal(), paired.variance(), paired.covariance()
        ).affine_fit()
    return kept_heads.tolist(), kept.tolist()


def measured(function: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """Return the result, seconds, and the increase of peak memory in GiB."""
    memory.trim()
    memory.reset_peak(device)
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) / memory.GIB if on_gpu else memory.resident_gib()
    started = time.perf_counter()
    result = function()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return result, seconds, (memory.peak_gpu_gib(device) if on_gpu else memory.peak_host_gib()) - before


def bench(width: int, tokens: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure one row: the plain algorithm once, and the engine `rounds` times before it and `rounds` times after."""
    heads, num_channels = SIZES[width]
    activations, weights = make_layer(width, tokens, device)
    numbers = (heads, round(RATIO * heads), round(RATIO * num_channels))
    engine(activations, weights, *numbers, Stopwatch(device))  # warms up: creates the libraries' threads and buffers
    ours, stages = [], []
    for number in range(2 * rounds):
        if number == rounds:
            theirs = measured(lambda: prune_layer(*activations, weights, *numbers), device)
        watch = Stopwatch(device)
        ours.append(measured(partial(engine, activations, weights, *numbers, watch), device))
        stages.append(dict(watch.seconds))
    assert ours[0][0] == theirs[0], f"width {width}, {tokens} tokens: the choices differ"
    seconds, gib = statistics.median(run[1] for run in ours), max(run[2] for run in ours)
    return {
        "hidden_size": width,
        "num_heads": heads,
        "intermediate_size": num_channels,
        "tokens": tokens,
        "ratio": RATIO,
        "device": str(device),
        "engine_s": seconds,
        "naive_s": theirs[1],
        "engine_gib": gib,
        "naive_gib": theirs[2],
        "stages_s": {stage: statistics.median(run[stage] for run in stages) for stage in stages[0]},
        "speedup": theirs[1] / seconds,
        "memory_ratio": theirs[2] / max(gib, 1e-3),
    }


def main() -> None:
    """Measure, append the rows, print the table and the engine's stages over the number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="*", type=int, default=[256, 512, 1024, 2048], choices=SIZES)
    parser.add_argument("--tokens", nargs="*", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=110)
    settings = sorted({(width, 4096) for width in arguments.widths} | {(512, tokens) for tokens in arguments.tokens})
    table = Table("hidden", "tokens", "engine s", "naive s", "speed-up", "engine MiB", "naive MiB", "memory", box=None)
    rows = []
    for width, tokens in settings:
        with console.status(f"width {width}, {tokens} tokens"):
            rows.append(row := bench(width, tokens, device, arguments.rounds))
        append_results("naive", [row])
        console.print(f"width {width}, {tokens} tokens: {row['speedup']:.0f} ×", style="dim")
        table.add_row(
            str(width),
            str(tokens),
            f"{row['engine_s']:.3f}",
            f"{row['naive_s']:.2f}",
            f"{row['speedup']:.0f} ×",
            f"{1024 * row['engine_gib']:.0f}",
            f"{1024 * row['naive_gib']:.0f}",
            f"1/{row['memory_ratio']:.0f}",
        )
    console.print(table)
    points = [(row["tokens"], row["stages_s"]) for row in rows if row["hidden_size"] == 512]
    if len(points) > 2:
        x = np.array([tokens for tokens, _ in points])
        for stage in ("statistics", "selection", "recovery"):
            y = np.array([seconds[stage] for _, seconds in points])
            slope, start = np.polyfit(x, y, 1)
            r2 = 1 - ((y - slope * x - start) ** 2).sum() / ((y - y.mean()) ** 2).sum()
            fit = f", R² {r2:.4f}" if stage == "statistics" else ""
            times = ", ".join(f"{1e3 * value:.1f}" for value in y)
            console.print(
                f"{stage}: {times} ms; {1e3 * start:.1f} ms + {1e6 * slope:.2f} ms a thousand tokens{fit}", highlight=False
            )


if __name__ == "__main__":
    main()
