"""Half a minute of `tests/fuzz.py`; `make test-fuzz` is ten, from another number on."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz.py"


OLD = tuple(map(int, importlib.metadata.version("tokenizers").split(".")[:2])) < (0, 23)


@pytest.mark.skipif(OLD, reason="tokenizers before 0.23 aborts the process on some damaged files")
@pytest.mark.slow
def test_damaged_files_are_refused_or_read_as_they_are() -> None:
    done = subprocess.run([sys.executable, str(FUZZ), "--seconds", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = re.findall(r"^(\S+) +(\d+) +(\d+) +(\d+) +0$", done.stdout, re.MULTILINE)
    assert len(rows) == 8, done.stdout
    assert all(int(refused) > 0 and int(right) > 0 for _, _, refused, right in rows), done.stdout
