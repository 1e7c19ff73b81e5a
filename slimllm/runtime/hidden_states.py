"""Where the hidden states of all tokens live between their uses: on the device, in host memory, or in a file; as a file."""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimllm.runtime.distributed import Ranks

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
PLACES = ("device", "host", "disk")  # from the fastest to the largest


@dataclass(frozen=True)
class Placement:
    """Where token-sized tensors are stored.

    Attributes:
        states: The residual stream and the outputs of the sub-layer at work: one of `PLACES`.
        keep_inner_bytes: How much the inputs of a sub-layer's output projection may take on the device, if they are to be
            kept until the pruned output is made of them; otherwise the layer makes them again.
        read_ahead: Whether the next layer's weights are read while the present one computes.
        gram: Where the Gram of all FFN channels is, and what follows from it is solved: `device` or `host`.
        folder: For the files of `disk`.
    """

    states: str = "device"
    keep_inner_bytes: int = 256 * 2**20
    read_ahead: bool = False
    gram: str = "device"
    folder: Path | None = None


class Stored:
    """A tensor that is computed with on a device and lives at a place of its own in between.

    On `device` it is the tensor itself, and changing it in place is enough; elsewhere `load` makes a copy of it.

    Args:
        tensor: What it holds at first, on the device; at `device` it is kept as it is.
        place: `device`, `host` or `disk`.
        folder: Where the file of `disk` is made; if it does not exist, in its parent, or in the system's temporary folder.
            It has no name any more when it is there, so nothing of it can be left.
    """

    def __init__(self, tensor: torch.Tensor, place: str = "device", folder: Path | None = None) -> None:
        self.shape, self.dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._mapped = False
        if place == "host":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        elif place == "disk":
            folder = folder and next((existing for existing in (folder, folder.parent) if existing.is_dir()), None)
            with tempfile.NamedTemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, max(1, tensor.nbytes))  # a full disk shows here, and not as a crash
                mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            self._tensor, self._mapped = mapped.view(tensor.shape), True
        else:
            self._tensor = tensor
        self.save(tensor)

    def load(self) -> torch.Tensor:
        """The tensor, on the device."""
        if not self._mapped:
            return self._tensor.to(self._device, non_blocking=True)
        loaded = self._tensor.to(self._device, copy=True)
        self.release()
        return loaded

    def save(self, tensor: torch.Tensor) -> None:
        """Let it hold this, of the same shape and dtype."""
        if tensor is not self._tensor:
            self._tensor.copy_(tensor)
            self.release()

    def stored(self) -> torch.Tensor:
        """The tensor where it lives, to be read; of a file its pages stay in memory until `release`."""
        return self._tensor

    def release(self) -> None:
        """Let the system have the memory of a file's pages, which it writes back when it likes."""
        if self._mapped:
            pages = ctypes.c_void_p(self._tensor.data_ptr())  # from_file maps whole pages
            ctypes.CDLL(None).madvise(pages, ctypes.c_size_t(self._tensor.nbytes), mmap.MADV_DONTNEED)


class Batch:
    """Windows that go through a layer together: the residual stream (batch, seq_len, D), and how each layer is called."""

    def __init__(self, hidden: Stored, kwargs: list[dict[str, Any]]) -> None:
        self.hidden, self.kwargs = hidden, kwargs

    @property
    def num_tokens(self) -> int:
        return self.hidden.shape[0] * self.hidden.shape[1]

    def add(self, output: torch.Tensor) -> None:
        """Add the output of a sub-layer, (num_tokens, D), to the residual stream."""
        hidden = self.hidden.load()
        hidden.view(-1, hidden.shape[-1]).add_(output)
        self.hidden.save(hidden)


class Stream:
    """The residual stream of this rank's calibration windows, in batches, in order.

    To iterate over it gives the windows that the statistics are made of. Those that are held out of them pass the same
    layers, so that the result can be judged by windows that nothing was fitted to.

    Args:
        samples: Calibration windows of all ranks.
        batch_size: Windows of a batch, the last one of a rank has the rest.
        placement: Where it is stored.
        ranks: The processes of the run.
        num_held_out: Windows held out, of all ranks; they are numbered after the others.

    Attributes:
        batches: The windows in the statistics.
        held_out: The windows that are not; a rank may have none.
    """

    def __init__(self, samples: int, batch_size: int, placement: Placement, ranks: Ranks, num_held_out: int = 0) -> None:
        self.batches: list[Batch] = []
        self.held_out: list[Batch] = []
        self.samples, self.num_held_out, self.batch_size = samples, num_held_out, batch_size
        self.placement, self.ranks = placement, ranks

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        return self.batches[number]

    @property
    def most_tokens(self) -> int:
        """The number of the rank that has most."""
        return math.ceil(self.samples / self.ranks.size) * self.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(samples, seq_len, D) of all ranks, without those held out."""
        return (self.samples, *self[0].hidden.shape[1:])

    def windows(self, rank: int) -> list[range]:
        """The windows of every batch of a rank."""
        return self._batched(self.ranks.share(self.samples, rank))

    def held_out_windows(self, rank: int) -> list[range]:
        """The same of those held out, whose numbers begin at `samples`."""
        share = self.ranks.share(self.num_held_out, rank)
        return self._batched(range(self.samples + share.start, self.samples + share.stop))

    def _batched(self, share: range) -> list[range]:
        return [share[start : start + self.batch_size] for start in range(0, len(share), self.batch_size)]

    def of_all_ranks(self) -> Iterator[tuple[int, range, Batch | None]]:
        """All batches, those held out last, in the order of their windows: the rank, the windows, and the batch where it is
        this rank's."""
        for rank in range(self.ranks.size):
            for number, windows in enumerate(self.windows(rank)):
                yield rank, windows, self[number] if rank == self.ranks.rank else None
        for rank in range(self.ranks.size):
            for number, windows in enumerate(self.held_out_windows(rank)):
                yield rank, windows, self.held_out[number] if rank == self.ranks.rank else None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """(windows, seq_len, D) of all ranks, with those held out."""
        return (self.samples + self.num_held_out, *self.shape[1:])

    def store(self, tensor: torch.Tensor) -> Stored:
        """Keep a tensor of a batch where those of all batches are kept."""
        return Stored(tensor, self.placement.states, self.placement.folder)


@dataclass(frozen=True)
class State:
    """Tensors that are written piece by piece, so that they need not be in memory at once.

    Attributes:
        layout: The shape and dtype of each, by name.
        pieces: Their contents in that order, one tensor after the other, in pieces of any size on the CPU.
    """

    layout: dict[str, tuple[tuple[int, ...], torch.dtype]]
    pieces: Iterable[torch.Tensor]

    def write(self, path: Path) -> None:
        """Write a safetensors file: the length of the header, the header, the bytes of all tensors."""
        header, end = {}, 0
        for name, (shape, dtype) in self.layout.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)  # so that the numbers are aligned
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for piece in self.pieces:
                content: Any = piece.contiguous().flatten().view(torch.uint8).numpy()
                file.write(content)
