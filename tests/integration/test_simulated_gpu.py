"""A part of the tests for a GPU, on a simulated one, in processes of their own; all of them: make test-simulated-gpu."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")

GPU = Path(__file__).parents[1] / "gpu"


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "processors"), [("8.0", "108"), ("9.0", "132")])
def test_on_a_simulated_gpu(capability: str, processors: str, tmp_path: Path) -> None:
    chosen = "test_simulated" if capability == "9.0" else "inner_activations or least_squares or dtype1"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(GPU), os.environ.get("PYTHONPATH", "")]),
        "SIMULATED_CUDA": "1",
        "SIMULATED_CAPABILITY": capability,
        "SIMULATED_PROCESSORS": processors,
        "SLIMLLM_BACKEND": "triton",  # without comparing every kernel with torch, which takes a minute here
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu and not slow", "-k", chosen]
    done = subprocess.run(
        [*command, "--basetemp", str(tmp_path / "pytest"), str(GPU)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=GPU.parents[1],
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
