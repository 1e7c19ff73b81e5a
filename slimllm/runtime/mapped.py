"""Tensors in files: their memory belongs to the system, which writes it back when it needs the room."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from slimllm.statistics import TILE, GramStatistics

WAITING = 4096  # tokens that are added to a Gram in a file at once


def in_file(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> torch.Tensor:
    """Return a tensor of zeros in a new file, which is unlinked as soon as it is mapped, so that none is ever left.

    Args:
        shape, dtype: Those of the tensor.
        folder: Folder of the file; if it does not exist, its parent or the system's temporary folder.

    Raises:
        OSError: the disk is full.
    """
    folder = folder and next((existing for existing in (folder, folder.parent) if existing.is_dir()), None)
    numbers = math.prod(shape)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, max(1, numbers * dtype.itemsize))  # raises here if the disk is full
        return torch.from_file(file.name, shared=True, size=numbers, dtype=dtype).view(shape)


def release(tensor: torch.Tensor) -> None:
    """Let the system reclaim the memory of a tensor from `in_file`; its numbers stay in the file."""
    pages = ctypes.c_void_p(tensor.data_ptr())  # page-aligned, as from_file maps whole pages
    ctypes.CDLL(None).madvise(pages, ctypes.c_size_t(tensor.nbytes), mmap.MADV_DONTNEED)


class GramInFile(GramStatistics):
    """A Gram in a file, of which a few tiles are in memory at a time. Batches wait until it pays to rewrite the file.

    Args:
        features: Number of features F.
        solver: As of `GramStatistics`.
        folder: Folder of the file, see `in_file`.
    """

    by_tiles = True

    def __init__(self, features: int, solver: torch.device | str | None, folder: Path | None) -> None:
        self._folder = folder
        self._waiting: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        super().__init__(features, "cpu", solver)

    def _zeros(self, device: torch.device | str) -> torch.Tensor:
        return in_file((self.features, self.features), torch.float32, self._folder)

    def _release(self) -> None:
        release(self.gram)

    def _add_tiles(self, batches: list[tuple[torch.Tensor, torch.Tensor | None]]) -> None:
        self._waiting += batches
        if sum(len(x) for x, _ in self._waiting) >= WAITING:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            super()._add_tiles(self._waiting)
            self._waiting = []

    def _complete(self) -> None:
        self._write()
        super()._complete()

    def mean(self) -> torch.Tensor:
        self._write()
        return super().mean()

    def sums(self) -> Iterator[torch.Tensor]:
        self._complete()
        for rows in self.gram.split(TILE):
            yield rows
            self._release()
        yield self.total
