"""Record of a run in its partial folder: the run's identity, the completed steps, and the hidden states to resume from.

A step counts as done when its line is in the journal. The line is written after everything it refers to is on the disk: the
shards, then the state, each flushed. A background thread does this. While it is busy, further steps wait until the next
state is written: a slow disk does not delay the run, but after a crash some layers have to be computed again. An incomplete
last line is ignored; any other damage is found by checksum.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from slimllm.errors import InputError, OutputError
from slimllm.runtime.hidden_states import State

Step = dict[str, Any]
_NAME, _LOCK = "journal.jsonl", "lock"
_SCHEMA = 2  # of the steps that a journal holds


class Journal:
    """The journal of one run, locked by its process.

    Attributes:
        steps: The completed steps, oldest first, each with its `stage` and plain JSON data.
        environment: The environment in which the run was started.

    Args:
        folder: The partial folder, which exists.
        identity: Identity of the run, plain JSON; the journal of a run with another identity is not resumed.
        environment: The environment of this process, plain JSON; it may differ when a run is resumed.

    Raises:
        ValueError: (as InputError) another process works in the folder, or the journal is of another run or damaged.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], environment: dict[str, Any]) -> None:
        self.folder = folder
        self._lock = lock(folder)
        self._waiting: list[Step] = []  # steps not yet in the file
        self._unsynced: list[Path] = []  # files whose checksums go into the next line
        self._busy: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "slimllm-journal")
        try:
            self.environment, self.steps = _open(folder, identity, environment)
            self._tidy()
        except BaseException:
            self.close()
            raise

    def _tidy(self) -> None:
        """Remove files that were being written when the run was interrupted."""
        needed = {_NAME, _LOCK, *(step["state"] for step in self.steps[-1:] if "state" in step)}
        for path in self.folder.iterdir():
            if path.is_file() and path.name not in needed:
                path.unlink()

    def done(self, stage: str) -> list[Step]:
        """Return the completed steps of a stage, oldest first."""
        return [step for step in self.steps if step["stage"] == stage]

    def include(self, path: Path) -> None:
        """Add a file to the next step."""
        self._unsynced.append(path)

    def adopt(self, stage: str, steps: list[Step], data: Step) -> None:
        """Add steps that another run has done for this one as well; they are written with the next that has a state."""
        taken = [{"stage": stage, **step, **data} for step in steps]
        self._waiting += taken
        self.steps += taken

    @property
    def ready(self) -> bool:
        """Whether the last state is on the disk, so that another can be written."""
        return self._busy is None or self._busy.done()

    def record(self, stage: str, state: State | None, **data: Any) -> None:
        """Record a completed step. The call writes the state; flushing and checksums follow in the background.

        Args:
            stage: The step's stage.
            state: State to resume from after this step; its tensors may be overwritten when the call returns. None: the
                step waits for the next one that has a state.
            data: Plain JSON data about the step.

        Raises:
            ValueError: (as OutputError) this step or an earlier one could not be written.
        """
        step = {"stage": stage, **data}
        self._waiting.append(step)
        self.steps.append(step)
        if state is None:
            return
        self._settle()
        name = f"state-{len(self.steps)}.safetensors"
        beside = self.folder / f"{name}.partial"
        try:
            state.write(beside)
        except OSError as error:
            raise OutputError(f"Writing to {self.folder} failed: {error}.") from error
        step["state"] = name
        work = self._waiting, [*self._unsynced, beside]
        self._waiting, self._unsynced = [], []
        self._busy = self._thread.submit(self._write, *work, self.folder / name)

    def _write(self, steps: list[Step], files: list[Path], state: Path) -> None:
        for file in {*files, *(file.parent for file in files)}:
            sync(file)
        *shards, _ = files
        steps[-1]["files"] = {file.name: _crc(file) for file in shards}
        steps[-1]["state_crc"] = _crc(files[-1])
        os.replace(files[-1], state)
        sync(self.folder)
        _append(self.folder, steps)
        for old in self.folder.glob("state-*.safetensors"):
            if old != state:
                old.unlink()

    def _settle(self) -> None:
        """Wait for the thread, and raise its errors."""
        try:
            if self._busy is not None:
                self._busy.result()
        except OSError as error:
            raise OutputError(f"Writing to {self.folder} failed: {error}.") from error
        finally:
            self._busy = None

    def state(self) -> Any:
        """Open the state after the last step, a safetensors file, whose tensors can be read one by one.

        Raises:
            ValueError: (as InputError) it is missing or damaged.
        """
        path = self.folder / str(self.steps[-1].get("state"))
        try:
            if _crc(path) == self.steps[-1]["state_crc"]:
                return safe_open(path, framework="pt")
        except (OSError, SafetensorError):
            pass
        raise damaged(path)

    def check_file(self, path: Path) -> None:
        """Raise if a file of a completed step is not what was written.

        Raises:
            ValueError: (as InputError) it is missing or damaged.
        """
        checksums = [step["files"][path.name] for step in self.steps if path.name in step.get("files", {})]
        if not path.is_file() or not checksums or _crc(path) != checksums[-1]:
            raise damaged(path)

    def finish(self) -> None:
        """Record that the result is complete and on the disk, and only has to be moved to its place."""
        self._settle()
        step = {"stage": "finished"}
        _append(self.folder, [*self._waiting, step])
        self.steps.append(step)
        self._waiting = []

    def wait(self) -> None:
        """Wait until pending writes succeed or fail; nothing can be recorded afterwards."""
        self._thread.shutdown()

    def close(self) -> None:
        """Wait for pending writes, and unlock the folder."""
        self.wait()
        os.close(self._lock)


