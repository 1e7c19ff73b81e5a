"""A GGUF file, or the parts of a split one: its settings, and its tensors, read one by one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from slimllm.checkpoints.gguf_header import check_header
from slimllm.errors import InputError

MAGIC = b"GGUF"

# First bytes of files mistaken for GGUF files, and what the error says about them.
_OTHER_FILES = {
    b"PK\x03\x04": "is a pickled PyTorch file, which is never read; convert it to safetensors",
    b"\x80": "is a pickled PyTorch file, which is never read; convert it to safetensors",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch it with git lfs pull",
    **dict.fromkeys(
        (b"lmgg", b"fmgg", b"tjgg"), "is a GGML file, the format before GGUF; convert it with an old llama.cpp"
    ),
}

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)?", re.IGNORECASE | re.DOTALL)
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Entry:
    """Location of a tensor in its file; `shape` is in torch order."""

    file: Path
    offset: int
    num_bytes: int
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]


Header = tuple[dict[str, Any], dict[str, Entry], gguf.GGUFReader]  # settings, tensor locations, and the parse of all fields


class _Reader(gguf.GGUFReader):
    """Reader of plain arrays: a slice of a memory map, of which it makes millions, takes several times as long."""

    @property
    def data(self) -> Any:
        return self._plain

    @data.setter
    def data(self, mapped: Any) -> None:
        self._plain = np.asarray(mapped)


class GGUFFile:
    """A GGUF file, or all parts of a split one, given any of them.

    Attributes:
        path: The file; for a split one the first part, which has the settings and the tokenizer.
        name: File name without the suffix and the number of the part.
        settings: Metadata except arrays.
        entries: Locations of the tensors, by their names in GGUF.

    Raises:
        ValueError: (as InputError) the file is not GGUF or is damaged, or a part is missing.
    """

    def __init__(self, path: Path) -> None:
        self.settings, self.entries, reader = header = _read_header(path)
        parts = _parts(path, self.settings)
        self.path, self.name = parts[0], path.stem if path.suffix.lower() == ".gguf" else path.name
        if len(parts) > 1:
            self.name = self.name[: -len("-00001-of-00002")]
            headers = {part: header if part == path else _read_header(part) for part in parts}
            self._join(headers)
            reader = headers[parts[0]][2]
        self._reader: gguf.GGUFReader | None = reader

    @contextmanager
    def parsed_once(self) -> Iterator[None]:
        """Let transformers use the parsed header, which it would parse in every call, and release it afterwards."""
        theirs = gguf.GGUFReader
        gguf.GGUFReader = lambda path, mode="r": self._reader  # type: ignore[misc,assignment]
        try:
            yield
        finally:
            gguf.GGUFReader = theirs  # type: ignore[misc]
            self._reader = None

    def _join(self, headers: dict[Path, Header]) -> None:
        for index, (part, (settings, _, _)) in enumerate(headers.items()):
            if (settings.get("split.no"), settings.get("split.count")) != (index, len(headers)):
                raise InputError(
                    f"{part} is not part {index + 1} of {len(headers)} of a split GGUF file, although its name says so."
                )
        self.settings = headers[self.path][0]
        self.entries = {name: entry for _, entries, _ in headers.values() for name, entry in entries.items()}
        number = sum(len(entries) for _, entries, _ in headers.values())
        asked = self.settings.get("split.tensors.count", number)
        if not number == asked == len(self.entries):
            raise InputError(f"The parts of {self.path} hold {number} tensors, but the model that was split had {asked}.")

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor in fp32, on the CPU.

        Raises:
            ValueError: (as InputError) the file has been truncated since it was opened.
        """
        entry = self.entries[name]
        rows = entry.shape[0] if len(entry.shape) > 1 else 1
        values = np.empty((rows, math.prod(entry.shape) // rows), dtype=np.float32)
        bytes_per_row = entry.num_bytes // rows
        # A few rows at a time: dequantising takes several times the memory of its result.
        for start in range(0, rows, _ROWS_AT_ONCE):
            block = values[start : start + _ROWS_AT_ONCE]
            offset, count = entry.offset + start * bytes_per_row, len(block) * bytes_per_row
            raw = np.fromfile(entry.file, dtype=np.uint8, count=count, offset=offset)
            if raw.size != count:
                raise InputError(f"{entry.file} ends inside tensor {name}; it is truncated.")
            if entry.kind == gguf.GGMLQuantizationType.F32:
                block[:] = raw.view(np.float32).reshape(block.shape)
            else:
                block[:] = gguf.quants.dequantize(raw.reshape(len(block), bytes_per_row), entry.kind)
        return torch.from_numpy(values).view(entry.shape)


def number_of(settings: dict[str, Any], name: str, default: float, path: Path) -> float:
    """Return a setting that is a number.

    Raises:
        ValueError: (as InputError) it is not a number, or not finite.
    """
    value = settings.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{path} has {value!r} as {name}, which is not a number; the file is damaged.")
    return value


def _check_magic(path: Path) -> None:
    """Raise ValueError (as InputError) if a file does not begin like GGUF; the message says what it is, if known."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from None
    if start.startswith(MAGIC):
        return
    what = next((what for magic, what in _OTHER_FILES.items() if start.startswith(magic)), None)
    if not start:
        what = "is empty; give a model folder, a GGUF file or a hub id"
    elif start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        what = f"is a safetensors file; give the folder that contains it, {path.resolve().parent}"
    raise InputError(f"{path} {what or 'is neither a folder nor a GGUF file; give one of them or a hub id'}.")


def _read_header(path: Path) -> Header:
    """Parse the header of one file; the mapping of the file is released with the reader."""
    _check_magic(path)
    try:
        check_header(path)
        reader = _Reader(path)
        settings = {
            name: field.contents() for name, field in reader.fields.items() if field.types[:1] != [gguf.GGUFValueType.ARRAY]
        }
    except InputError:
        raise
    except (ValueError, OSError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise InputError(f"{path} cannot be read as GGUF ({error}); it is damaged or truncated.") from None
    entries = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape))
        entries[tensor.name] = Entry(path, tensor.data_offset, int(tensor.n_bytes), tensor.tensor_type, shape)
    for kind in {entry.kind for entry in entries.values()}:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except NotImplementedError:
            raise InputError(f"{path} has tensors of type {kind.name}, which cannot be dequantised.") from None
    return settings, entries, reader


def _parts(path: Path, settings: dict[str, Any]) -> list[Path]:
    """Return all files of a model, given one of them.

    Raises:
        ValueError: (as InputError) a part is missing, or the parts cannot be found because the file is not named like one.
    """
    count = int(number_of(settings, "split.count", 1, path))
    if count <= 1:
        return [path]
    number = int(number_of(settings, "split.no", 0, path)) + 1
    match = _PART.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (number, count):
        raise InputError(
            f"{path} is part {number} of {count} of a split GGUF file, whose other parts are found by its name; "
            f"name it NAME-{number:05d}-of-{count:05d}.gguf."
        )
    parts = [path.with_name(f"{match[1]}-{i + 1:05d}-of-{count:05d}{match[4] or ''}") for i in range(count)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise InputError(f"{path} is part {number} of {count} of a split GGUF file, but {missing[0]} is not in its folder.")
    return parts
