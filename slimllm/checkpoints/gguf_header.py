"""Check of the counts and lengths in a GGUF file's header, before a library trusts them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from slimllm.errors import InputError

# Bytes of a value by its type: u8, i8, u16, i16, u32, i32, f32, bool, and u64, i64, f64. 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4  # as in ggml
_MOST_ITEMS = 8_000_000  # in all arrays; gguf-py makes an object of each item, and the largest vocabulary has 1.5 million
_LEAST_BITS = 1  # of an element of a quantised tensor


class _Header:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.end = path.stat().st_size
        self.items = 0  # of all arrays so far

    def number(self, form: str) -> int:
        """Read the next number, in a format of `struct`."""
        raw = self.file.read(struct.calcsize(form))
        if len(raw) < struct.calcsize(form):
            raise self.damaged("it ends in its header")
        value: int = struct.unpack(form, raw)[0]
        return value

    def skip(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.end - self.file.tell():
            raise self.damaged(f"{what} goes beyond its end")
        self.file.seek(num_bytes, 1)

    def text(self, what: str) -> None:
        self.skip(self.number("<Q"), what)

    def value(self, what: str, kind: int) -> None:
        if kind == _TEXT:
            self.text(what)
        elif kind == _ARRAY:
            of, count = self.number("<I"), self.number("<Q")
            self.items += count
            if self.items > _MOST_ITEMS:
                raise self.damaged(f"its lists have {self.items:,} items")
            if of == _TEXT:
                if count * 8 > self.end - self.file.tell():
                    raise self.damaged(f"{what} goes beyond its end")
                for _ in range(count):
                    self.text(what)
            else:
                self.skip(count * self.size(of, what), what)
        else:
            self.skip(self.size(kind, what), what)

    def size(self, kind: int, what: str) -> int:
        if kind not in _SIZES:
            raise self.damaged(f"{what} is of an unknown type ({kind})")
        return _SIZES[kind]

    def damaged(self, why: str) -> InputError:
        return InputError(f"{self.path} cannot be read as GGUF ({why}); it is damaged or truncated.")


def check_header(path: Path) -> None:
    """Check all lengths and counts of a header, reading only numbers.

    Raises:
        ValueError: (as InputError) one of them is impossible in a file of this size.
    """
    with path.open("rb") as file:
        header = _Header(file, path)
        file.seek(4)  # after the magic bytes
        version = header.number("<I")
        if version & 0xFFFF == 0:
            raise InputError(f"{path} is big-endian; convert it with gguf-py's gguf-convert-endian.")
        if version not in (2, 3):
            raise InputError(f"{path} has version {version} of GGUF; only 2 and 3 are read. Convert it with llama.cpp.")
        tensors, settings = header.number("<Q"), header.number("<Q")
        if tensors * 24 + settings * 13 > header.end:
            raise header.damaged(f"{tensors} tensors and {settings} settings do not fit into it")
        for number in range(settings):
            header.text(f"the name of setting {number}")
            header.value(f"setting {number}", header.number("<I"))
        for number in range(tensors):
            header.text(f"the name of tensor {number}")
            dimensions = header.number("<I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise header.damaged(f"tensor {number} has {dimensions} dimensions")
            elements = 1
            for _ in range(dimensions):
                elements *= header.number("<Q")
            if not 0 < elements * _LEAST_BITS <= 8 * header.end:
                raise header.damaged(f"tensor {number} has {elements} numbers")
            header.skip(12, f"tensor {number}")  # its type and offset


def check_sizes(settings: dict[str, Any], shapes: list[tuple[int, ...]], path: Path) -> None:
    """Check the sizes of a model in its settings against its tensors.

    Raises:
        ValueError: (as InputError) there are more layers than tensors, or a width exceeds that of every tensor.
    """
    widest = max((max(shape) for shape in shapes), default=0)
    bounds = {
        "block_count": len(shapes),
        "embedding_length": widest,
        "feed_forward_length": widest,
        "vocab_size": widest,
        "attention.head_count": widest,
        "attention.head_count_kv": widest,
        "attention.key_length": widest,
        "attention.value_length": widest,
        "rope.dimension_count": widest,
        "context_length": 10**9,
    }
    for name, value in settings.items():
        most = bounds.get(name.partition(".")[2])
        if most is None or isinstance(value, list):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise InputError(f"{path} has {str(value)[:40]!r} as {name}, which does not fit its tensors; it is damaged.")