def begun_with(folder: Path) -> Step:
    """Return the identity of the run whose journal is in a folder; empty if no journal can be read."""
    try:
        lines = _read(folder)[0]
    except InputError:
        return {}
    return dict(lines[0]["identity"]) if len(lines) > 1 else {}


def last_stage(folder: Path) -> str | None:
    """Return the last step's stage in a folder's journal; None if there is nothing to resume, `damaged` if unreadable."""
    try:
        lines = _read(folder)[0]
    except InputError:
        return "damaged"
    return str(lines[-1]["stage"]) if len(lines) > 1 else None


def _open(folder: Path, identity: Step, environment: Step) -> tuple[Step, list[Step]]:
    """Open the journal of this run, or start one; return the environment it was started in, and its steps."""
    first = json.loads(json.dumps({"schema_version": _SCHEMA, "identity": identity, "environment": environment}))
    lines, length = _read(folder)
    if not lines and any(path.name not in (_NAME, _LOCK) for path in folder.iterdir()):
        raise damaged(folder / _NAME)
    if len(lines) < 2:  # there is nothing to resume
        (folder / _NAME).unlink(missing_ok=True)
        _append(folder, [first])
        return environment, []
    if lines[0].get("schema_version") != _SCHEMA:
        raise InputError(
            f"The run in {folder} was started by another version of slimllm; resume it with that version, "
            f"or delete {folder} to start over."
        )
    found, wanted = lines[0]["identity"], first["identity"]
    for key in {**found, **wanted}:
        if found.get(key) != wanted.get(key):
            raise InputError(
                f"The interrupted run had another {key} ({found.get(key)}) than this one ({wanted.get(key)}); "
                f"give the same, or delete {folder} to start over."
            )
    with (folder / _NAME).open("r+b") as file:
        file.truncate(length)
    return lines[0]["environment"], lines[1:]


def _read(folder: Path) -> tuple[list[Step], int]:
    """Read a journal: its entries, the run's identity first, and the length in bytes of its complete lines."""
    path = folder / _NAME
    entries: list[Step] = []
    length = 0
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        crc, _, text = line[:-1].partition(b" ")
        if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
            if number == len(lines):
                break  # an interrupted write; if it was complete once, the earlier state is gone, and `state` raises
            raise damaged(path)
        try:
            batch = json.loads(text)
        except (ValueError, RecursionError):
            raise damaged(path) from None
        if not isinstance(batch, list):
            raise damaged(path)
        entries += batch
        length += len(line)
    return entries, length


def damaged(path: Path) -> InputError:
    """Return the error for a file of an interrupted run that is missing, or is not what was written."""
    folder = next(parent for parent in path.parents if parent.name.endswith(".partial"))
    return InputError(f"{path} is missing or damaged, so the run cannot be resumed; delete {folder} and start over.")


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(tensors: dict[str, torch.Tensor]) -> int:
    """Return a checksum of named tensors on the CPU."""
    crc = 0
    for name, tensor in sorted(tensors.items()):
        content: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
        crc = zlib.crc32(content, zlib.crc32(name.encode(), crc))
    return crc


def _append(folder: Path, entries: list[Step]) -> None:
    """Append a line, which is later read as a whole or not at all."""
    text = json.dumps(entries).encode()
    with (folder / _NAME).open("ab") as file:
        file.write(b"%08x %b\n" % (zlib.crc32(text), text))
        file.flush()
        os.fsync(file.fileno())
    sync(folder)


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            crc = zlib.crc32(chunk, crc)
    return crc


def lock(folder: Path) -> int:
    """Lock a folder for this process and return the descriptor; the lock ends with the process, however that ends.

    Raises:
        ValueError: (as InputError) another process has locked it.
    """
    path = folder / _LOCK
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The last owner may have finished, and removed the file, between opening and locking.
        if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    raise InputError(f"Another run is writing to {folder}; wait for it, or give another output folder.")
