"""Output to the terminal, or a file or pipe in its place: text is printed literally, and losing it does not end the work.

User text is never taken for markup, whatever brackets and colons it has. After a closed pipe, a full disk or a closed
terminal, nothing more is printed; the work continues, and `lost` returns the reason at the end.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, TextIO

from rich.console import Console


class _Stream:
    """The current sys.stdout or sys.stderr, until writing to it fails."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.error: OSError | None = None

    @property
    def _file(self) -> TextIO:
        file = getattr(sys, self._name)
        real: TextIO = getattr(file, "rich_proxied_file", file)  # rich wraps the stream while a bar is shown
        return real

    @property
    def rich_proxied_file(self) -> _Stream:
        return self

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                return self._file.write(text)
            except UnicodeEncodeError:  # undecodable bytes of a path, or a terminal with few characters
                code = self._file.encoding
                return self._file.write(text.encode(code, "backslashreplace").decode(code))
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._file.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        """Discard what is still buffered, and what others write to the stream."""
        self.error = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._file.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


_log = logging.getLogger("slimllm")
_output, _errors = _Stream("stdout"), _Stream("stderr")
console = Console(file=_output, markup=False, emoji=False)  # type: ignore[arg-type]
errors = Console(file=_errors, markup=False, emoji=False)  # type: ignore[arg-type]


class Notices(logging.Handler):
    """Log handler that prints what the package logs while a command runs.

    Args:
        console: Where notices go; errors go to standard error.
        quiet: Print nothing below a warning, and warnings to standard error.
    """

    def __init__(self, console: Console, quiet: bool) -> None:
        super().__init__(logging.WARNING if quiet else logging.INFO)
        self._console = errors if quiet else console

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != _log.name and record.levelno < logging.WARNING:  # such as kernels in use
            return
        try:
            sentence = self.format(record)
        except Exception:
            self.handleError(record)
            return
        if record.levelno >= logging.ERROR:
            errors.print(sentence, highlight=False, soft_wrap=True)
        else:
            style = "yellow" if record.levelno >= logging.WARNING else "dim"
            self._console.print(sentence, style=style, highlight=False, soft_wrap=True)

    def __enter__(self) -> Notices:
        self._before = _log.level, _log.propagate
        _log.addHandler(self)
        _log.setLevel(min(_log.level or logging.INFO, logging.INFO))
        _log.propagate = False  # a handler of a plug-in would print everything again
        return self

    def __exit__(self, *about: object) -> None:
        _log.removeHandler(self)
        level, _log.propagate = self._before
        _log.setLevel(level)


def open_closed_streams() -> None:
    """Open the standard streams that the caller has closed, to the null device.

    Otherwise the next files that are opened would get their numbers, and receive what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))


def lost() -> OSError | None:
    """Return why standard output did not take all text; None: it did, or its reader has closed the pipe."""
    _output.flush()
    _errors.flush()
    return None if isinstance(_output.error, BrokenPipeError) else _output.error
