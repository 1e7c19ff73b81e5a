"""Calls of the command line in the test's own process."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Call the command line in this process, which saves seconds of importing.

    Returns:
        Exit code, stdout, and stderr without line breaks.
    """
    from slimllm import cli

    saved = sys.argv
    sys.argv = ["slimllm", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = saved
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())
