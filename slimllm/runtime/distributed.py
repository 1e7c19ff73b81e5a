"""Ranks of one run, and the communication between them.

Every rank holds its share of the calibration windows and all of the current layer. Sums over windows are added up over the
ranks, the first rank's choices apply to all, and rows of large solves are distributed. Messages are JSON, never pickles.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import distributed

from slimllm.errors import InputError, LostRankError, OtherRankError, OutputError, exhausted


class Sums(Protocol):
    """Additive statistics: sums over tokens, the number of tokens, and the sum of the token weights."""

    count: int
    mass: float

    def sums(self) -> Iterable[torch.Tensor]: ...


class Ranks:
    """The rank of this process, and communication with the other ranks of the run.

    All ranks call the same methods in the same order, except `share`, `rows`, and methods documented otherwise.

    Args:
        group: The process group; None: this process alone.

    Attributes:
        rank: Rank of this process, from 0.
        size: Number of ranks.

    Raises:
        ValueError: (as InputError) the group has no backend for CPU tensors; (as LostRankError, in every method that
            communicates) another rank has ended or does not answer.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else distributed.get_rank(group)
        self.size = 1 if group is None else distributed.get_world_size(group)
        if group is not None and distributed.get_backend(group) == "nccl":
            raise InputError(
                'The process group has no backend for the CPU; make it with init_process_group("cpu:gloo,cuda:nccl").'
            )

    @property
    def first(self) -> bool:
        """Whether this is the first rank, which makes choices, writes files and prints."""
        return self.rank == 0

    @contextmanager
    def one_log(self) -> Iterator[None]:
        """Suppress this process's log records below ERROR within the block, unless it is the first rank."""
        logger = logging.getLogger("slimllm")

        def drop(record: logging.LogRecord) -> bool:
            return self.first or record.levelno >= logging.ERROR

        logger.addFilter(drop)
        try:
            yield
        finally:
            logger.removeFilter(drop)

    def share(self, total: int, rank: int | None = None) -> range:
        """Return a rank's part of `total` items (default: this rank's): contiguous, in order, and as even as possible."""
        rank = self.rank if rank is None else rank
        return range(total * rank // self.size, total * (rank + 1) // self.size)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this rank's share of the rows of a tensor."""
        share = self.share(len(tensor))
        return tensor[share.start : share.stop]

    def join(self, rows: torch.Tensor, total: int) -> torch.Tensor:
        """Return the whole tensor of `total` rows, of which every rank has computed its share."""
        if self.size == 1:
            return rows
        whole = rows.new_empty(total, *rows.shape[1:])
        for rank in range(self.size):
            share = self.share(total, rank)
            part = whole[share.start : share.stop]
            if rank == self.rank:
                part.copy_(rows)
            if len(share):
                self._broadcast(part, rank)
        return whole

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Sum tensors over the ranks, in place; every rank has the same bits afterwards."""
        if self.size > 1:
            with self._talking():
                for tensor in tensors:
                    distributed.all_reduce(tensor, group=self._group)

    def add_up(self, *statistics: Sums) -> None:
        """Turn statistics of this rank's tokens into statistics of all tokens, in place."""
        if self.size == 1:
            return
        for one in statistics:
            if (move := getattr(one, "move", None)) is not None:
                pivot: torch.Tensor = one.pivot.clone()  # type: ignore[attr-defined]
                self._broadcast(pivot, 0)
                move(pivot)
            for tensor in one.sums():
                self.sum_(tensor)
            of_ranks = self.everyone([one.count, one.mass])
            one.count, one.mass = sum(count for count, _ in of_ranks), sum(mass for _, mass in of_ranks)

    def broadcast_(self, tensor: torch.Tensor, rank: int) -> None:
        """Replace a tensor by that of a rank, in place; shape, dtype and kind of device are the same on all ranks."""
        if self.size > 1:
            self._broadcast(tensor, rank)

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the first rank's tensor; shape and dtype are the same on all ranks."""
        if self.size == 1:
            return tensor
        sent = tensor.cpu()
        self._broadcast(sent, 0)
        return sent.to(tensor.device)

    def tell(self, value: Any) -> Any:
        """Return the first rank's value on every rank; plain JSON data."""
        return value if self.size == 1 else self._say(value, 0)

    def made_by_first(self, make: Callable[[], Any]) -> Any:
        """Return what `make` returns on the first rank, plain JSON data; for work that is not worth distributing."""
        made = None
        with self.together():
            if self.first:
                made = make()
        return self.tell(made)

    def made_together(self, make: Callable[[], Any]) -> Any:
        """Return what `make` returns on the first rank, plain JSON data; for work that the ranks share within `make`.

        An InputError is one of all ranks. Any other error ends this rank, which the others report.
        """
        made = error = None
        try:
            made = make()
        except InputError as met:
            if type(met) is not InputError:
                raise
            error = met
        with self.together():
            if error is not None:
                raise error
        return self.tell(made)

    def everyone(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in rank order; plain JSON data."""
        return [value] if self.size == 1 else [self._say(value, rank) for rank in range(self.size)]

    def send(self, rank: int, tensor: torch.Tensor) -> None:
        """Send a tensor to a rank that calls `receive`. Not a collective operation."""
        with self._talking():
            distributed.send(tensor.cpu().contiguous(), self._global(rank), group=self._group)

    def receive(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Receive a tensor from another rank, on the CPU. Not a collective operation."""
        tensor = torch.empty(shape, dtype=dtype)
        with self._talking():
            distributed.recv(tensor, self._global(rank), group=self._group)
        return tensor

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an input or output error on all ranks if one rank meets it in the block.

        Ranks inside the block must not wait for one that has left it early. So a rank that meets an error must still do
        its part of any communication in the block.

        Raises:
            ValueError: (as OtherRankError) another rank met the error, and reports it to the user; (as OutputError) in
                place of an OSError.
        """
        error: InputError | None = None
        try:
            yield
        except InputError as met:
            error = met
        except OSError as met:
            error = OutputError(f"Reading or writing failed: {met}.")
            error.__cause__ = met
        sentences = self.everyone(None if error is None else str(error))
        speakers = [rank for rank, sentence in enumerate(sentences) if sentence is not None]
        if speakers and speakers[0] != self.rank:
            raise OtherRankError(f"Rank {speakers[0]}: {sentences[speakers[0]]}") from error
        if error is not None:
            raise error

    def _say(self, value: Any, rank: int) -> Any:
        content = json.dumps(value).encode() if rank == self.rank else b""
        length = torch.tensor([len(content)])
        self._broadcast(length, rank)
        letters = torch.empty(int(length), dtype=torch.uint8)
        if rank == self.rank:
            letters.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self._broadcast(letters, rank)
        return value if rank == self.rank else json.loads(bytes(letters.numpy()))

    def _broadcast(self, tensor: torch.Tensor, rank: int) -> None:
        with self._talking():
            distributed.broadcast(tensor, self._global(rank), group=self._group)

    def _global(self, rank: int) -> int:
        assert self._group is not None
        return distributed.get_global_rank(self._group, rank)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if exhausted(error) is not None:
                raise
            raise LostRankError(
                f"Another process of this run has ended or does not answer, as seen from rank {self.rank}."
            ) from error


@contextmanager
def launched(device: str | None) -> Iterator[distributed.ProcessGroup | None]:
    """Yield the process group of the processes started by torchrun; None if this process is alone.

    If every machine has enough GPUs, each process gets its own GPU and they communicate over NCCL; otherwise over gloo.

    Args:
        device: The requested device; None: not given.

    Raises:
        ValueError: (as InputError) only some of the processes would have their own GPU.
    """
    alone = not distributed.is_available() or not distributed.is_torchelastic_launched()
    if alone or int(os.environ["WORLD_SIZE"]) == 1:
        yield None
        return
    local, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    distributed.init_process_group("gloo")
    group = distributed.group.WORLD
    own_gpu = Ranks(group).everyone(device in (None, "cuda") and local_size <= torch.cuda.device_count())
    if any(own_gpu) and not all(own_gpu):
        raise InputError(f"Only ranks {[rank for rank, own in enumerate(own_gpu) if own]} have a GPU; give --device cpu.")
    if all(own_gpu):
        torch.cuda.set_device(local)
        group = distributed.new_group(backend="cpu:gloo,cuda:nccl")
    yield group
    distributed.barrier(group)  # no process leaves while another still communicates


def end(code: Any) -> NoReturn:
    """Exit with a code, and without interpreter shutdown if `launched` has made a group.

    A normal shutdown stops gloo's threads in arbitrary order, and occasionally aborts.
    """
    if distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1 if code else 0)
    sys.exit(code)
