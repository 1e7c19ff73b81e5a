"""Threads asleep while other processes need the cores. How much that helps is measured by benchmarks/bench_contended.py."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from slimllm.runtime import cores
from slimllm.runtime.cores import share_cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not assign cores")


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cores, "_INTERVAL_S", 0.05)
    torch.set_num_threads(2)
    torch.zeros(1 << 20).add_(1)  # starts the second thread
    yield
    torch.set_num_threads(1)


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def within_10_s(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_team_sleeps_while_others_need_the_cores(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    before = threads()
    leaders = len(os.sched_getaffinity(0)) - 1  # with two threads, each brings one more
    monkeypatch.setattr(cores, "_NEED", -math.inf)
    with share_cores(), share_cores():
        assert within_10_s(lambda: threads() == before + 1 + 2 * leaders)
        monkeypatch.setattr(cores, "_NEED", math.inf)
        assert within_10_s(lambda: threads() == before + 1)
        monkeypatch.setattr(cores, "_NEED", -math.inf)
        assert within_10_s(lambda: threads() == before + 1 + 2 * leaders)
    assert within_10_s(lambda: threads() == before)


def test_nothing_is_watched_for_a_single_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threads()
    with share_cores():
        assert threads() == before


def test_another_process_is_counted_and_this_one_is_not() -> None:
    """On a machine that has other work the counts are higher, and never above the cores that this process leaves."""
    core = min(os.sched_getaffinity(0))
    busy = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout and process.stdout.readline()
            before = cores._Times()
            time.sleep(1)
            waited = cores._Times().taken_by_others(before)
            before, deadline = cores._Times(), time.monotonic() + 1
            while time.monotonic() < deadline:
                pass
            now = cores._Times()
            worked = now.taken_by_others(before)
        finally:
            process.kill()
    assert 0.5 < waited < before.cores + 0.1
    assert worked < before.cores - (now.own - before.own) / (now.wall - before.wall) + 0.1
