"""Shared code of the benchmarks: timing in turn, and rows of results."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slimllm.experiments.bench import append_rows

# Where rows are written; benchmarks/gpu.py sets another folder.
RESULTS = Path(os.environ.get("SLIMLLM_RESULTS") or Path(__file__).parent / "results")
_SLEEP_CYCLES = 1_000_000  # about half a millisecond


def append_results(name: str, rows: list[dict[str, Any]]) -> None:
    """Append rows to results/NAME.jsonl, each with the date, the commit, the machine and the versions."""
    append_rows(RESULTS / f"{name}.jsonl", rows)


def median_seconds(functions: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Return the median seconds of each function; after one warm-up call each they take turns, so that noise affects all.

    On a CPU each function is called twice in its turn, and the second call counts, because the first finds the caches and
    threads in the state that another function left. On a GPU the caches are overwritten before each call, and the time is
    that between two events of the stream.
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    flush = torch.empty(2**28, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for _ in range(rounds):
        for name, function in functions.items():
            if flush is None:
                function()
                started = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - started)
                continue
            flush.zero_()
            torch.cuda._sleep(_SLEEP_CYCLES)  # while the host gets ahead, so that its work is not in the time
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in seconds.items()}


def extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Return the bytes by which GPU memory peaks during a call above the level before it; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before
