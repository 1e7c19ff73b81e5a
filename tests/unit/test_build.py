"""The C++ sources: they compile without a warning, and setup.py says in one line why it leaves them out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
HAS_STABLE_ABI = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc").glob("*.cpp")))
def test_no_warnings(source: str, tmp_path: Path) -> None:
    if source != "module.cpp" and not HAS_STABLE_ABI:
        pytest.skip("torch before 2.11 has no stable ABI")
    import sysconfig

    import pybind11
    from torch.utils.cpp_extension import include_paths

    folders = [pybind11.get_include(), sysconfig.get_paths()["include"], *include_paths()]
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wshadow", "-Werror"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-isystem{folder}" for folder in folders)]
    done = subprocess.run([*command, str(ROOT / "csrc" / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


@pytest.mark.skipif(not HAS_STABLE_ABI, reason="torch before 2.11 has no stable ABI")
def test_without_a_compiler(tmp_path: Path) -> None:
    none = {"CXX": "/no/such/compiler", "CC": "/no/such/compiler"}
    auto = build(tmp_path, SLIMLLM_BUILD_EXT="auto", **none)
    lines = [line for line in auto.stdout.splitlines() if line.startswith("slimllm: ")]
    assert auto.returncode == 0 and len(lines) == 1 and "extension not built, torch does its work" in lines[0]
    assert build(tmp_path, SLIMLLM_BUILD_EXT="1", **none).returncode != 0
    assert not list(tmp_path.rglob("*.so"))


def test_left_out_or_mistaken(tmp_path: Path) -> None:
    left_out = build(tmp_path, SLIMLLM_BUILD_EXT="0")
    assert left_out.returncode == 0 and "left out (SLIMLLM_BUILD_EXT=0)" in left_out.stdout
    mistaken = build(tmp_path, SLIMLLM_BUILD_EXT="yes")
    assert mistaken.returncode != 0 and "must be one of auto, 1, 0, got 'yes'" in mistaken.stderr
