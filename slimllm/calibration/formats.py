"""Formats of text files, recognised by content: plain text, JSON lines, a JSON document, or a table."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimllm.calibration.files import check_no_nul, compression_of, head_of, opened, shown
from slimllm.errors import InputError

BLOCK_BYTES = 2**16
# Longest JSON document, line, or field of a table, each of which is held in memory whole.
_LONGEST = 2**26
# A block drops a word that its border cuts, if the word ends within this many bytes. Otherwise the text, which may have no
# spaces, is cut between two characters.
_WORD_BYTES = 2**10
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".gzip", ".zst", ".zstd")
_CONTINUED = bytes(range(0x80, 0xC0))  # continuation bytes of UTF-8, with which no character begins
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class TextFile:
    """A file and its format.

    Attributes:
        path: The file.
        kind: `text`: plain text. `lines`: a JSON value in every line. `document`: one JSON value, usually a list of
            objects. `table`: comma- or tab-separated values after a header with the column names.
        compression: `gzip`, `zstd` or None.
        size: Size of the file in bytes.
    """

    path: Path
    kind: str
    compression: str | None
    size: int

    @property
    def unit(self) -> str:
        """Word for one numbered item of `entries`, for messages."""
        return "Line" if self.kind == "lines" else "Entry"

    @property
    def has_blocks(self) -> bool:
        """Whether reading can start in the middle of the file."""
        return self.kind in ("text", "lines") and self.compression is None

    def text(self, characters: int | None = None) -> str:
        """Read plain text from the beginning, at most `characters` characters unless that is None.

        Raises:
            ValueError: (as InputError) the file cannot be read or is not UTF-8 text.
        """
        with opened(self.path, self.compression) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig").read(characters)
        check_no_nul(self.path, "\0" in text)
        return text

    def entries(self) -> Iterator[tuple[int, Any]]:
        """Yield the entries of a file that is not plain text, in order, each with its number.

        Numbers start at 1. Blank lines of JSON lines are counted; the header and blank rows of a table are not.

        Raises:
            ValueError: (as InputError) the file cannot be read, or does not have the format that was recognised.
        """
        with opened(self.path, self.compression) as binary:
            stream = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="" if self.kind == "table" else None)
            if self.kind == "table":
                yield from self._rows(stream)
            elif self.kind == "lines":
                for number, line in enumerate(self._lines(stream), 1):
                    if line := line.strip().lstrip(_BYTE_ORDER_MARK):
                        yield number, self._parsed(line, f"Line {number}")
            else:
                content = stream.read(_LONGEST + 1)
                if len(content) > _LONGEST:
                    raise InputError(
                        f"{shown(self.path)} is one JSON document of more than {_LONGEST >> 20} MiB, which must be read at "
                        "once; save it as JSON lines (.jsonl), with one object per line."
                    )
                parsed = self._parsed(content, "") if content.strip() else []
                for number, entry in enumerate(parsed if isinstance(parsed, list) else [parsed], 1):
                    yield number, entry

    def block_entries(self, block: int) -> Iterator[tuple[int, Any]]:
        """Yield the JSON lines that begin in the block at byte `block * BLOCK_BYTES`, each with its byte offset.

        Raises:
            ValueError: (as InputError) as for `entries`.
        """
        begin = block * BLOCK_BYTES
        with opened(self.path, None) as stream:
            if begin:
                stream.seek(begin - 1)
                if not stream.readline(BLOCK_BYTES).endswith(b"\n"):
                    return  # a single line spans the whole block
            while (at := stream.tell()) < begin + BLOCK_BYTES and (raw := stream.readline(_LONGEST + 1)):
                self._check_length(raw, f"at byte {at}")
                if line := raw.decode("utf-8").strip().lstrip(_BYTE_ORDER_MARK):
                    yield at, self._parsed(line, f"The line at byte {at}")

    def block_text(self, block: int) -> str:
        """Return the plain text of the block from byte `block * BLOCK_BYTES` on, without the words that its borders cut.

        Words are separated by ASCII white space. If there is none within 1 KiB of a border, only a character that the
        border cuts is left out.

        Raises:
            ValueError: (as InputError) the file cannot be read or is not UTF-8 text.
        """
        before = 1 if block else 0
        with opened(self.path, None) as stream:
            stream.seek(block * BLOCK_BYTES - before)
            raw = stream.read(before + BLOCK_BYTES + 1)
            previous, content, following = raw[:before], raw[before : before + BLOCK_BYTES], raw[before + BLOCK_BYTES :]
            if following and not following.isspace():
                content = content[: len(content) - (_until_space(content[: -_WORD_BYTES - 1 : -1]) or 0)]
            if previous and not previous.isspace():
                word = _until_space(content[:_WORD_BYTES])
                if word is None and len(content) <= _WORD_BYTES:  # the file ends with it
                    return ""
                content = content.lstrip(_CONTINUED) if word is None else content[word:]
            text = codecs.getincrementaldecoder("utf-8")().decode(content, final=not following)
        check_no_nul(self.path, "\0" in text)
        text = text if block else text.removeprefix(_BYTE_ORDER_MARK)
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _lines(self, stream: io.TextIOWrapper) -> Iterator[str]:
        number = 0
        while line := stream.readline(_LONGEST + 1):
            number += 1
            self._check_length(line, str(number))
            yield line

    def _check_length(self, line: str | bytes, where: str) -> None:
        if len(line) > _LONGEST:
            raise InputError(f"Line {where} of {shown(self.path)} is longer than {_LONGEST >> 20} MiB; split it.")

    def _parsed(self, content: str, where: str) -> Any:
        try:
            return json.loads(content)
        except json.JSONDecodeError as error:
            where = where or f"Line {error.lineno}"
            raise InputError(
                f"{where} of {shown(self.path)} is not valid JSON: {error.msg} (column {error.colno})."
            ) from None
        except (ValueError, RecursionError):
            raise InputError(
                f"{where or 'The text'} of {shown(self.path)} is not valid JSON: it has numbers with thousands of digits, "
                "or is nested thousands of levels deep."
            ) from None

    def _rows(self, stream: io.TextIOWrapper) -> Iterator[tuple[int, dict[str, str | None]]]:
        csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))  # the limit is global to the process
        # A wrong quote would silently swallow the rows after it, so strict parsing makes it an error.
        reader = csv.reader(self._lines(stream), delimiter=_DELIMITERS[_suffix(self.path)], strict=True)
        try:
            names = next(reader, [])
            for number, row in enumerate((row for row in reader if row), 1):
                if len(row) > len(names):
                    raise InputError(
                        f"Entry {number} of {shown(self.path)} has {len(row)} fields, but the header has {len(names)}; "
                        'quote texts that contain the delimiter ("like, this").'
                    )
                check_no_nul(self.path, any("\0" in field for field in row))
                # A table has no null, so an empty field stands for one.
                yield number, {name: field or None for name, field in zip(names, row)}
        except csv.Error as error:
            check_no_nul(self.path, "NUL" in str(error))  # Python 3.10 refuses it by itself
            raise InputError(f"Line {reader.line_num} of {shown(self.path)} is not a row of a table: {error}.") from None


def recognise(path: Path) -> TextFile:
    """Recognise the format of a file by its content.

    The suffix decides only that a file is a table (.csv, .tsv) or must be JSON (.json, .jsonl, .ndjson).

    Raises:
        ValueError: (as InputError) the file cannot be read, or is not UTF-8 text.
    """
    compression = compression_of(path)
    start = head_of(path, compression).decode("utf-8-sig", "ignore").lstrip()
    suffix = _suffix(path)

    def file(kind: str) -> TextFile:
        return TextFile(path, kind, compression, path.stat().st_size)

    if suffix in _DELIMITERS:
        return file("table")
    if start.startswith("{") and _begins_with_objects(file("lines")):
        return file("lines")
    if suffix in _JSON_LINES and not start.startswith("["):
        return file("lines")
    if suffix in (".json", *_JSON_LINES) or (re.match(r"\[\s*\{", start) and _is_list(file("document"))):
        return file("document")
    return file("text")


def _suffix(path: Path) -> str:
    """Return the suffix in lower case, without a compression suffix such as .gz after it."""
    name = Path(path.name.lower())
    return (name.with_suffix("") if name.suffix in _COMPRESSED else name).suffix


def _begins_with_objects(file: TextFile) -> bool:
    """Return whether the first two lines, or the only one, are JSON objects; plain text may also begin with a brace."""
    try:
        return all(isinstance(entry, dict) for _, entry in itertools.islice(file.entries(), 2))
    except InputError:
        return False


def _is_list(file: TextFile) -> bool:
    """Return whether a file is a JSON list. If it is too long to be read whole, its first object decides."""
    content = file.text(_LONGEST + 1)
    try:
        if len(content) > _LONGEST:
            json.JSONDecoder().raw_decode(content, content.index("{"))
        else:
            json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _until_space(content: bytes) -> int | None:
    """Return the number of bytes before the first white space, or None if there is none."""
    space = re.search(rb"\s", content)
    return space.start() if space else None
