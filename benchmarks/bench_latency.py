"""Generation speed of pruned models and the dense one: the README's figures.

    python benchmarks/bench_latency.py [MODEL] [--rounds 5]     (default: the demo's model)

Prunes the model by 20 and by 50 %, with the presets best and slimllm, and times all five models in turn, each in a
separate process. Rows go to benchmarks/results/latency.jsonl; `make tables` makes the README's table from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from common import append_results
from rich.console import Console

import slimllm
from slimllm.cli.demo_display import find_demo_model
from slimllm.evaluation.latency import measure_latency
from slimllm.evaluation.latency.display import latency_progress, model_table, speed_table

SETTINGS = [("slimllm", 0.2), ("slimllm", 0.5), ("best", 0.2), ("best", 0.5)]


def main() -> None:
    """Prune, time, append the rows, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=find_demo_model())
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.model is None:
        parser.error("the demo's model is not installed; run make demo, or give a model.")
    with TemporaryDirectory() as folder:
        names = {str(arguments.model): ("dense", 0.0)}
        for preset, ratio in SETTINGS:
            out = Path(folder) / f"{preset} {ratio:.0%}"
            slimllm.prune(arguments.model, out, slimllm.PruneConfig(ratio=ratio, preset=preset))
            names[str(out)] = (preset, ratio)
        with latency_progress(Console(stderr=True), quiet=False) as progress:
            found = measure_latency(
                list(names), batch_sizes=[1, 4], prompts=[128, 512], rounds=arguments.rounds, progress=progress
            )
        rows = [
            {
                "model": Path(arguments.model).stem,
                "preset": names[line.model][0],
                "ratio": names[line.model][1],
                **dataclasses.asdict(line.shape),
                "parameters": line.parameters,
                "memory_gib": memory,
                "prefill_macs": line.prefill_macs,
                "decode_macs": line.decode_macs,
                "first_token_s": statistics.median(line.first_token_s),
                "prefill_per_s": statistics.median(line.prefill_rates),
                "decode_per_s": statistics.median(line.decode_rates),
                "prefill_speedup": found.speedup(line, "prefill_rates"),
                "decode_speedup": found.speedup(line, "decode_rates"),
                "rounds": arguments.rounds,
                "dtype": found.dtype,
                "device": found.device,
                "threads": found.threads,
            }
            for line, memory in zip(found.lines, found.memory_gib * (len(found.lines) // len(names)))
        ]
        append_results("latency", rows)
        console = Console(width=120)
        console.print(model_table(found))
        console.print(speed_table(found))


if __name__ == "__main__":
    main()
