"""Pruning a whole model: seconds, their ratio to one dense pass of the same run, and memory against its account.

    python benchmarks/bench_prune.py MODEL --calibration 32x128 128x512 --ratio 0.2 0.5 --rounds 3

Every run is a process of its own. One row a run is appended to benchmarks/results/prune.jsonl; the table shows, for each
setting, the medians over the rounds. MODEL may be left out: then it is the demo's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import append_results
from rich.console import Console
from rich.table import Table

KEPT = ("elapsed_s", "setup_s", "dense_pass_s", "stages_s", "peak_host_gib", "peak_gpu_gib", "memory_gib", "versions",
        "achieved_ratio", "parameters", "calibration", "device", "compute_dtype", "backend")  # fmt: skip


def run_once(model: str, ratio: float, samples: int, seq_len: int) -> dict[str, Any]:
    """One run in a process of its own, as a row of results."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "slimllm", "prune", model, "--out", str(out), "--ratio", str(ratio)]
        command += ["--samples", str(samples), "--seq-len", str(seq_len), "--quiet"]
        subprocess.run(command, check=True)
        report = json.loads((out / "report.json").read_text())
    return {
        "model": Path(model).stem,
        "ratio": ratio,
        "samples": samples,
        "seq_len": seq_len,
        **{key: report[key] for key in KEPT},
    }


def main() -> None:
    """Measure, append the rows, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration", nargs="+", default=["32x128"], metavar="SAMPLESxSEQ_LEN")
    parser.add_argument("--ratio", nargs="+", type=float, default=[0.2])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = arguments.model
    if model is None:
        from slimllm.demo import find_demo_model

        model = str(find_demo_model() or parser.error("give a model; the demo's is not installed (make demo does it)"))
    table = Table("calibration", "ratio", "achieved", "prune s", "dense pass s", "ratio", "peak GiB", "account GiB")
    for calibration in arguments.calibration:
        samples, seq_len = map(int, calibration.split("x"))
        for ratio in arguments.ratio:
            rows = [run_once(model, ratio, samples, seq_len) for _ in range(arguments.rounds)]
            append_results("prune", rows)
            times = [row["elapsed_s"] / row["dense_pass_s"] for row in rows]
            columns = [[row[key] for row in rows] for key in ("elapsed_s", "dense_pass_s", "peak_host_gib")]
            seconds, dense, peak = (statistics.median(column) for column in columns)
            account = statistics.median(sum(row["memory_gib"].values()) for row in rows)
            table.add_row(
                calibration, f"{ratio:g}", f"{rows[0]['achieved_ratio']:.4f}", f"{seconds:.1f}", f"{dense:.1f}",
                f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})", f"{peak:.2f}", f"{account:.2f}",
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
