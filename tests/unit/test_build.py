"""Building: C++ sources compile without a warning, setup.py says in a line why it leaves them out; wheel and sdist."""

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
def test_the_compilers_own_words(tmp_path: Path) -> None:
    """Not the exception's, which say only that it failed."""
    compiler = tmp_path / "broken++"
    words = "echo 'a.cpp:7: fatal error: no such header'; exit 1"
    compiler.write_text(f"#!/bin/sh\ncase $1 in -*version*) echo 12.2.0;; *) {words};; esac\n")
    compiler.chmod(0o755)
    done = build(tmp_path, SLIMLLM_BUILD_EXT="auto", CXX=str(compiler), CC=str(compiler))
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("slimllm: "))
    assert line == "slimllm: extension not built; torch is used instead (a.cpp:7: fatal error: no such header)"


@pytest.mark.skipif(not HAS_STABLE_ABI, reason="torch before 2.11 has no stable ABI")
def test_without_a_compiler(tmp_path: Path) -> None:
    none = {"CXX": "/no/such/compiler", "CC": "/no/such/compiler"}
    auto = build(tmp_path, SLIMLLM_BUILD_EXT="auto", **none)
    lines = [line for line in auto.stdout.splitlines() if line.startswith("slimllm: ")]
    assert auto.returncode == 0 and len(lines) == 1 and "extension not built; torch is used instead" in lines[0]
    assert build(tmp_path, SLIMLLM_BUILD_EXT="1", **none).returncode != 0
    assert not list(tmp_path.rglob("*.so"))


def test_left_out_or_mistaken(tmp_path: Path) -> None:
    left_out = build(tmp_path, SLIMLLM_BUILD_EXT="0")
    assert left_out.returncode == 0 and "left out (SLIMLLM_BUILD_EXT=0)" in left_out.stdout
    mistaken = build(tmp_path, SLIMLLM_BUILD_EXT="yes")
    assert mistaken.returncode != 0 and "must be one of auto, 1, 0, got 'yes'" in mistaken.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_published_can_be_installed(kind: str, tmp_path: Path) -> None:
    """Built from a copy of the checkout, installed into an empty folder, and pruned with from there."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in listed:
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target, follow_symlinks=False)
    environment = {**os.environ, "SLIMLLM_BUILD_EXT": "0"}
    pip = [sys.executable, "-m", "pip", "-q"]
    source = tmp_path / "checkout"
    if kind == "sdist":
        code = "import os, sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
        made = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], cwd=source, env=environment, capture_output=True, text=True
        )
        assert made.returncode == 0, made.stderr
        source = next(tmp_path.glob("*.tar.gz"))
    options = ["--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, "install", *options, str(source)], env=environment, check=True)
    code = (
        "import sys, slimllm; from importlib import resources; assert sys.argv[1] in slimllm.__file__, slimllm.__file__;"
        "model = str(resources.files('slimllm') / 'calibration' / 'data' / 'stories260k');"
        "print(slimllm.prune(model, sys.argv[2], slimllm.PruneConfig(ratio=0.2, samples=4)).achieved_ratio);"
        "import slimllm.kernels.gram, slimllm.report; slimllm.report.write_page(sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site"), str(tmp_path / "out")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.html").is_file()
