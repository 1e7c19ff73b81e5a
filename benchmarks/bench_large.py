"""Layers of a model larger than memory, at their real sizes: peak memory against the plan, and seconds by layer.

Seeded random weights are in sharded safetensors on disk; calibration has 32 x 128 tokens (`--samples`). `--layers` sets how
many of the model's layers there are: twice as many must not take more memory. Rows are appended to results/large.jsonl. Run
it on an idle machine with space on the disk (twice 1.1 GB for each layer of LLaMA-33B).

    python benchmarks/bench_large.py                    LLaMA-33B, 2 and 4 layers
    python benchmarks/bench_large.py --model llama-7b --layers 2 --host-memory 3GiB
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from common import append_results
from rich.console import Console
from rich.table import Table

from slimllm.experiments.bench.run import Setting, measure


def row_of(setting: Setting) -> dict[str, Any]:
    """Measure one run in a separate process, and add its plan."""
    row = measure(setting)
    predicted = sum(row["memory_gib"].values())
    return row | {"predicted_gib": predicted, "predicted_over_peak": predicted / row["peak_host_gib"]}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(
        "model", "layers", "recovery", "budget", "s / layer", "s", "peak GiB", "plan GiB", "plan / peak", "GPU", box=None
    )
    for row in rows:
        budget = row["host_memory"] or row["gpu_memory"] or ""
        gpu = f"{row['peak_gpu_gib']:.2f} / {sum(row['gpu_memory_gib'].values()):.2f}" if row["peak_gpu_gib"] else ""
        table.add_row(
            row["model"],
            str(row["num_layers"]),
            row["recovery"],
            budget,
            f"{mean(row['layer_s']):.1f}",
            f"{row['elapsed_s']:.0f}",
            f"{row['peak_host_gib']:.2f}",
            f"{row['predicted_gib']:.2f}",
            f"{row['predicted_over_peak']:.2f}",
            gpu,
        )
    console = Console(width=120)
    console.print(table)


def main() -> None:
    """Measure, append the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-33b")
    parser.add_argument("--layers", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--preset", default="slimllm")
    parser.add_argument("--recovery", help="default: the preset's")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--host-memory")
    parser.add_argument("--gpu-memory", help="budget on the GPU, which torch enforces")
    arguments = parser.parse_args()
    if arguments.gpu_memory and not torch.cuda.is_available():
        parser.error("--gpu-memory is for a GPU, and there is none.")
    rows = []
    for layers in arguments.layers:
        budgets = {"host_memory": arguments.host_memory, "gpu_memory": arguments.gpu_memory}
        methods = {"preset": arguments.preset, "recovery": arguments.recovery}
        setting = Setting(arguments.model, layers, samples=arguments.samples, on_disk=True, **methods)
        rows.append(row_of(replace(setting, **budgets)))
        append_results("large", rows[-1:])
    show(rows)


if __name__ == "__main__":
    main()
