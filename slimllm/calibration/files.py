"""Reading of text files: streaming decompression, and errors that say why a file cannot be read."""

from __future__ import annotations

import gzip
import importlib
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from slimllm.errors import InputError

_HEAD_BYTES = 2**16
_COMPRESSIONS = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
# First bytes of files that are not text, with what the file is and what to do with it.
_OTHERS = {
    rb"PAR1": "a Parquet file; put it into a folder and give the folder, which is read as a dataset (extra: datasets)",
    rb"ARROW1": "an Arrow file; put it into a folder and give the folder, which is read as a dataset (extra: datasets)",
    rb"PK\x03\x04": "a zip archive; unpack it and give the file with the text",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it and give the file with the text",
    rb"(?s).{257}ustar": "a tar archive; unpack it and give the file with the text",
    rb"\xfd7zXZ\x00": "compressed with xz; decompress it (unxz), or compress it with gzip instead",
    rb"BZh[1-9]1AY&SY": "compressed with bzip2; decompress it (bunzip2), or compress it with gzip instead",
    rb"%PDF-": "a PDF document; save its text as a .txt file",
    rb"GGUF": "a GGUF model, not a text",
}
_UTF_16, _UTF_32 = (rb"\xff\xfe|\xfe\xff", "UTF-16"), (rb"\xff\xfe\x00\x00|\x00\x00\xfe\xff", "UTF-32")


def shown(name: object) -> str:
    """Return a printable form of a name: whatever is not valid Unicode, such as raw bytes in a path, is escaped."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def check_regular(path: Path) -> None:
    """Check that a path is neither a broken link nor a device or pipe, which might never end.

    Raises:
        ValueError: (as InputError) the path is one of these.
    """
    if path.is_symlink() and not path.exists():
        raise InputError(f"{shown(path)} is a link to {shown(path.readlink())}, which does not exist.")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{shown(path)} is a device or a pipe, not a file; save the text in a file and give that.")


def compression_of(path: Path) -> str | None:
    """Return how a file is compressed, judged by its first bytes: `gzip`, `zstd` or None.

    Raises:
        ValueError: (as InputError) the file cannot be read.
    """
    with opened(path, None) as stream:
        head = stream.read(4)
    return next((name for name, magic in _COMPRESSIONS.items() if head.startswith(magic)), None)


def head_of(path: Path, compression: str | None) -> bytes:
    """Return the first 64 KiB of a file of UTF-8 text, decompressed.

    Raises:
        ValueError: (as InputError) the file cannot be read, or is not UTF-8 text; the message says what it is instead.
    """
    with opened(path, compression) as stream:
        head = stream.read(_HEAD_BYTES)
    for pattern, name in (_UTF_32, _UTF_16):  # the byte order mark of UTF-32 begins with that of UTF-16
        if re.match(pattern, head):
            raise InputError(_convert(path, name))
    for pattern, what in _OTHERS.items():
        if re.match(pattern, head):
            raise InputError(f"{shown(path)} is {what}.")
    # Without a byte order mark: text in most languages has characters with one NUL byte in UTF-16, and three in UTF-32.
    nul = head.count(0)
    if 0.25 < (share := nul / max(len(head), 1)) < 0.8:
        odd = head[1::2].count(0) * 2 > nul
        raise InputError(_convert(path, f"UTF-{16 if share <= 0.5 else 32}{'LE' if odd else 'BE'}"))
    check_no_nul(path, nul > 0)
    return head


def check_no_nul(path: Path, found: bool) -> None:
    """Raise ValueError (as InputError) if a NUL byte was found: the file is binary or damaged."""
    if found:
        raise InputError(
            f"{shown(path)} holds NUL bytes, so it is not UTF-8 text; convert it if it is UTF-16 (iconv -f UTF-16 -t UTF-8 "
            "FILE > NEW), or give another file."
        )


@contextmanager
def opened(path: Path, compression: str | None) -> Iterator[BinaryIO]:
    """Open a file as a stream of decompressed bytes, and turn errors that occur while it is read into InputError.

    Raises:
        ValueError: (as InputError) the file cannot be opened, decompressed or decoded.
    """
    failures: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    opener: Callable[[Path], Any] = gzip.open if compression else lambda path: path.open("rb")
    if compression == "zstd":
        opener, failure = _zstd(path)
        failures = (*failures, failure)
    try:
        with opener(path) as stream:
            yield stream
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"The text in {shown(path)} cannot be read: it is not UTF-8 (it has a byte 0x{byte:02x}); convert it, for "
            "example: iconv -f ISO-8859-1 -t UTF-8 FILE > NEW."
        ) from None
    except failures as error:
        damaged = f"it is damaged or truncated ({error})" if compression else error
        raise InputError(f"The text in {shown(path)} cannot be read: {damaged}.") from None


def _convert(path: Path, encoding: str) -> str:
    return f"{shown(path)} is {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8 FILE > NEW."


def _zstd(path: Path) -> tuple[Callable[[Path], Any], type[Exception]]:
    """Return a function that opens a zstd file as a decompressed stream, and the error that it raises on damaged data."""
    for name in ("compression.zstd", "zstandard"):  # the first is part of Python since 3.14
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        return getattr(module, "ZstdFile", None) or _zstandard_open, module.ZstdError
    raise InputError(
        f"{shown(path)} is compressed with zstd; install a reader (pip install zstandard), or decompress it (unzstd)."
    )


def _zstandard_open(path: Path) -> Any:
    decompressor = importlib.import_module("zstandard").ZstdDecompressor()
    return decompressor.stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
