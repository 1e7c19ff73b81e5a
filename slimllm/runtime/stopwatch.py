"""Time of a run, by stage."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Seconds by stage; on a GPU it synchronises at both ends of a stage, which thus includes all work it launched."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._started = time.perf_counter()

    def elapsed_s(self) -> float:
        """Return the seconds of the run so far, including those before an interruption."""
        return time.perf_counter() - self._started

    def so_far(self) -> dict[str, Any]:
        """Return the arguments of `resume`, for the journal."""
        return {"seconds": dict(self.seconds), "elapsed_s": self.elapsed_s()}

    def resume(self, seconds: dict[str, float], elapsed_s: float) -> None:
        """Continue the count of an interrupted run."""
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
