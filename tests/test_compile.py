"""Every shipped kernel configuration, compiled ahead of time for sm_80, sm_86 and sm_90: no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

REPORT = Path(__file__).parent.parent / "benchmarks" / "kernels_report.py"


@pytest.mark.parametrize("arch", [80, 86, 90])
def test_kernels_compile_without_spills_and_use_tensor_cores(arch: int) -> None:
    # In a process of its own: here the kernels may have been decorated for the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(REPORT), "--arch", str(arch), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) >= 30, done.stderr[-2000:]
    assert {row["name"]: row["faults"] for row in rows if row["faults"]} == {}
    assert done.returncode == 0
