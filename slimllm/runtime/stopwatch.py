"""Seconds by stage of a run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Seconds by stage; on a GPU it waits for the work in flight, so that a stage is charged what it launched."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._started = time.perf_counter()

    def elapsed_s(self) -> float:
        """Seconds of the run so far, those before an interruption included."""
        return time.perf_counter() - self._started

    def so_far(self) -> dict[str, Any]:
        """What `resume` takes, for the journal."""
        return {"seconds": dict(self.seconds), "elapsed_s": self.elapsed_s()}

    def resume(self, seconds: dict[str, float], elapsed_s: float) -> None:
        """Count on from where an interrupted run stopped."""
        self.seconds.update(seconds)
        self._started = time.perf_counter() - elapsed_s

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[stage] += time.perf_counter() - start

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
