"""Programs of tests/*.cpp under sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def sanitized(source: str, folder: Path, sanitizers: tuple[str, ...] = ("thread", "address,undefined")) -> dict[str, Path]:
    """Compile a program of tests/ once for each sanitizer."""
    if not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    for name in sanitizers:
        command = [
            "g++",
            "-std=c++17",
            "-O1",
            "-g",
            "-pthread",
            f"-fsanitize={name}",
            "-Wall",
            "-Wextra",
            "-Wshadow",
            "-Werror",
        ]
        command += [str(ROOT / "tests" / source), "-o", str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return {name: folder / name for name in sanitizers}
