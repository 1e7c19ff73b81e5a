"""State of the simulated GPU: memory, copies in flight, counters."""

from __future__ import annotations

import collections
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

DEVICE = torch.device("cuda", 0)
CAPABILITY = tuple(map(int, os.environ.get("SIMULATED_CAPABILITY", "9.0").split(".")))
PROCESSORS = int(os.environ.get("SIMULATED_PROCESSORS", "132"))
MEMORY = 80 * 2**30


class DeviceError(RuntimeError):
    """Tensors of several devices in one operation."""


class RaceError(RuntimeError):
    """Access to host memory with which a copy is still at work."""


class Gpu:
    """State of the simulated GPU: memory, copies in flight, and counters."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._users: dict[int, tuple[int, int]] = {}  # by storage: wrappers and bytes
        self._pinned: dict[int, StorageWeakRef] = {}
        self._read: set[int] = set()  # storages that copies to the device still read
        self._written: set[int] = set()  # storages that copies to the host still write
        self.current: list[Any] = []  # devices entered by `torch.cuda.device`
        self.operators: dict[str, Callable[..., Any]] = {}  # of the package, by name
        self.now = self.peak = 0
        self.limit = MEMORY
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.waits: collections.Counter[str] = collections.Counter()
        self.launches: collections.Counter[str] = collections.Counter()
        self.collectives: collections.Counter[str] = collections.Counter()
        self.peak = self.now

    def take(self, storage: torch.UntypedStorage, user: object) -> None:
        """Count the memory of a storage until its last user is gone."""
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        with self._lock:
            users, _ = self._users.get(key, (0, 0))
            if not users and self.now + size > self.limit:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            self._users[key] = users + 1, size
            if not users:
                self.now += size
                self.peak = max(self.peak, self.now)
        weakref.finalize(user, self._give_back, key)

    def _give_back(self, key: int) -> None:
        with self._lock:
            users, size = self._users.pop(key)
            if users > 1:
                self._users[key] = users - 1, size
            else:
                self.now -= size

    def wait(self, cause: str) -> None:
        """Let the host wait for the device."""
        self.waits[cause] += 1
        self._read.clear()
        self._written.clear()

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Declare the memory of a CPU tensor pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        known = self._pinned.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.expired()

    def copy(self, source: torch.Tensor, to_device: bool, non_blocking: bool, result: torch.Tensor) -> None:
        """Note a copy between host and device."""
        if to_device and non_blocking and self.is_pinned(source):
            self._read.add(source.untyped_storage()._cdata)
        elif not to_device and non_blocking:
            self._written.add(result.untyped_storage()._cdata)
        else:
            self.wait("copy to the device" if to_device else "copy to the host")

    def check_host(self, function: Any, flat: list[Any]) -> None:
        """Raise RaceError if an operation of the CPU touches memory with which a copy is at work."""
        if not (self._read or self._written):
            return
        for argument, value in zip(function._schema.arguments, flat):
            if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
                continue
            key = value.untyped_storage()._cdata
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if key in self._written:
                raise RaceError(f"{function} touches host memory that a copy from the device is still writing.")
            if writes and key in self._read:
                raise RaceError(f"{function} overwrites pinned memory that a copy to the device is still reading.")


GPU = Gpu()
