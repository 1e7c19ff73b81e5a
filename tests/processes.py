"""Processes that talk over gloo, for tests of runs by several."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from slimllm import InputError


def _child(
    work: Callable[..., Any], rank: int, size: int, folder: Path, seconds: float, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    method = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", init_method=method, rank=rank, world_size=size, timeout=timeout)
    try:
        result = {"result": work(distributed.group.WORLD, *arguments)}
    except InputError as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    except BaseException:
        result = {"error": traceback.format_exc()}
    (folder / f"result-{rank}").write_text(json.dumps(result))
    os._exit(0)  # as a process ends that does not wait for the others


class World:
    """Processes that talk over gloo."""

    def __init__(self, work: Callable[..., Any], size: int, folder: Path, *arguments: Any, seconds: float = 60) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["slimllm.pruning.api"])
        self.folder = folder
        folder.mkdir()
        self.processes = [
            context.Process(target=_child, args=(work, rank, size, folder, seconds, arguments)) for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def results(self, seconds: float = 60) -> list[Any]:
        """What each has returned or raised; None of one that was killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for process in self.processes:
            process.kill()
        assert not hanging, f"ranks {hanging} hang"
        files = [self.folder / f"result-{rank}" for rank in range(len(self.processes))]
        return [json.loads(file.read_text()) if file.exists() else None for file in files]


def results(work: Callable[..., Any], size: int, folder: Path, *arguments: Any) -> list[Any]:
    """What every rank returns; none may fail."""
    found = World(work, size, folder, *arguments).results()
    assert all(one and "result" in one for one in found), found
    return [one["result"] for one in found]
