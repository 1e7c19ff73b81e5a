"""Shipped kernel configurations, compiled ahead of time: no GPU is needed. All of them take minutes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")

ROOT = Path(__file__).parents[3]
REPORT = ROOT / "benchmarks" / "kernels_report.py"


@pytest.mark.parametrize(
    ("arch", "every"), [(90, 8), *(pytest.param(arch, 1, marks=pytest.mark.slow) for arch in (80, 86, 90))]
)
def test_kernels_compile_without_spills_and_use_tensor_cores(arch: int, every: int) -> None:
    # In a process of its own: here the kernels may have been decorated for the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(REPORT), "--arch", str(arch), "--every", str(every), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr[-2000:]
    assert {row["name"]: row["faults"] for row in rows if row["faults"]} == {}
    assert done.returncode == 0
    assert all(row["arch"] == arch for row in rows)


def test_every_kernel_and_every_launch_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from kernel_variants import variants

    for arch in (80, 90):
        found = variants(arch)
        names = [variant.name for variant in found]
        assert len(set(names)) == len(names)
        launched = {variant.kernel.fn.__name__ for variant in found}
        sources = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
        assert launched == set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
        for dtype in ("bf16", "fp16", "fp32"):
            launches = ["plain", "unaligned", "unaligned result", "transposed", "pivot", "weight", "pivot weight"]
            launches += ["pivot weight unaligned"]
            launches += ["tma"] if arch >= 90 and dtype != "fp32" else []
            wanted = {f"gram {dtype} {launch}{split}" for launch in launches for split in ("", " partial")}
            assert wanted <= set(names)
