"""The ranks of one run: how many processes there are, and the few things they tell each other.

Every rank has its share of the calibration windows and all of the layer at work. Sums over windows are added up over the
ranks, the first one's choices hold for all, and rows of large solves are shared out. Messages are JSON, never pickles.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import distributed

from slimllm.errors import InputError, LostRankError, OtherRankError, OutputError


class Sums(Protocol):
    """Statistics that add up: sums over tokens, how many tokens they are of, and the sum of their weights."""

    count: int
    mass: float

    def sums(self) -> list[torch.Tensor]: ...


class Ranks:
    """This process among those of the run.

    All ranks call the same methods in the same order, but for `share` and `rows`, and those that say so.

    Args:
        group: The processes; None: this one alone.

    Attributes:
        rank: Which of them this one is, from 0.
        size: How many there are.

    Raises:
        ValueError: (as InputError) the group cannot send tensors that are on a CPU; (as LostRankError, of every method that
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
        """Whether this is the rank that chooses, writes and talks."""
        return self.rank == 0

    @contextmanager
    def one_log(self) -> Iterator[None]:
        """Let this process log no more than errors about the run meanwhile, unless it is the first one."""
        logger = logging.getLogger("slimllm")

        def drop(record: logging.LogRecord) -> bool:
            return self.first or record.levelno >= logging.ERROR

        logger.addFilter(drop)
        try:
            yield
        finally:
            logger.removeFilter(drop)

    def share(self, total: int, rank: int | None = None) -> range:
        """The part of `total` things that a rank (this one) has: contiguous, in order, and as even as can be."""
        rank = self.rank if rank is None else rank
        return range(total * rank // self.size, total * (rank + 1) // self.size)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's share of the rows of a tensor."""
        share = self.share(len(tensor))
        return tensor[share.start : share.stop]

    def join(self, rows: torch.Tensor, total: int) -> torch.Tensor:
        """The whole tensor, with `total` rows, of which every rank has made its share."""
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
        """Let statistics of this rank's tokens become those of all tokens."""
        if self.size == 1:
            return
        for one in statistics:
            if (move := getattr(one, "move", None)) is not None:
                pivot: torch.Tensor = one.pivot.clone()  # type: ignore[attr-defined]
                self._broadcast(pivot, 0)
                move(pivot)
            self.sum_(*one.sums())
            of_ranks = self.everyone([one.count, one.mass])
            one.count, one.mass = sum(count for count, _ in of_ranks), sum(mass for _, mass in of_ranks)

    def of_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first rank's tensor, of the same shape and dtype on all."""
        if self.size == 1:
            return tensor
        sent = tensor.cpu()
        self._broadcast(sent, 0)
        return sent.to(tensor.device)

    def tell(self, value: Any) -> Any:
        """What the first rank says; plain JSON data."""
        return value if self.size == 1 else self._say(value, 0)

    def made_by_first(self, make: Callable[[], Any]) -> Any:
        """What the first rank makes, plain JSON data, while the others wait: work that is not worth sharing out."""
        made = None
        with self.together():
            if self.first:
                made = make()
        return self.tell(made)

    def everyone(self, value: Any) -> list[Any]:
        """What every rank says, in their order; plain JSON data."""
        return [value] if self.size == 1 else [self._say(value, rank) for rank in range(self.size)]

    def send(self, rank: int, tensor: torch.Tensor) -> None:
        """Send a tensor to a rank that receives it. No collective one."""
        with self._talking():
            distributed.send(tensor.cpu().contiguous(), self._global(rank), group=self._group)

    def receive(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor that another rank sends to this one, on the CPU. No collective one."""
        tensor = torch.empty(shape, dtype=dtype)
        with self._talking():
            distributed.recv(tensor, self._global(rank), group=self._group)
        return tensor

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error of the input or the output that one rank meets in this block ends it on all of them.

        A rank that leaves the block early must not be waited for in it: whatever is said there has to be said by all.

        Raises:
            ValueError: (as OtherRankError) another one has met it, and tells the user; (as OutputError) in place of an
                OSError.
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
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise LostRankError(
                f"Another process of this run has ended or does not answer, as rank {self.rank} finds."
            ) from error


@contextmanager
def launched(device: str | None) -> Iterator[distributed.ProcessGroup | None]:
    """The process group of the processes that torchrun has started; None when this one is alone.

    Each gets a GPU of its own, and they talk over NCCL, where there are enough on every machine; otherwise over gloo.

    Args:
        device: The device that was asked for, if one was.

    Raises:
        ValueError: (as InputError) some would have a GPU of their own, and others not.
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
    distributed.barrier(group)  # nobody leaves while another one still has something to say


def end(code: Any) -> NoReturn:
    """End this process with an exit code; at once where `launched` has made a group.

    The interpreter's own end would take down gloo's threads in any order, and now and then abort.
    """
    if distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1 if code else 0)
    sys.exit(code)
