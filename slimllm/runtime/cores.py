"""Sharing the cores with other processes.

By default, OpenMP's threads spin at the barrier of every operation for milliseconds before they sleep. If another process
has the core of one of them, the others spin until the scheduler gives it back, and pruning takes seven times as long
(benchmarks/bench_contended.py). GNU's OpenMP, which torch comes with, spins only briefly while it manages more threads
than there are cores. So while other processes need the cores, a team of threads is kept asleep. Computation keeps its own
threads, and results are the same to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread

import psutil
import torch

_INTERVAL_S = 0.5  # the system counts in hundredths of a second
_NEED = 0.25  # of a core that computes, before the threads wait briefly
_ONE_THREAD = 32768  # elements; torch uses a further thread only for more
_watched = Lock()  # held while the cores are watched: calls may be nested


@contextmanager
def share_cores() -> Iterator[None]:
    """Meanwhile, let OpenMP's threads wait only briefly whenever other processes need their cores. Calls may be nested."""
    if torch.get_num_threads() == 1 or not _watched.acquire(blocking=False):
        yield
        return
    done = Event()
    watch = Thread(target=_watch, args=(done,), name="slimllm-cores", daemon=True)
    watch.start()
    try:
        yield
    finally:
        done.set()
        watch.join()
        _watched.release()


def _watch(done: Event) -> None:
    """Keep a sleeping team while other processes need the cores, until `done`."""
    before = _Times()
    team: _SleepingTeam | None = None
    while before.cores and not done.wait(_INTERVAL_S):
        now = _Times()
        needed = now.taken_by_others(before) > now.cores - torch.get_num_threads() + _NEED
        if needed and team is None:
            team = _SleepingTeam(now.cores)
        elif not needed and team is not None:
            team.dismiss()
            team = None
        before = now
    if team is not None:
        team.dismiss()


class _Times:
    """Processor times so far, in seconds: of the system on the cores of this process, and of this process."""

    def __init__(self) -> None:
        cores = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else []
        times = psutil.cpu_times(percpu=True)
        mine = [times[core] for core in cores if core < len(times)]  # a container may count its own cores only
        self.cores = len(mine)
        self.idle = sum(core.idle + getattr(core, "iowait", 0.0) for core in mine)
        self.own = time.process_time()
        self.wall = time.monotonic()

    def taken_by_others(self, before: _Times) -> float:
        """Return the cores that other processes, and other virtual machines, had on average."""
        return self.cores - (self.idle - before.idle + self.own - before.own) / (self.wall - before.wall)


class _SleepingTeam:
    """Threads of OpenMP that sleep, and with the computing ones are more than `cores`."""

    def __init__(self, cores: int) -> None:
        self._dismissed = Event()
        threads = torch.get_num_threads()
        # OpenMP gives each leader threads - 1 more, and keeps them until it ends.
        ready = [Event() for _ in range((cores - threads) // (threads - 1) + 1)]
        self._leaders = [Thread(target=self._lead, args=(event,), name="slimllm-asleep", daemon=True) for event in ready]
        for leader in self._leaders:
            leader.start()
        for event in ready:
            event.wait()

    def _lead(self, ready: Event) -> None:
        torch.zeros(torch.get_num_threads() * _ONE_THREAD, dtype=torch.uint8).add_(1)
        ready.set()
        self._dismissed.wait()

    def dismiss(self) -> None:
        """End the threads."""
        self._dismissed.set()
        for leader in self._leaders:
            leader.join()
