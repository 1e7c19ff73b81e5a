"""Time of a run, by stage."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_MOST_EVENTS = 4096  # before they are added up


class Stopwatch:
    """Seconds by stage.

    On a GPU a stage lasts from the event that it records at its beginning to the one at its end, and so includes all work
    that it launched. The host waits for the events when the seconds are read, not at every stage.
    """

    def __init__(self, device: torch.device) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, Any, Any]] = []
        self._device = device
        self._started = time.perf_counter()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far, by stage."""
        self._add_up_events()
        return self._seconds

    def _add_up_events(self) -> None:
        if self._events:
            torch.cuda.synchronize(self._device)
        for stage, begin, end in self._events:
            self._seconds[stage] += begin.elapsed_time(end) / 1e3
        self._events.clear()

    def elapsed_s(self) -> float:
        """Return the seconds of the run so far, including those before an interruption."""
        return time.perf_counter() - self._started

    def so_far(self) -> dict[str, Any]:
        """Return the arguments of `resume`, for the journal."""
        return {"seconds": dict(self.seconds), "elapsed_s": self.elapsed_s()}

    def resume(self, seconds: dict[str, float], elapsed_s: float) -> None:
        """Continue the count of an interrupted run."""
        self._seconds.update(seconds)
        self._started = time.perf_counter() - elapsed_s

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        on_gpu = self._device.type == "cuda"
        begin = self._event() if on_gpu else time.perf_counter()
        try:
            yield
        finally:
            if on_gpu:
                self._events.append((stage, begin, self._event()))
            else:
                self._seconds[stage] += time.perf_counter() - begin
            if len(self._events) >= _MOST_EVENTS:
                self._add_up_events()

    def _event(self) -> Any:
        """Return an event that is recorded now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
