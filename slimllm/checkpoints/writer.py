"""Writing of a checkpoint, shard by shard, in a folder beside its final place that is renamed when it is complete."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slimllm.checkpoints.base import Checkpoint
from slimllm.checkpoints.destination import OURS, check_destination, destination
from slimllm.checkpoints.folder import INDEX
from slimllm.checkpoints.headers import SAFETENSORS_DTYPES
from slimllm.checkpoints.journal import Journal, damaged, last_stage, lock, sync
from slimllm.errors import HopelessError, InputError, OutputError

_PART = 256 * 2**20  # bytes of a shard of tensors beside the model


def check_interrupted(out: Path, resume: bool) -> bool:
    """Return whether the interrupted run that is to be resumed had already moved its complete result into place.

    Raises:
        ValueError: (as InputError) there is an interrupted run, and `resume` is not set.
    """
    partial = partial_folder(out)
    if (partial / "lock").exists():
        os.close(lock(partial))  # raises if a run is at work there
    stage = last_stage(partial)
    if stage == "finished" and not resume:
        raise InputError(f"A run for {out} is complete except for its last step: add --resume (in Python, resume=True).")
    if stage is not None and not resume:
        raise InputError(
            f"A run for {out} was interrupted and can be resumed: add --resume (in Python, resume=True), "
            f"or delete {partial} to start over."
        )
    return stage == "finished" and not (partial / "model").exists()


def can_resume(out: Path) -> bool:
    """Return whether a run for a folder was interrupted and can be resumed."""
    return last_stage(partial_folder(destination(out))) is not None


class CheckpointWriter:
    """Context manager that writes a checkpoint: `finish` makes the folder `out` appear, complete and on the disk.

    Until then everything is in `.NAME.partial` beside it, with the journal of the run. That folder is kept when the block
    ends with an error, unless there is nothing to resume yet, or a resumed run would fail again.

    Args:
        out: The folder to create, resolved.
        num_shards: Number of shards that will be written.
        overwrite: Whether a model in `out` may be replaced.
        identity, environment: See `Journal`.

    Attributes:
        folder: Folder in which the result is written.
        journal: The record of the run; it has steps if the run is resumed.
        total_size, num_parameters: Bytes and parameters in the shards so far.

    Raises:
        ValueError: (as InputError) another process writes there, or the interrupted run there is another one.
    """

    def __init__(
        self, out: Path, num_shards: int, overwrite: bool, identity: dict[str, Any], environment: dict[str, Any]
    ) -> None:
        self.out, self._num_shards, self._overwrite = out, num_shards, overwrite
        self._identity, self._environment = identity, environment
        self._weight_map: dict[str, str] = {}
        self.total_size = 0
        self.num_parameters = 0

    def __enter__(self) -> CheckpointWriter:
        self._partial = partial_folder(self.out)
        self.folder = self._partial / "model"
        try:
            self._partial.mkdir(parents=True, exist_ok=True)
            self.journal = Journal(self._partial, self._identity, self._environment)
            if not self.journal.steps:
                self._begin()
        except OSError as error:
            raise OutputError(f"The output folder {self.out} cannot be made: {error.strerror}.") from None
        return self

    def _begin(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        try:
            self.folder.mkdir()
        except OSError:
            self.journal.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        resumable = not isinstance(error, HopelessError)
        self.journal.wait()
        try:
            if kind is None or not (resumable and last_stage(self._partial)):
                _remove(self._partial)
        finally:
            self.journal.close()  # last, because another run may then lock the folder
        if isinstance(error, OSError):
            raise OutputError(f"The disk failed while {self.out} was being made: {error}.") from error

    def write_shard(self, number: int, tensors: dict[str, torch.Tensor]) -> None:
        """Write shard `number` (from 1) with these tensors, under their full names."""
        path = self.folder / self._shard_name(number)
        # Outside the folder of the result, because safetensors leaves its temporary file if it is killed.
        beside = self._partial / path.name
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        try:
            save_file(contiguous, beside, metadata={"format": "pt"})
        except Exception as error:
            # safetensors raises its own type for a full disk.
            raise OutputError(f"Writing {path.name} to {self.out.parent} failed: {error}.") from error
        beside.chmod(0o666 & ~_umask())
        os.replace(beside, path)
        self.journal.include(path)
        for key, tensor in contiguous.items():
            self._count(key, path.name, tensor.numel(), tensor.element_size())

    @property
    def bytes_there(self) -> int:
        """Bytes that the run has on the disk already."""
        return self.total_size + sum(path.stat().st_size for path in self._partial.glob("state-*"))

    def adopt_shard(self, number: int) -> None:
        """Count a shard that was written before the interruption.

        Raises:
            ValueError: (as InputError) it is missing or damaged.
        """
        path = self.folder / self._shard_name(number)
        self.journal.check_file(path)
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    view = file.get_slice(key)
                    self._count(key, path.name, math.prod(view.get_shape()), SAFETENSORS_DTYPES[view.get_dtype()].itemsize)
        except (SafetensorError, OSError):
            raise damaged(path) from None

    def _shard_name(self, number: int) -> str:
        return f"model-{number:05d}-of-{self._num_shards:05d}.safetensors"

    def _count(self, key: str, shard: str, numel: int, itemsize: int) -> None:
        self._weight_map[key] = shard
        self.total_size += numel * itemsize
        self.num_parameters += numel

    def complete(self) -> None:
        """Write the index, and flush everything to the disk; the result then only has to be moved."""
        files = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()} | {INDEX}
        index = {
            # From this list `check_destination` knows what may be replaced.
            "metadata": {"total_size": self.total_size, "total_parameters": self.num_parameters, OURS: sorted(files)},
            "weight_map": dict(sorted(self._weight_map.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / INDEX).write_text(text, encoding="utf-8")
        for path in [*self.folder.rglob("*"), self.folder]:
            sync(path)
        self.journal.finish()

    def finish(self) -> None:
        """Move the result to its final place, unless that was done before an interruption."""
        if not self.folder.exists():
            return
        try:  # again, because something may have been put there during the run
            check_destination(self.out, [], self._overwrite)
        except InputError as error:
            raise OutputError(f"{error} The complete result is in {self.folder}.") from None
        replaced = None
        if self.out.exists() and any(self.out.iterdir()):
            replaced = Path(tempfile.mkdtemp(prefix="replaced-", dir=self._partial)) / "old"
            os.rename(self.out, replaced)
        elif self.out.exists():
            self.out.rmdir()
        try:
            os.rename(self.folder, self.out)
        except OSError:
            if replaced is not None:
                os.rename(replaced, self.out)
            raise
        sync(self.out.parent)


def in_parts(checkpoint: Checkpoint) -> list[list[str]]:
    """Return the names of the tensors beside a model in shards of at most 256 MiB, or of one larger tensor."""
    parts: list[list[str]] = []
    room = 0
    for name, shape in checkpoint.beside().items():
        size = _bytes(checkpoint, name, shape)
        if size > room:
            parts.append([])
            room = _PART
        parts[-1].append(name)
        room -= size
    return parts


def bytes_beside(checkpoint: Checkpoint) -> int:
    """Return the bytes of the tensors beside a model."""
    return sum(_bytes(checkpoint, name, shape) for name, shape in checkpoint.beside().items())


def _bytes(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * checkpoint.storage_dtype(name).itemsize


def partial_folder(out: Path) -> Path:
    """Return the folder in which the result and the journal are written until the result is complete."""
    return out.with_name(f".{out.name}.partial")


def remove_leftover(out: Path) -> None:
    """Remove files that a run killed during its clean-up has left beside its complete result.

    Raises:
        ValueError: (as InputError) another run is at work there.
    """
    partial = partial_folder(out)
    if partial.is_dir() and last_stage(partial) is None:
        held = lock(partial)
        _remove(partial)
        os.close(held)


def _remove(partial: Path) -> None:
    """Remove a partial folder: the lock last, and the journal just before, since while it exists this can be repeated."""
    last = ("journal.jsonl", "lock")
    if not partial.exists():  # deleted by somebody else
        return
    for path in sorted(partial.iterdir(), key=lambda path: last.index(path.name) if path.name in last else -1):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # fails if another run has started there
        partial.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
