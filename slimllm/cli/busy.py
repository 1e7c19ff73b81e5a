"""Detection of other programs on the cores that a command computes on, which can slow it down many times."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from slimllm.cli.terminal import errors


@contextmanager
def watch_for_other_work(quiet: bool, device: str | None) -> Iterator[None]:
    """Print a notice after the work if other programs kept the cores busy; on Linux, and for work on the CPU.

    Args:
        quiet: Print nothing.
        device: As for `PruneConfig`.
    """
    import torch

    from slimllm.config import parse_device

    before_s, began = other_work_s(), time.monotonic()
    yield
    after_s, seconds = other_work_s(), time.monotonic() - began
    if quiet or before_s is None or after_s is None or seconds < 1 or parse_device(device).type != "cpu":
        return
    sentence = verdict((after_s - before_s) / seconds, len(os.sched_getaffinity(0)), torch.get_num_threads())
    if sentence:
        errors.print(sentence, style="dim", highlight=False, soft_wrap=True)


def verdict(others: float, cores: int, threads: int) -> str | None:
    """Return a notice about `others`, the number of cores busy elsewhere; None if the threads had enough cores."""
    if others + threads <= cores + max(0.3, 0.05 * cores):
        return None
    fewer = max(1, round(cores - others))
    advice = f"; OMP_NUM_THREADS={fewer} may be much faster" if fewer < threads else ""
    return (
        f"Other work kept {others:.1f} of {cores} cores busy during this run, so it took longer than on an idle machine"
        f"{advice}."
    )


def other_work_s() -> float | None:
    """Return the busy seconds of this process's cores since boot, without its own and those of processes it waited for."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            rows = {name: values for name, *values in map(str.split, file) if name.startswith("cpu")}
        own = [rows[f"cpu{core}"] for core in os.sched_getaffinity(0)]
        # user, nice, system, (idle, waiting,) interrupts: in ticks
        ticks = sum(int(row[column]) for row in own for column in (0, 1, 2, 5, 6))
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])
    except (OSError, AttributeError, KeyError):  # not Linux
        return None
