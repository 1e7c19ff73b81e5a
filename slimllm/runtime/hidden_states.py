"""Hidden states of all tokens: storage between uses (on the device, in host memory or in a file), and writing to a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimllm.runtime.distributed import Ranks
from slimllm.runtime.mapped import in_file, release
from slimllm.runtime.memory import pinned_like

_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
PLACES = ("device", "host", "disk")  # from the fastest to the largest


@dataclass(frozen=True)
class Placement:
    """Where token-sized tensors are stored.

    Attributes:
        states: Place of the residual stream and of the current sub-layer's outputs: one of `PLACES`.
        keep_inner_bytes: Largest size of a sub-layer's inner activations, the inputs of its output projection, that are
            kept on the device until the pruned output is computed from them. Larger ones are computed again.
        read_ahead: Whether the next layer's weights are read while the current layer computes.
        gram: Where the Gram matrix of all FFN channels is stored: one of `PLACES`.
        systems: Where the systems of an FFN's Gram are solved: `device`, or `host` if it is not stored on the device.
        folder: Folder for the files of `disk`.
    """

    states: str = "device"
    keep_inner_bytes: int = 256 * 2**20
    read_ahead: bool = False
    gram: str = "device"
    systems: str = "device"
    folder: Path | None = None

    @property
    def solves_on_host(self) -> bool:
        """Whether the systems of an FFN's Gram are solved on the host."""
        return self.gram != "device" and self.systems == "host"


class Stored:
    """A tensor that is used on a device, and stored in another place between uses.

    With place `device` it is the tensor itself, so in-place changes suffice. Elsewhere `load` may return a copy, and
    changes have to be stored with `save`.

    Args:
        tensor: Initial value, on the device; with place `device` it is not copied.
        place: `device`, `host` or `disk`.
        folder: Folder of the file of `disk`, see `in_file`.
    """

    def __init__(self, tensor: torch.Tensor, place: str = "device", folder: Path | None = None) -> None:
        self.shape, self.dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._mapped = False
        if place == "host":
            self._tensor = pinned_like(tensor) if tensor.is_cuda else torch.empty(tensor.shape, dtype=tensor.dtype)
        elif place == "disk":
            self._tensor, self._mapped = in_file(tuple(tensor.shape), tensor.dtype, folder), True
        else:
            self._tensor = tensor
        self.save(tensor)

    def load(self) -> torch.Tensor:
        """Return the tensor on the device."""
        if not self._mapped:
            return self._tensor.to(self._device, non_blocking=True)
        loaded = self._tensor.to(self._device, copy=True)
        self.release()
        return loaded

    def save(self, tensor: torch.Tensor) -> None:
        """Store a tensor of the same shape and dtype."""
        if tensor is not self._tensor:
            self._tensor.copy_(tensor)
            self.release()

    def stored(self) -> torch.Tensor:
        """Return the tensor in its place, for reading; the pages of a file stay in memory until `release`."""
        return self._tensor

    def release(self) -> None:
        """Let the system reclaim the memory of a file's pages, which it writes back in its own time."""
        if self._mapped:
            release(self._tensor)


class Batch:
    """Windows that pass a layer together: their residual stream (batch, seq_len, D), and each layer's keyword arguments."""

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

    Iteration yields the batches that contribute to the statistics. Held-out windows pass the same layers, so that the
    result can be judged by windows to which nothing was fitted.

    Args:
        samples: Number of calibration windows on all ranks, without those held out.
        batch_size: Windows per batch; a rank's last batch has the rest.
        placement: Where the residual stream is stored.
        ranks: The processes of the run.
        num_held_out: Number of held-out windows on all ranks; they are numbered after the others.

    Attributes:
        batches: Batches in the statistics.
        held_out: Batches of held-out windows; a rank may have none.
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
        """Largest number of tokens on any rank."""
        return math.ceil(self.samples / self.ranks.size) * self.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(samples, seq_len, D) of all ranks, without held-out windows."""
        return (self.samples, *self[0].hidden.shape[1:])

    def windows(self, rank: int) -> list[range]:
        """Return the window numbers of every batch of a rank."""
        return self._batched(self.ranks.share(self.samples, rank))

    def held_out_windows(self, rank: int) -> list[range]:
        """Return the window numbers of every held-out batch of a rank; they begin at `samples`."""
        share = self.ranks.share(self.num_held_out, rank)
        return self._batched(range(self.samples + share.start, self.samples + share.stop))

    def _batched(self, share: range) -> list[range]:
        return [share[start : start + self.batch_size] for start in range(0, len(share), self.batch_size)]

    def of_all_ranks(self) -> Iterator[tuple[int, range, Batch | None]]:
        """Yield (rank, windows, batch) in the order of the windows, held-out batches last.

        The batch is None if it belongs to another rank.
        """
        for rank in range(self.ranks.size):
            for number, windows in enumerate(self.windows(rank)):
                yield rank, windows, self[number] if rank == self.ranks.rank else None
        for rank in range(self.ranks.size):
            for number, windows in enumerate(self.held_out_windows(rank)):
                yield rank, windows, self.held_out[number] if rank == self.ranks.rank else None

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """(windows, seq_len, D) of all ranks, with held-out windows."""
        return (self.samples + self.num_held_out, *self.shape[1:])

    def store(self, tensor: torch.Tensor) -> Stored:
        """Store a tensor of a batch in the place of the residual stream."""
        return Stored(tensor, self.placement.states, self.placement.folder)


@dataclass(frozen=True)
class State:
    """Named tensors that are written piece by piece, so that they need not be in memory at once.

    Attributes:
        layout: Shape and dtype of each tensor, by name.
        pieces: Contents in that order, one tensor after the other, as CPU tensors of any size.
    """

    layout: dict[str, tuple[tuple[int, ...], torch.dtype]]
    pieces: Iterable[torch.Tensor]

    def write(self, path: Path) -> None:
        """Write a safetensors file: the length of the header, the header, and the bytes of all tensors."""
        header, end = {}, 0
        for name, (shape, dtype) in self.layout.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)  # aligns the tensors' bytes
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for piece in self.pieces:
                content: Any = piece.contiguous().flatten().view(torch.uint8).numpy()
                file.write(content)
