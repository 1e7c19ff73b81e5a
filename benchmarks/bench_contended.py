"""Pruning on an idle machine, and beside another process that multiplies matrices.

    python benchmarks/bench_contended.py [MODEL] [--rounds 3]    (default: the demo's model)

Presets and conditions take turns in every round. The competitor has one thread, pinned to a core or not. Threads wait by
`spinning`, OpenMP's default, or by `sharing` the cores, as slimllm does (slimllm/runtime/cores.py). Rows go to
benchmarks/results/contended.jsonl; `make tables` makes the table of them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench_prune import as_safetensors
from common import append_results

from slimllm.cli.demo_display import find_demo_model

COMPETITOR = """
import os, sys
import numpy as np
if sys.argv[1] == "pinned":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
a = np.random.rand(700, 700)
print("ready", flush=True)
while True:
    a = a @ a
    a /= np.abs(a).max()
"""
# OpenMP's own default spins for 300 000 iterations; slimllm leaves the threads alone if the environment says how they wait.
WAITING = {"spinning": {"GOMP_SPINCOUNT": "300000"}, "sharing": {}}
CONDITIONS = ("idle", "pinned", "free")


@contextmanager
def competitor(condition: str) -> Iterator[None]:
    """Keep one core busy meanwhile, unless the condition is `idle`."""
    if condition == "idle":
        yield
        return
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", COMPETITOR, condition], stdout=subprocess.PIPE, text=True, env=one_thread
    ) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            process.send_signal(signal.SIGKILL)


def pruned(model: str, preset: str, waiting: str, out: Path) -> dict[str, object]:
    """Prune by the command line, and return the figures of its report."""
    settings = ["--ratio", "0.2", "--preset", preset, "--no-page", "--quiet", "--overwrite"]
    code = "import torch; from slimllm.cli import main; main()"  # torch first, as in programs that import slimllm later
    environment = {**os.environ, **WAITING[waiting]}
    load, started = os.getloadavg()[0], time.monotonic()
    subprocess.run([sys.executable, "-c", code, "prune", model, "--out", str(out), *settings], check=True, env=environment)
    report = json.loads((out / "report.json").read_text())
    widths = [(layer["num_heads"], layer["intermediate_size"]) for layer in report["layers"]]
    return {
        "elapsed_s": report["elapsed_s"],
        "wall_s": time.monotonic() - started,
        "peak_host_gib": report["peak_host_gib"],
        "perplexity": report["calibration"]["perplexity_pruned"],
        "widths": hash(tuple(widths)) % 10**8,
        "load": load,
    }


def main() -> None:
    """Measure, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=find_demo_model())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--preset", nargs="+", default=["paper", "slimllm", "best"])
    parser.add_argument("--waiting", nargs="+", default=list(WAITING), choices=list(WAITING))
    parser.add_argument("--condition", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    arguments = parser.parse_args()
    if arguments.model is None:
        parser.error("the demo's model is not installed; run make demo, or give a model.")
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory())
        model = as_safetensors(arguments.model, folder)
        for _ in range(arguments.rounds):
            for preset in arguments.preset:
                for condition in arguments.condition:
                    for waiting in arguments.waiting:
                        with competitor(condition):
                            row = pruned(model, preset, waiting, Path(folder) / "out")
                        about = {"model": Path(model).stem, "preset": preset, "condition": condition, "waiting": waiting}
                        append_results("contended", [about | row])
                        print(f"{preset}, {condition}, {waiting}: {row['elapsed_s']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
