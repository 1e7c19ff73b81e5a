"""Sharing the cores with other processes.

By default, OpenMP's threads spin at the barrier of every operation for milliseconds before they sleep. If another process
has the core of one of them, the others spin until the scheduler gives it back, and pruning takes several times as long
(benchmarks/bench_contended.py). GNU's OpenMP, with which torch is built for Linux, spins only briefly while it manages more
threads than there are cores. So while other processes need the cores, further threads of it are kept asleep. Computation
keeps its own threads, and results are the same to the last bit.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock, Thread

import torch

_INTERVAL_S = 0.5  # the system counts processor times in hundredths of a second
_NEED = 0.25  # of a core on which a thread computes, taken by others
_QUIET = 4  # intervals without need after which the threads spin again
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0  # OpenMP counts when it is loaded, too
_log = logging.getLogger("slimllm")
_lock = Lock()
_users = 0  # of `share_cores`
_watch: tuple[Thread, Event] | None = None  # while there are users


@contextmanager
def share_cores() -> Iterator[None]:
    """Meanwhile, let OpenMP's threads wait only briefly whenever other processes need their cores.

    It does nothing if there is a single thread, if the environment says how threads wait (`OMP_WAIT_POLICY`,
    `GOMP_SPINCOUNT`), or without GNU's OpenMP. It may be nested, and entered in several threads.
    """
    global _users, _watch
    with _lock:
        _users += 1
        if _users == 1:
            _watch = _started()
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            ended, _watch = (None, _watch) if _users else (_watch, None)
        if ended is not None:
            thread, done = ended
            done.set()
            thread.join()


def _started() -> tuple[Thread, Event] | None:
    """Start to watch the cores; None: there is nothing to watch, or no thread for it."""
    threads = torch.get_num_threads()
    if threads == 1 or not _CORES or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() or _openmp() is None:
        return None
    done = Event()
    watch = Thread(target=_watch_cores, args=(threads, done), name="slimllm-cores", daemon=True)
    try:
        watch.start()
    except RuntimeError:  # the system's limit
        return None
    return watch, done


def _watch_cores(threads: int, done: Event) -> None:
    """Keep further threads asleep while other processes need the cores that `threads` compute on, until `done`."""
    asleep: _Asleep | None = None
    quiet = 0
    try:
        before = Times.now()
        while not done.wait(_INTERVAL_S):
            now = Times.now()
            if now.needed_by_others(before, threads):
                quiet, asleep = 0, asleep or _Asleep(_CORES - threads + 2)
            elif (quiet := quiet + 1) >= _QUIET and asleep is not None:
                asleep.end()
                asleep = None
            before = now
    except (OSError, RuntimeError, ValueError, IndexError) as error:  # a system that does not say what its cores do
        _log.debug("The cores are not watched (%s: %s); other work on them slows the run.", type(error).__name__, error)
    finally:
        if asleep is not None:
            asleep.end()


@dataclass(frozen=True)
class Times:
    """Seconds so far: of each core of this process without work, of this process on all cores, and of a clock."""

    idle: list[float]
    own: float
    clock: float

    @classmethod
    def now(cls) -> Times:
        """Read the times of the system."""
        ticks = os.sysconf("SC_CLK_TCK")
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.split(" ", 1)[0] in cores]
        # user nice system idle iowait …
        idle = [(int(fields[4]) + int(fields[5])) / ticks for fields in lines]
        return cls(idle, time.process_time(), time.monotonic())

    def needed_by_others(self, before: Times, threads: int) -> bool:
        """Return whether others took a quarter of a core more than `threads` leave them; also if there are more threads."""
        elapsed, cores = self.clock - before.clock, len(self.idle)
        taken = cores - (sum(self.idle) - sum(before.idle) + self.own - before.own) / elapsed
        return len(before.idle) == cores > 0 and taken > cores - threads + _NEED


class _Asleep:
    """A team of OpenMP's threads that sleep until they are ended."""

    def __init__(self, threads: int) -> None:
        self._end = Event()
        made = Event()
        self._leader = Thread(target=self._lead, args=(threads, made), name="slimllm-asleep", daemon=True)
        self._leader.start()
        made.wait()

    def _lead(self, threads: int, made: Event) -> None:
        """Make the team by a parallel region that does nothing; its threads exist as long as this one."""
        try:
            if (openmp := _openmp()) is not None:
                openmp.GOMP_parallel(openmp.omp_get_num_threads, None, threads, 0)
        finally:
            made.set()
        self._end.wait()

    def end(self) -> None:
        self._end.set()
        self._leader.join()


def _openmp() -> ctypes.CDLL | None:
    """Return GNU's OpenMP of this process, torch's if there are several; None: it has none."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
        files = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
        return ctypes.CDLL(min(files, key=lambda file: "torch" not in file)) if files else None
    except OSError:
        return None
