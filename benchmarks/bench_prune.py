"""Pruning a whole model: seconds, their ratio to one dense pass of the same run, and memory against its account.

    python benchmarks/bench_prune.py MODEL --calibration 32x128 128x512 --ratio 0.2 0.5 --rounds 3

Every run is a process of its own. One row a run is appended to benchmarks/results/prune.jsonl; the table shows, for each
setting, the medians over the rounds. MODEL may be left out: then it is the demo's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "prune.jsonl"
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
    row = {"date": date.today().isoformat(), "commit": commit(), "machine": machine(), "model": Path(model).stem}
    return {**row, "ratio": ratio, "samples": samples, "seq_len": seq_len, **{key: report[key] for key in KEPT}}


def commit() -> str:
    """The commit that was measured."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent.parent
    )
    return done.stdout.strip()


def machine() -> str:
    """The processor, or the GPU, by name."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names) or '?'} cores of {names[0] if names else platform.processor()}"


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
    RESULTS.parent.mkdir(exist_ok=True)
    for calibration in arguments.calibration:
        samples, seq_len = map(int, calibration.split("x"))
        for ratio in arguments.ratio:
            rows = [run_once(model, ratio, samples, seq_len) for _ in range(arguments.rounds)]
            with RESULTS.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
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
